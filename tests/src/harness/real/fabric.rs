//! The network between nodes, control plane and the client outside: one bridge in a namespace of
//! its own, which has no uplink and does not forward.
//!
//! Below an overlay it is as strict as a cloud's network: it drops packets of nodes that have a
//! pod's address.

use std::sync::Arc;

use anyhow::Result;

use super::cni::Cni;
use super::plan::{self, API_PORT, NODES, Plan, SUBNET, node_name};
use crate::harness::netns::actors::exec::{ip_batch, sysctl, tool};
use crate::harness::netns::topology::fabric::{host_sysctls, router_sysctls};
use crate::harness::netns::topology::namespace::{self, Netns};
use crate::harness::netns::topology::plan::{Addresses, cidr};

/// The namespace of the control plane.
pub(super) const CONTROL: &str = "control";
/// The namespace of the client outside.
pub(super) const OUTSIDE: &str = "outside";
const FABRIC: &str = "fabric";

/// The network namespaces of a cluster. Dropping leaves them.
#[derive(Clone, Debug)]
pub(super) struct Fabric {
    pub(super) control: Arc<Netns>,
    pub(super) outside: Arc<Netns>,
    pub(super) nodes: Vec<Arc<Netns>>,
}

impl Fabric {
    /// Makes all of it.
    pub(super) fn create(plan: &Plan, cni: Cni) -> Result<Self> {
        for name in names() {
            Netns::create(&plan.namespace(&name))?.leave();
        }
        let fabric = Self::open(plan)?;
        let switch = Netns::open(&plan.namespace(FABRIC))?;
        switch.run(|| {
            host_sysctls(0)?;
            for family in ["ip", "ip6", "arp"] {
                sysctl(&format!("bridge/bridge-nf-call-{family}tables"), "0").ok();
            }
            let gateway = plan::gateway();
            let mut lines = vec![
                "link set lo up".to_owned(),
                "link add br0 type bridge forward_delay 0 mcast_snooping 0".to_owned(),
                // The nodes' default gateway: it takes packets, and forwards none.
                format!("addr add {}/{} dev br0", gateway.v4, SUBNET.0),
                format!("addr add {}/{} dev br0 nodad", gateway.v6, SUBNET.1),
                "link set br0 up".to_owned(),
            ];
            for (port, netns) in fabric.ports() {
                lines.extend([
                    format!("link add {port} type veth peer name eth0 netns {}", netns.name()),
                    format!("link set {port} master br0"),
                    format!("link set {port} up"),
                ]);
            }
            ip_batch(&lines)?;
            if cni.is_overlay() {
                tool("nft", &["-f", "-"], &underlay())?;
            }
            Ok(())
        })?;
        switch.leave();
        let pods: Vec<String> = (1..=NODES).flat_map(routes_to_pods_of).collect();
        fabric.control.run(|| {
            host_sysctls(0)?;
            ip_batch(&[uplink(plan::control_plane()), pods].concat())
        })?;
        fabric.outside.run(|| {
            host_sysctls(0)?;
            ip_batch(&uplink(plan::outside()))
        })?;
        for (number, netns) in (1..=NODES).zip(&fabric.nodes) {
            netns.run(|| set_up_node(number, cni))?;
        }
        Ok(fabric)
    }

    /// Finds what [`Fabric::create`] made.
    pub(super) fn open(plan: &Plan) -> Result<Self> {
        let open = |name: &str| Netns::open(&plan.namespace(name)).map(Arc::new);
        let nodes = (1..=NODES).map(|number| open(&node_name(number)));
        Ok(Self {
            control: open(CONTROL)?,
            outside: open(OUTSIDE)?,
            nodes: nodes.collect::<Result<_>>()?,
        })
    }

    /// Everybody at the bridge, with the name of the port.
    fn ports(&self) -> Vec<(String, &Netns)> {
        let nodes = (1..=NODES).zip(&self.nodes);
        let nodes = nodes.map(|(number, netns)| (node_name(number), &**netns));
        let others = [(CONTROL, &self.control), (OUTSIDE, &self.outside)];
        let others = others.into_iter().map(|(name, netns)| (name.to_owned(), &**netns));
        nodes.chain(others).collect()
    }
}

/// Takes the names away. The namespaces end with the last process in them.
pub(super) fn remove(plan: &Plan) {
    for name in names() {
        namespace::remove(&plan.namespace(&name));
    }
}

fn names() -> Vec<String> {
    let others = [FABRIC, CONTROL, OUTSIDE].map(str::to_owned);
    others.into_iter().chain((1..=NODES).map(node_name)).collect()
}

/// `eth0` of everybody.
fn uplink(own: Addresses) -> Vec<String> {
    vec![
        "link set lo up".to_owned(),
        format!("addr add {}/{} dev eth0", own.v4, SUBNET.0),
        format!("addr add {}/{} dev eth0 nodad", own.v6, SUBNET.1),
        "link set eth0 up".to_owned(),
    ]
}

fn set_up_node(number: u8, cni: Cni) -> Result<()> {
    router_sysctls(0)?;
    // As every installer of Kubernetes has it.
    for family in ["ip", "ip6"] {
        sysctl(&format!("bridge/bridge-nf-call-{family}tables"), "1").ok();
    }
    let gateway = plan::gateway();
    let mut lines = uplink(plan::node(number));
    lines.push(format!("route add default via {}", gateway.v4));
    lines.push(format!("route add default via {}", gateway.v6));
    if !cni.is_overlay() {
        for other in (1..=NODES).filter(|other| *other != number) {
            lines.extend(routes_to_pods_of(other));
        }
    }
    ip_batch(&lines)
}

fn routes_to_pods_of(node: u8) -> [String; 2] {
    let Addresses { v4, v6 } = plan::node(node);
    let [pods_v4, pods_v6] = cidr::pods_of_node(node);
    [format!("route add {pods_v4} via {v4}"), format!("route add {pods_v6} via {v6}")]
}

/// nftables rules of the nodes' ports, which drop and count packets from and to pods' addresses.
/// Answers to the control plane pass: it has routes to pods, because it is on no node. Requests of
/// pods to the API server do not.
fn underlay() -> String {
    let ports: Vec<String> = (1..=NODES).map(node_name).collect();
    let control = plan::control_plane();
    let mut rules = String::new();
    for (family, pods, control) in [
        ("ip", cidr::PODS_V4.to_string(), control.v4.to_string()),
        ("ip6", cidr::PODS_V6.to_string(), control.v6.to_string()),
    ] {
        rules.push_str(&format!(
            "{family} saddr {pods} {family} daddr {control} tcp dport {API_PORT} counter drop
             {family} saddr {pods} {family} daddr {control} accept
             {family} saddr {pods} counter drop
             {family} daddr {pods} counter drop\n"
        ));
    }
    format!(
        "table netdev underlay {{
           chain nodes {{
             type filter hook ingress devices = {{ {} }} priority 0; policy accept;
             {rules}
           }}
         }}",
        ports.join(", ")
    )
}
