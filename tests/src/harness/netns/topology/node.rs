//! Nodes and the pods on them.

use std::net::IpAddr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Result, ensure};
use ipnet::IpNet;

use super::cgroup::Cgroup;
use super::cluster::{Options, Scope};
use super::cni::{self, Cni, Link};
use super::fabric::{host_sysctls, router_sysctls};
use super::namespace::Netns;
use super::overlay;
use super::plan::{self, Addresses, Family, NODE_GATEWAY, SUBNET, cidr};
use super::second;
use super::stale::BPF_FS;
use crate::harness::netns::actors::exec::{disable_tx_checksum, ip_batch, sysctl, tool};
use crate::harness::netns::actors::host::Host;
use crate::harness::netns::actors::process::{Place, Process};
use crate::harness::netns::traffic::netfilter;

/// A node: a [`Host`] with pods, an agent's cgroup and a BPF directory.
#[derive(Debug)]
pub struct Node {
    host: Host,
    number: u8,
    tree: Cgroup,
    agent: Cgroup,
    bpf_dir: PathBuf,
    next_pod: AtomicU8,
}

impl Node {
    pub(in crate::harness::netns) fn create(
        scope: &Scope,
        number: u8,
        options: &Options,
    ) -> Result<Self> {
        let name = format!("node{number}");
        let tree = scope.cgroup.child(&name)?;
        let host = Host {
            netns: Netns::create(&scope.name(&name))?,
            cgroup: tree.child("host")?,
            addresses: plan::node(number),
            logs: scope.logs.path().to_owned(),
            client: Mutex::default(),
            name,
        };
        host.netns.run(|| {
            router_sysctls(options.rp_filter)?;
            if !options.bridge_netfilter {
                sysctl("bridge/bridge-nf-call-iptables", "0")?;
                sysctl("bridge/bridge-nf-call-ip6tables", "0")?;
            }
            Ok(())
        })?;
        let agent = tree.child("agent")?;
        let bpf_dir = Path::new(BPF_FS).join(scope.name(&host.name));
        Ok(Self { host, number, tree, agent, bpf_dir, next_pod: AtomicU8::new(2) })
    }

    /// Sets up the node's side of its uplink, its routes and what it needs for pods.
    pub(in crate::harness::netns) fn connect(&self, nodes: u8, options: &Options) -> Result<()> {
        let mut lines = self.uplink(nodes, options.cni);
        lines.extend(cni::on_node(options.cni, self.number));
        let mut rules = options.rules;
        let mut forwarding = Vec::new();
        let mut of_cni = String::new();
        match options.cni {
            Cni::PointToPoint | Cni::Bridge => {}
            Cni::Vxlan => {
                lines.extend(overlay::on_node(self.number, nodes));
                forwarding = overlay::forwarding(self.number, nodes);
                of_cni = netfilter::flannel(self.number);
            }
            Cni::TwoNetworks => {
                lines.extend(second::on_node(self.number, nodes));
                rules.masquerade = true;
            }
        }
        let rules = rules.of_node(self.number) + &of_cni;
        self.host.netns.run(|| {
            ip_batch(&lines)?;
            if !forwarding.is_empty() {
                tool("bridge", &["-batch", "-"], &(forwarding.join("\n") + "\n"))?;
            }
            if !options.tx_checksum {
                disable_tx_checksum("eth0")?;
                if options.cni == Cni::TwoNetworks {
                    disable_tx_checksum(second::DEVICE)?;
                }
            }
            if !rules.is_empty() {
                tool("nft", &["-f", "-"], &rules)?;
            }
            Ok(())
        })
    }

    /// Its `eth0` and the routes by it.
    fn uplink(&self, nodes: u8, cni: Cni) -> Vec<String> {
        let mut lines = uplink(self.host.addresses, NODE_GATEWAY);
        let others = (1..=nodes).filter(|other| *other != self.number && cni.is_routed());
        for other in others {
            let Addresses { v4, v6 } = plan::node(other);
            let [pods_v4, pods_v6] = cidr::pods_of_node(other);
            lines.push(format!("route add {pods_v4} via {v4}"));
            lines.push(format!("route add {pods_v6} via {v6}"));
        }
        lines
    }

    /// Sets up its `eth0`, which has come back, by another name.
    pub(in crate::harness::netns) fn reconnect(
        &self,
        nodes: u8,
        device: &str,
        options: &Options,
    ) -> Result<()> {
        let lines = self.uplink(nodes, options.cni).into_iter();
        let lines = lines.map(|line| line.replace(" add ", " replace ").replace("eth0", device));
        let lines: Vec<_> = lines.collect();
        self.host.netns.run(|| {
            ip_batch(&lines)?;
            if options.tx_checksum { Ok(()) } else { disable_tx_checksum(device) }
        })
    }

    /// 1 for `node1`.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// The pods' networks on this node.
    pub fn pod_cidrs(&self) -> [IpNet; 2] {
        cidr::pods_of_node(self.number)
    }

    /// Every address that a backend may see of this node's processes: its own, and those of the
    /// devices that lead to pods, a bridge, an overlay or a second network.
    pub fn source_addresses(&self, family: Family) -> Vec<IpAddr> {
        let of_pods = [0, 1].map(|number| plan::pod(self.number, number));
        let own = std::iter::once(self.host.addresses).chain(of_pods);
        own.chain([plan::second(self.number)]).map(|addresses| addresses.get(family)).collect()
    }

    /// Holds the agent, the node's processes and its pods: what `--cgroup` is for an agent here.
    pub fn cgroup_tree(&self) -> &Cgroup {
        &self.tree
    }

    /// For `--bpf-dir`. The harness does not make it; it removes it with all that is in it.
    pub fn bpf_dir(&self) -> &Path {
        &self.bpf_dir
    }

    /// For `--state-dir`. It goes with the cluster.
    pub fn state_dir(&self) -> PathBuf {
        self.host.logs.join(format!("{}-state", self.host.name))
    }

    /// Starts a process as [`Host::spawn`] does, in the agent's cgroup.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn_agent(&self, label: &str, command: Command) -> Result<Process> {
        let place = Place { cgroup: &self.agent, ..self.host.place() };
        place.spawn(&format!("{}-{label}", self.host.name), command)
    }
}

impl Deref for Node {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

/// A pod: a [`Host`] whose uplink hangs on a node. Its own device is `eth0`.
#[derive(Debug)]
pub struct Pod {
    host: Host,
    node: u8,
    device: String,
}

impl Pod {
    pub(in crate::harness::netns) fn create(
        scope: &Scope,
        node: &Node,
        name: &str,
        options: &Options,
    ) -> Result<Self> {
        let number = node.next_pod.fetch_add(1, Ordering::Relaxed);
        ensure!((2..=250).contains(&number), "no address left for pod {name}");
        let link = Link { cni: options.cni, node: node.number, number, hairpin: options.hairpin };
        let netns = Netns::create(&scope.name(&format!("pod-{name}")))?;
        let device = link.host_device();
        netns.run(|| host_sysctls(0))?;
        let (on_node, in_pod) = (link.on_node(netns.name()), link.in_pod());
        node.host.netns.run(|| {
            ip_batch(&on_node)?;
            if options.tx_checksum { Ok(()) } else { disable_tx_checksum(&device) }
        })?;
        netns.run(|| {
            ip_batch(&in_pod)?;
            if options.tx_checksum { Ok(()) } else { disable_tx_checksum("eth0") }
        })?;
        let host = Host {
            name: name.to_owned(),
            netns,
            cgroup: node.tree.child(&format!("pods/{name}"))?,
            addresses: link.addresses(),
            logs: scope.logs.path().to_owned(),
            client: Mutex::default(),
        };
        Ok(Self { host, node: node.number, device })
    }

    /// The number of its node.
    pub fn node(&self) -> u8 {
        self.node
    }

    /// The name of its node, for `nodeName`.
    pub fn node_name(&self) -> String {
        format!("node{}", self.node)
    }

    /// The node's end of its veth.
    pub fn host_device(&self) -> &str {
        &self.device
    }
}

impl Deref for Pod {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

/// `eth0` of a host with one uplink.
pub(in crate::harness::netns) fn uplink(own: Addresses, gateway: Addresses) -> Vec<String> {
    vec![
        "link set lo up".to_owned(),
        format!("addr add {}/{} dev eth0", own.v4, SUBNET.0),
        format!("addr add {}/{} dev eth0 nodad", own.v6, SUBNET.1),
        "link set eth0 up".to_owned(),
        format!("route add default via {}", gateway.v4),
        format!("route add default via {}", gateway.v6),
    ]
}
