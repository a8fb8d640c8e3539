//! The network between the nodes: switch, router, and the witness of what leaves them.

use anyhow::{Context, Result};

use super::cluster::Options;
use super::cni::Cni;
use super::namespace::Netns;
use super::plan::{self, Addresses, NODE_GATEWAY, OUTSIDE_GATEWAY, SUBNET, cidr};
use super::second;
use crate::harness::netns::actors::exec::{
    disable_tx_checksum, enable_gro, ip_batch, sysctl, tool,
};
use crate::harness::netns::traffic::netfilter;

/// The fabric's namespace.
#[derive(Debug)]
pub struct Fabric {
    netns: Netns,
    nodes: u8,
    cni: Cni,
}

impl Fabric {
    /// Makes the switch and a port with its far end `eth0` in each of `nodes`, in order, and in
    /// `outside`.
    pub(in crate::harness::netns) fn create(
        netns: Netns,
        nodes: &[&Netns],
        outside: &Netns,
        options: &Options,
    ) -> Result<Self> {
        let count = u8::try_from(nodes.len()).context("too many nodes")?;
        let mut lines = vec![
            "link set lo up".to_owned(),
            "link add br0 type bridge forward_delay 0 mcast_snooping 0".to_owned(),
        ];
        lines.extend(addresses(NODE_GATEWAY, "br0"));
        for (node, far) in (1..=count).zip(nodes) {
            lines.extend(port(node, far));
        }
        lines.push(format!("link add outside type veth peer name eth0 netns {}", outside.name()));
        lines.extend(addresses(OUTSIDE_GATEWAY, "outside"));
        lines.push("link set br0 up".to_owned());
        lines.push("link set outside up".to_owned());
        if options.cni == Cni::TwoNetworks {
            lines.extend(second::on_fabric(nodes));
        }
        for node in (1..=count).filter(|_| options.cni.is_routed()) {
            let Addresses { v4, v6 } = plan::node(node);
            let [pods_v4, pods_v6] = cidr::pods_of_node(node);
            lines.push(format!("route add {pods_v4} via {v4}"));
            lines.push(format!("route add {pods_v6} via {v6}"));
        }
        lines.push(format!("route add blackhole {}", cidr::SERVICES_V4));
        lines.push(format!("route add blackhole {}", cidr::SERVICES_V6));
        netns.run(|| {
            router_sysctls(0)?;
            sysctl("bridge/bridge-nf-call-iptables", "0").ok();
            sysctl("bridge/bridge-nf-call-ip6tables", "0").ok();
            ip_batch(&lines)?;
            tool("nft", &["-f", "-"], &netfilter::fabric(count, options)).map(drop)
        })?;
        Ok(Self { netns, nodes: count, cni: options.cni })
    }

    /// The namespace: a bridge `br0` with ports `node1`, `node2` …, and a device `outside`.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Makes the port of a node and its far end again, and forgets who was there.
    pub(in crate::harness::netns) fn replug(&self, node: u8, far: &Netns) -> Result<()> {
        let mut lines = Vec::from(port(node, far));
        lines.push("neigh flush dev br0".to_owned());
        self.netns.run(|| ip_batch(&lines))
    }

    /// Takes in what XDP programs of the nodes send. What it merges on the way is cut up again
    /// with finished checksums, as these programs need it.
    pub(in crate::harness::netns) fn poll_ports(&self) -> Result<()> {
        self.netns.run(|| {
            (1..=self.nodes).try_for_each(|node| {
                let second = (self.cni == Cni::TwoNetworks).then(|| second::port(node));
                [format!("node{node}")].into_iter().chain(second).try_for_each(|port| {
                    enable_gro(&port)?;
                    disable_tx_checksum(&port)
                })
            })
        })
    }

    /// How many packets for a ClusterIP left a node; all were dropped. Nodes count from 1.
    ///
    /// # Errors
    /// The counter cannot be read.
    pub fn service_packets_from(&self, node: u8) -> Result<u64> {
        self.count(&format!("node{node}"))
    }

    /// How many packets a node sent from an address that is not its own; all were dropped, as the
    /// network of a cloud drops them. Nodes count from 1.
    ///
    /// # Errors
    /// The counter cannot be read.
    pub fn foreign_packets_from(&self, node: u8) -> Result<u64> {
        self.count(&format!("foreign{node}"))
    }

    fn count(&self, name: &str) -> Result<u64> {
        self.netns.run(|| {
            let said = tool("nft", &["list", "counter", "netdev", "fabric", name], "")?;
            let mut words = said.split_whitespace().skip_while(|word| *word != "packets");
            words
                .nth(1)
                .and_then(|count| count.parse().ok())
                .with_context(|| format!("no packet count in {said:?}"))
        })
    }

    /// [`Fabric::service_packets_from`] of all nodes together.
    ///
    /// # Errors
    /// A counter cannot be read.
    pub fn service_packets(&self) -> Result<u64> {
        (1..=self.nodes).map(|node| self.service_packets_from(node)).sum()
    }

    /// Routes ClusterIPs from the outside to a node, as some people do; nodes count from 1.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn route_services_to(&self, node: u8) -> Result<()> {
        let Addresses { v4, v6 } = plan::node(node);
        let lines = [
            format!("route replace {} via {v4}", cidr::SERVICES_V4),
            format!("route del blackhole {}", cidr::SERVICES_V6),
            format!("route add {} via {v6}", cidr::SERVICES_V6),
        ];
        self.netns.run(|| ip_batch(&lines))
    }

    /// Routes the addresses of load balancers and external IPs to a node, as a load balancer's
    /// speaker there would have it; nodes count from 1.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn route_external_to(&self, node: u8) -> Result<()> {
        let Addresses { v4, v6 } = plan::node(node);
        let external = cidr::EXTERNAL_V4.iter().map(|net| format!("route replace {net} via {v4}"));
        let external6 = cidr::EXTERNAL_V6.iter().map(|net| format!("route replace {net} via {v6}"));
        let lines: Vec<_> = external.chain(external6).collect();
        self.netns.run(|| ip_batch(&lines))
    }
}

/// A port of the switch with its far end `eth0` in the namespace of a node.
fn port(node: u8, far: &Netns) -> [String; 3] {
    let port = format!("node{node}");
    [
        format!("link add {port} type veth peer name eth0 netns {}", far.name()),
        format!("link set {port} master br0"),
        format!("link set {port} up"),
    ]
}

fn addresses(addresses: Addresses, device: &str) -> [String; 2] {
    [
        format!("addr add {}/{} dev {device}", addresses.v4, SUBNET.0),
        format!("addr add {}/{} dev {device} nodad", addresses.v6, SUBNET.1),
    ]
}

/// For the calling thread's namespace, before it has devices: they inherit the defaults.
pub(in crate::harness) fn host_sysctls(rp_filter: u8) -> Result<()> {
    for scope in ["all", "default"] {
        sysctl(&format!("ipv6/conf/{scope}/accept_dad"), "0")?;
        sysctl(&format!("ipv6/conf/{scope}/dad_transmits"), "0")?;
        sysctl(&format!("ipv6/conf/{scope}/accept_ra"), "0")?;
        sysctl(&format!("ipv6/conf/{scope}/router_solicitations"), "0")?;
        sysctl(&format!("ipv6/conf/{scope}/disable_ipv6"), "0")?;
    }
    for scope in ["all", "default", "lo"] {
        sysctl(&format!("ipv4/conf/{scope}/rp_filter"), &rp_filter.to_string())?;
    }
    Ok(())
}

/// [`host_sysctls`] of a host that forwards.
pub(in crate::harness) fn router_sysctls(rp_filter: u8) -> Result<()> {
    host_sysctls(rp_filter)?;
    sysctl("ipv4/ip_forward", "1")?;
    for scope in ["all", "default"] {
        sysctl(&format!("ipv6/conf/{scope}/forwarding"), "1")?;
    }
    Ok(())
}
