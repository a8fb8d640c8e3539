//! Makes a cluster, and takes all of it away again.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use tempfile::TempDir;

use super::cgroup::Cgroup;
use super::cni::Cni;
use super::fabric::{Fabric, host_sysctls};
use super::namespace::{self, Netns};
use super::node::{Node, Pod, uplink};
use super::plan::{OUTSIDE, OUTSIDE_GATEWAY};
use super::stale::{self, BPF_FS};
use crate::harness::netns::actors::exec::{disable_tx_checksum, ip_batch};
use crate::harness::netns::actors::host::Host;
use crate::harness::netns::traffic::netfilter::Rules;

/// What a cluster is to look like.
#[derive(Clone, Debug)]
pub struct Builder {
    nodes: u8,
    pods: Vec<(u8, String)>,
    options: Options,
}

#[derive(Clone, Copy, Debug)]
pub(in crate::harness::netns) struct Options {
    pub(in crate::harness::netns) cni: Cni,
    pub(in crate::harness::netns) rp_filter: u8,
    pub(in crate::harness::netns) rules: Rules,
    pub(in crate::harness::netns) hairpin: bool,
    pub(in crate::harness::netns) tx_checksum: bool,
    pub(in crate::harness::netns) bridge_netfilter: bool,
    pub(in crate::harness::netns) checks_sources: bool,
}

impl Default for Builder {
    fn default() -> Self {
        let options = Options {
            cni: Cni::PointToPoint,
            rp_filter: 2,
            rules: Rules::default(),
            hairpin: false,
            tx_checksum: true,
            bridge_netfilter: true,
            checks_sources: true,
        };
        Self { nodes: 2, pods: Vec::new(), options }
    }
}

impl Builder {
    /// How many nodes there are, `node1` and up; 2 if this is not called.
    #[must_use]
    pub fn nodes(mut self, count: u8) -> Self {
        self.nodes = count;
        self
    }

    /// A pod on a node; nodes count from 1. The name is a DNS label.
    #[must_use]
    pub fn pod(mut self, node: u8, name: &str) -> Self {
        self.pods.push((node, name.to_owned()));
        self
    }

    /// How pods are linked; point to point if this is not called.
    #[must_use]
    pub fn cni(mut self, cni: Cni) -> Self {
        self.options.cni = cni;
        self
    }

    /// The IPv4 reverse path filter of nodes, on every device: 0 off, 1 strict, 2 loose; 2, as
    /// systemd sets it, if this is not called.
    #[must_use]
    pub fn rp_filter(mut self, mode: u8) -> Self {
        self.options.rp_filter = mode;
        self
    }

    /// Nodes rewrite the source of what pods send out of the pods' network, as container
    /// networks do.
    #[must_use]
    pub fn masquerade(mut self) -> Self {
        self.options.rules.masquerade = true;
        self
    }

    /// Nodes drop what their connection tracking calls invalid, forwarded or for themselves.
    #[must_use]
    pub fn drop_invalid(mut self) -> Self {
        self.options.rules.drop_invalid = true;
        self
    }

    /// Nodes forward only packets from or to pods, and replies, as Docker hosts do.
    #[must_use]
    pub fn forward_policy(mut self) -> Self {
        self.options.rules.forward_policy = true;
        self
    }

    /// Ports of the bridge send frames back to where they came from (`hairpin on`).
    #[must_use]
    pub fn hairpin(mut self) -> Self {
        self.options.hairpin = true;
        self
    }

    /// Nodes and pods compute checksums themselves, and the fabric polls its ports, as XDP on
    /// veths needs it.
    #[must_use]
    pub fn no_tx_checksum_offload(mut self) -> Self {
        self.options.tx_checksum = false;
        self
    }

    /// Bridged packets skip netfilter (`bridge-nf-call-iptables` is 0; Kubernetes asks for 1,
    /// which it is if this is not called).
    #[must_use]
    pub fn no_bridge_netfilter(mut self) -> Self {
        self.options.bridge_netfilter = false;
        self
    }

    /// The network lets nodes send from addresses that are not theirs, as direct server return
    /// needs it.
    #[must_use]
    pub fn any_source(mut self) -> Self {
        self.options.checks_sources = false;
        self
    }

    /// Makes it.
    ///
    /// # Errors
    /// Without privileges, or where a tool (`ip`, `nft`) is missing or refuses. What was made
    /// until then is removed.
    pub fn build(self) -> Result<Cluster> {
        ensure!((1..=100).contains(&self.nodes), "{} nodes are not in 1..=100", self.nodes);
        ensure!(self.options.rp_filter <= 2, "no rp_filter {}", self.options.rp_filter);
        stale::sweep()?;
        mount_bpf_fs()?;
        let scope = Scope::new()?;
        let options = self.options;
        let mut nodes = Vec::new();
        for number in 1..=self.nodes {
            nodes.push(Node::create(&scope, number, &options)?);
        }
        let outside = Host {
            name: "outside".to_owned(),
            netns: Netns::create(&scope.name("outside"))?,
            cgroup: scope.cgroup.child("outside")?,
            addresses: OUTSIDE,
            logs: scope.logs.path().to_owned(),
            client: Mutex::default(),
        };
        outside.netns.run(|| host_sysctls(0))?;
        let namespaces: Vec<_> = nodes.iter().map(|node| &node.netns).collect();
        let fabric = Netns::create(&scope.name("fabric"))?;
        let fabric = Fabric::create(fabric, &namespaces, &outside.netns, &options)?;
        for node in &nodes {
            node.connect(self.nodes, &options)?;
        }
        let uplink = uplink(OUTSIDE, OUTSIDE_GATEWAY);
        outside.netns.run(|| {
            ip_batch(&uplink)?;
            if options.tx_checksum { Ok(()) } else { disable_tx_checksum("eth0") }
        })?;
        if !options.tx_checksum {
            fabric.poll_ports()?;
        }
        let nodes = nodes.into_iter().map(Arc::new).collect();
        let cluster = Cluster { nodes, pods: Mutex::default(), outside, fabric, options, scope };
        for (node, name) in &self.pods {
            cluster.add_pod(*node, name)?;
        }
        Ok(cluster)
    }
}

/// Nodes, pods, an outside client, and the network between them; dropping removes it all.
#[derive(Debug)]
pub struct Cluster {
    pods: Mutex<BTreeMap<String, Arc<Pod>>>,
    nodes: Vec<Arc<Node>>,
    outside: Host,
    fabric: Fabric,
    options: Options,
    // The last field: it removes what the others may still use.
    scope: Scope,
}

impl Cluster {
    /// Describes one of two nodes without pods.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// A node; nodes count from 1.
    ///
    /// # Panics
    /// There is no such node.
    pub fn node(&self, number: u8) -> Arc<Node> {
        self.nodes[usize::from(number) - 1].clone()
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Arc<Node>] {
        &self.nodes
    }

    /// A pod by its name.
    ///
    /// # Panics
    /// There is no such pod.
    pub fn pod(&self, name: &str) -> Arc<Pod> {
        let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        pods.get(name).unwrap_or_else(|| panic!("no pod {name}")).clone()
    }

    /// The client that is no part of the cluster.
    pub fn outside(&self) -> &Host {
        &self.outside
    }

    /// How pods are linked.
    pub fn cni(&self) -> Cni {
        self.options.cni
    }

    /// The network between the nodes.
    pub fn fabric(&self) -> &Fabric {
        &self.fabric
    }

    /// What the names of all its namespaces, cgroups and BPF directories start with.
    pub fn prefix(&self) -> &str {
        &self.scope.prefix
    }

    /// Pulls the uplink of a node, an `eth0`, and plugs in a new one; nodes count from 1.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn replug(&self, number: u8) -> Result<()> {
        let node = self.node(number);
        node.netns().run(|| ip_batch(&["link del eth0".to_owned()]))?;
        self.fabric.replug(number, node.netns())?;
        if !self.options.tx_checksum {
            self.fabric.poll_ports()?;
        }
        node.reconnect(self.nodes.len() as u8, "eth0", &self.options)?;
        self.forget_neighbours(number)
    }

    /// Takes the uplink of a node down and up again by another name; nodes count from 1.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn rename_uplink(&self, number: u8, old: &str, new: &str) -> Result<()> {
        let node = self.node(number);
        let lines = [format!("link set {old} down"), format!("link set {old} name {new}")];
        node.netns().run(|| ip_batch(&lines))?;
        node.reconnect(self.nodes.len() as u8, new, &self.options)
    }

    /// Has all other nodes ask for link-layer addresses anew.
    fn forget_neighbours(&self, number: u8) -> Result<()> {
        let mut others = self.nodes.iter().filter(|node| node.number() != number);
        let flush = ["neigh flush dev eth0".to_owned()];
        others.try_for_each(|node| node.netns().run(|| ip_batch(&flush)))
    }

    /// Starts a pod, as a kubelet and its network plugin would; nodes count from 1.
    ///
    /// # Errors
    /// There is a pod of this name, no such node, or no room on it.
    pub fn add_pod(&self, node: u8, name: &str) -> Result<Arc<Pod>> {
        let index = usize::from(node).checked_sub(1);
        let node = index.and_then(|index| self.nodes.get(index)).context("no such node")?;
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(!pods.contains_key(name), "there is a pod {name}");
        let pod = Arc::new(Pod::create(&self.scope, node, name, &self.options)?);
        pods.insert(name.to_owned(), pod.clone());
        Ok(pod)
    }

    /// Kills a pod's processes and removes its link and its namespace.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn remove_pod(&self, name: &str) -> Result<()> {
        let removed = self.pods.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        let Some(pod) = removed else { bail!("no pod {name}") };
        pod.stop();
        pod.cgroup.remove();
        let node = &self.nodes[usize::from(pod.node()) - 1];
        let line = format!("link del {}", pod.host_device());
        node.netns.run(|| ip_batch(&[line]))?;
        namespace::remove(pod.netns.name());
        Ok(())
    }
}

/// What belongs to one cluster by name; removes all of it, whoever still has it open.
#[derive(Debug)]
pub(in crate::harness::netns) struct Scope {
    prefix: String,
    pub(in crate::harness::netns) cgroup: Cgroup,
    pub(in crate::harness::netns) logs: TempDir,
}

impl Scope {
    fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("lb-{}-{number}", std::process::id());
        let logs = tempfile::Builder::new().prefix(&format!("{prefix}-logs-")).tempdir()?;
        Ok(Self { cgroup: Cgroup::create(&prefix)?, prefix, logs })
    }

    pub(in crate::harness::netns) fn name(&self, of: &str) -> String {
        format!("{}-{of}", self.prefix)
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        self.cgroup.remove();
        let start = format!("{}-", self.prefix);
        let ours = |directory: &str| -> Vec<PathBuf> {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            let name_of = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
            entries.filter(|entry| name_of(entry).starts_with(&start)).map(|e| e.path()).collect()
        };
        for path in ours(BPF_FS) {
            if let Err(error) = fs::remove_dir_all(&path) {
                eprintln!("cannot remove {}: {error}", path.display());
            }
        }
        for path in ours(namespace::DIRECTORY) {
            if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
                namespace::remove(name);
            }
        }
    }
}

fn mount_bpf_fs() -> Result<()> {
    let mounted = statfs(BPF_FS).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC);
    if mounted {
        return Ok(());
    }
    mount(Some("bpf"), BPF_FS, Some("bpf"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("cannot mount bpffs on {BPF_FS}"))
}
