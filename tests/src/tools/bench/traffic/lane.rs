//! The lanes of the benchmark: clusters that differ in their proxy alone.
//!
//! Two nodes, four pods and a client outside each. A proxy runs on both nodes, in a cluster of its
//! own, because rules and programs of one would slow down the others.

use std::env;
use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_agent::maps::pins::Pins;

use super::case::{CLIENT, FAR, NEAR, PLAIN, Proxy, Route};
use super::exchange::{Load, Sample};
use super::relay;
use super::shared::{NODE_PORT, PORT, Shared, TARGET, number};
use crate::harness::controlplane::kube_proxy::{self, KubeProxy};
use crate::harness::netns::actors::agent::{self, Agent, cleanup};
use crate::harness::netns::actors::exec::{sysctl, tool};
use crate::harness::netns::actors::host::Host;
use crate::harness::netns::actors::process::Process;
use crate::harness::netns::topology::cluster::Cluster;
use crate::harness::netns::topology::namespace::Netns;
use crate::harness::netns::topology::node::Node;
use crate::harness::netns::topology::plan::{Family, cidr, cluster_ip};
use crate::harness::netns::traffic::foreign::{Foreign, Hook};
use crate::harness::netns::traffic::offload::set_mtu;
use crate::harness::wait::{PATIENCE, eventually};

/// The length of a datagram of [`Load::Forward`] at least, and more than that of ARP and neighbour
/// discovery, without which nobody finds the next node.
const LONG: u32 = 90;
/// How long a turn may take.
pub(super) const TURN: Duration = Duration::from_secs(60);

/// How lanes are made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Where clients run.
    pub client_processor: usize,
    /// Where servers run.
    pub server_processor: usize,
    /// The MTU of every device, unless it is 1500.
    pub mtu: Option<u16>,
    /// `--max-flows` of lb, unless it is its default.
    pub max_flows: Option<u32>,
}

/// A cluster with one kind of proxy.
pub struct Lane {
    /// The proxy of its nodes.
    pub proxy: Proxy,
    agents: Vec<Agent>,
    kube_proxies: Vec<KubeProxy>,
    empty: Vec<Foreign>,
    servers: Vec<Process>,
    client_processor: String,
    max_flows: Option<u32>,
    // The last field: its namespaces outlive the processes in them.
    pub(in crate::tools::bench) cluster: Cluster,
}

impl Lane {
    /// Makes the cluster and its servers; no proxy yet.
    ///
    /// # Errors
    /// What cannot be made or started.
    pub fn new(proxy: Proxy, settings: &Settings) -> Result<Self> {
        // Direct server return answers from addresses that are not the node's.
        let mut builder = Cluster::builder().any_source();
        if proxy == Proxy::LbXdp {
            builder = builder.no_tx_checksum_offload();
        }
        let cluster = builder.pod(1, CLIENT).pod(1, NEAR).pod(2, FAR).pod(2, PLAIN).build()?;
        let mut lane = Self {
            proxy,
            agents: Vec::new(),
            kube_proxies: Vec::new(),
            empty: Vec::new(),
            servers: Vec::new(),
            client_processor: settings.client_processor.to_string(),
            max_flows: settings.max_flows,
            cluster,
        };
        lane.drop_witness()?;
        if let Some(mtu) = settings.mtu {
            lane.set_mtu(mtu)?;
        }
        if proxy == Proxy::Relayed {
            lane.relay()?;
        }
        let processor = settings.server_processor.to_string();
        for name in [NEAR, FAR, PLAIN] {
            let mut command = own_program()?;
            command.args(["traffic-server", "--processor", &processor]);
            command.args(["--port", &TARGET.to_string()]);
            let mut server = lane.cluster.pod(name).spawn("server", command)?;
            server.wait_for_output("ready", PATIENCE)?;
            lane.servers.push(server);
        }
        Ok(lane)
    }

    /// Removes the rules by which the network between nodes counts stray packets, a cost that would
    /// make every lane look more like the others.
    fn drop_witness(&self) -> Result<()> {
        let rules = ["delete", "table", "netdev", "fabric"];
        self.cluster.fabric().netns().run(|| tool("nft", &rules, "").map(drop))
    }

    /// Gives every device of the cluster this MTU.
    fn set_mtu(&self, mtu: u16) -> Result<()> {
        let fabric: Vec<_> = self.cluster.nodes().iter().map(|node| node.name()).collect();
        set_mtu(self.cluster.fabric().netns(), &[&fabric[..], &["outside"]].concat(), mtu)?;
        set_mtu(self.cluster.outside().netns(), &["eth0"], mtu)?;
        for node in self.cluster.nodes() {
            set_mtu(node.netns(), &["eth0"], mtu)?;
        }
        for name in [CLIENT, NEAR, FAR, PLAIN] {
            let pod = self.cluster.pod(name);
            set_mtu(pod.netns(), &["eth0"], mtu)?;
            set_mtu(self.cluster.node(pod.node()).netns(), &[pod.host_device()], mtu)?;
        }
        Ok(())
    }

    /// Has traffic between outside and the pods of node 2 pass through node 1, both ways.
    fn relay(&self) -> Result<()> {
        let [through, to] = [1, 2].map(|number| self.cluster.node(number));
        let outside = self.cluster.outside();
        // The node would advise the router of the shorter way.
        through.netns().run(|| {
            let scopes = ["all", "eth0"];
            scopes
                .iter()
                .try_for_each(|scope| sysctl(&format!("ipv4/conf/{scope}/send_redirects"), "0"))
        })?;
        for (index, family) in Family::ALL.into_iter().enumerate() {
            let [via, client] = [through.ip(family), outside.ip(family)];
            let pods = to.pod_cidrs()[index];
            self.cluster.fabric().netns().ip(&format!("route replace {pods} via {via}"))?;
            to.netns().ip(&format!("route add {client} via {via}"))?;
        }
        Ok(())
    }

    /// Attaches empty programs to the hooks on which another lane has those of lb.
    ///
    /// # Errors
    /// The kernel refuses one, or the other lane has none.
    pub fn imitate(&mut self, other: &Self) -> Result<()> {
        for node in self.cluster.nodes() {
            let links = Pins::new(other.cluster.node(node.number()).bpf_dir()).links().to_owned();
            let entries = fs::read_dir(&links).with_context(|| format!("{}", links.display()))?;
            for entry in entries {
                let name = entry?.file_name().to_string_lossy().into_owned();
                let Some((device, hook)) = hook_of_link(&name) else { continue };
                let program = Foreign::load_uncounted(hook)?;
                self.empty.push(program.attach_device(node.netns(), device)?);
            }
        }
        ensure!(!self.empty.is_empty(), "{} has no programs on devices", other.proxy.title());
        Ok(())
    }

    /// Starts the proxy on both nodes.
    ///
    /// # Errors
    /// It does not become ready.
    pub fn start_proxy(&mut self, shared: &Shared) -> Result<()> {
        if self.proxy.agent_modes().is_none() && self.proxy.kube_proxy_mode().is_none() {
            return Ok(());
        }
        let server = shared.plane.api_server_address();
        relay::start(self.cluster.fabric(), shared.cluster.fabric(), server)?;
        for node in self.cluster.nodes().to_vec() {
            self.start_on(&node, shared)
                .with_context(|| format!("{} on {}", self.proxy.title(), node.name()))?;
        }
        Ok(())
    }

    fn start_on(&mut self, node: &Arc<Node>, shared: &Shared) -> Result<()> {
        if let Some([socket_lb, external_mode, xdp]) = self.proxy.agent_modes() {
            let cluster_cidr = cidr::cluster();
            let options = agent::Options::kubeconfig(&shared.plane.agent_kubeconfig())
                .arguments(&["--cluster-cidr", &cluster_cidr, "--socket-lb", socket_lb])
                .arguments(&["--external-mode", external_mode, "--xdp", xdp]);
            let max_flows = self.max_flows.map(|flows| flows.to_string());
            let of_flows: Vec<&str> =
                max_flows.iter().flat_map(|flows| ["--max-flows", flows]).collect();
            self.agents.push(Agent::start(node, &options.arguments(&of_flows))?);
        }
        if let Some(mode) = self.proxy.kube_proxy_mode() {
            let options = kube_proxy::Options::new(mode);
            self.kube_proxies.push(KubeProxy::start(&shared.plane, node, options)?);
        }
        Ok(())
    }

    /// Waits until a load over a route is served.
    ///
    /// # Errors
    /// It takes longer than [`PATIENCE`].
    pub fn wait_served(&self, route: Route, load: Load, family: Family) -> Result<()> {
        let operations = if load == Load::Forward { 100 } else { 1 };
        eventually(|| self.turn(route, load, family, operations)).map(drop)
    }

    /// Does a number of operations.
    ///
    /// # Errors
    /// One fails.
    pub fn turn(
        &self,
        route: Route,
        load: Load,
        family: Family,
        operations: u64,
    ) -> Result<Sample> {
        if load != Load::Forward {
            return self.exchange(route, load, family, operations);
        }
        let end = self.end_of_forwarding();
        let _drop = Foreign::load_drop(Hook::Ingress, LONG)?.attach_device(end.0, end.1)?;
        let before = received(end)?;
        let sample = self.exchange(route, load, family, operations)?;
        let arrived = received(end)? - before;
        ensure!(arrived >= operations, "{arrived} of {operations} datagrams came to {}", end.1);
        Ok(sample)
    }

    /// Where datagrams of [`Load::Forward`] are dropped: behind node 1, but before it where nothing
    /// forwards them to the pod, which is what the others are compared with.
    fn end_of_forwarding(&self) -> (&Netns, &'static str) {
        match self.proxy {
            Proxy::Direct | Proxy::Control => (self.cluster.nodes()[0].netns(), "eth0"),
            _ => (self.cluster.fabric().netns(), "node1"),
        }
    }

    fn exchange(
        &self,
        route: Route,
        load: Load,
        family: Family,
        operations: u64,
    ) -> Result<Sample> {
        let to = self.address(route, load, family);
        let load = serde_json::to_value(load)?;
        let mut command = own_program()?;
        command.args(["traffic-client", "--processor", &self.client_processor]);
        command.arg("--load").arg(load.as_str().context("a load is a word")?);
        command.args(["--to", &to.to_string(), "--operations", &operations.to_string()]);
        let client = self.cluster.pod(CLIENT);
        let client: &Host = if route == Route::NodePort { self.cluster.outside() } else { &client };
        let said = client
            .output(command, TURN)
            .with_context(|| format!("{}: {}", self.proxy.title(), route.title()))?;
        serde_json::from_str(&said).with_context(|| format!("the client said {said:?}"))
    }

    fn address(&self, route: Route, load: Load, family: Family) -> SocketAddr {
        let offset = load.port_offset();
        let server = route.server();
        if load == Load::Forward && self.proxy != Proxy::Relayed {
            return self.cluster.node(1).at(family, NODE_PORT + offset);
        }
        if self.proxy.is_direct() || route == Route::PodIp {
            return self.cluster.pod(server).at(family, TARGET + offset);
        }
        match route {
            Route::NodePort => self.cluster.node(1).at(family, NODE_PORT + offset),
            _ => SocketAddr::new(cluster_ip(number(server)).get(family), PORT + offset),
        }
    }

    /// How many flows the programs of lb opened on node 1: none where it translates at connect().
    ///
    /// # Errors
    /// As [`Agent::counted`].
    pub fn flows_opened(&self) -> Result<Option<u64>> {
        self.counted("flow_created")
    }

    /// How many packets of node 1 ended for this reason; `None` without lb.
    ///
    /// # Errors
    /// As [`Agent::counted`].
    pub fn counted(&self, reason: &str) -> Result<Option<u64>> {
        self.agents.first().map(|agent| agent.counted(reason)).transpose()
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.kube_proxies.clear();
        let had_agents = !self.agents.is_empty();
        self.agents.clear();
        for node in self.cluster.nodes().iter().filter(|_| had_agents) {
            if let Err(error) = cleanup(node) {
                eprintln!("cleanup of {}: {error:#}", node.name());
            }
        }
    }
}

/// How many packets a device has received.
fn received((netns, device): (&Netns, &str)) -> Result<u64> {
    let table = netns.run(|| Ok(fs::read_to_string("/proc/thread-self/net/dev")?))?;
    let mut rows = table.lines().filter_map(|line| line.trim().split_once(':'));
    let (_, columns) = rows.find(|(name, _)| *name == device).context("no such device")?;
    // Bytes, packets.
    columns.split_whitespace().nth(1).context("no packets")?.parse().context("no number")
}

/// Device and hook of a link that an agent has pinned by the name `INDEX-DEVICE-DIRECTION`.
fn hook_of_link(name: &str) -> Option<(&str, Hook)> {
    let (_, name) = name.split_once('-')?;
    let (device, direction) = name.rsplit_once('-')?;
    match direction {
        "ingress" => Some((device, Hook::Ingress)),
        "egress" => Some((device, Hook::Egress)),
        _ => None,
    }
}

/// The running program, for its subcommands of client and server.
pub(super) fn own_program() -> Result<Command> {
    Ok(Command::new(env::current_exe().context("cannot find the running program")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_devices_are_told_from_those_of_cgroups() {
        let found = hook_of_link("7-cali010002-egress");
        assert!(matches!(found, Some(("cali010002", Hook::Egress))), "{found:?}");
        let found = hook_of_link("1-my-lo-ingress");
        assert!(matches!(found, Some(("my-lo", Hook::Ingress))), "{found:?}");
        assert!(hook_of_link("connect4").is_none());
    }
}
