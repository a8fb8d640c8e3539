//! The lanes of the benchmark: clusters that differ in their proxy alone.
//!
//! Two nodes, four pods and a client outside each. A proxy runs on both nodes, in a cluster of its
//! own, because rules and programs of one would slow down the others.

use std::env;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};

use super::exchange::{Load, Sample};
use super::relay;
use crate::harness::controlplane::kube_proxy::{self, KubeProxy, Mode};
use crate::harness::controlplane::objects::Pod;
use crate::harness::controlplane::{ControlPlane, Options as PlaneOptions};
use crate::harness::netns::actors::agent::{self, Agent, cleanup};
use crate::harness::netns::actors::host::Host;
use crate::harness::netns::actors::process::Process;
use crate::harness::netns::topology::cluster::Cluster;
use crate::harness::netns::topology::node::Node;
use crate::harness::netns::topology::plan::{Family, NODE_GATEWAY, cidr, cluster_ip};
use crate::harness::wait::{PATIENCE, eventually};

/// The first port of the servers.
const TARGET: u16 = 8080;
/// The first port of Services.
const PORT: u16 = 80;
/// The first node port.
const NODE_PORT: u16 = 30_080;
/// How long a turn may take.
const TURN: Duration = Duration::from_secs(60);

/// The client's pod, on node 1.
const CLIENT: &str = "client";
/// The pod behind a Service on the client's node.
const NEAR: &str = "near";
/// The pod behind a Service on the other node.
const FAR: &str = "far";
/// The pod on the other node that belongs to no Service.
const PLAIN: &str = "plain";

/// What forwards packets to Services in a lane.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proxy {
    /// Nothing: clients use pod IPs.
    Direct,
    /// Nothing, in another cluster: what differs from [`Proxy::Direct`] is noise.
    Control,
    /// lb, which translates when a process of a node or of a pod calls connect() or sendmsg().
    LbConnect,
    /// lb, packet by packet; node ports with source NAT.
    LbTc,
    /// lb, packet by packet; node ports with direct server return.
    LbDsr,
    /// kube-proxy in its mode nftables.
    Nftables,
    /// kube-proxy in its mode iptables.
    Iptables,
}

impl Proxy {
    /// All, in the order of the report.
    pub const ALL: [Self; 7] = [
        Self::Direct,
        Self::Control,
        Self::LbConnect,
        Self::LbTc,
        Self::LbDsr,
        Self::Nftables,
        Self::Iptables,
    ];

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Control => "direct again",
            Self::LbConnect => "lb connect-time",
            Self::LbTc => "lb tc",
            Self::LbDsr => "lb DSR",
            Self::Nftables => "kube-proxy nftables",
            Self::Iptables => "kube-proxy iptables",
        }
    }

    fn is_direct(self) -> bool {
        matches!(self, Self::Direct | Self::Control)
    }

    /// `--socket-lb` and `--external-mode` of lb.
    fn agent_modes(self) -> Option<[&'static str; 2]> {
        match self {
            Self::LbConnect => Some(["all", "snat"]),
            Self::LbTc => Some(["off", "snat"]),
            Self::LbDsr => Some(["off", "dsr"]),
            _ => None,
        }
    }

    fn kube_proxy_mode(self) -> Option<Mode> {
        match self {
            Self::Nftables => Some(Mode::Nftables),
            Self::Iptables => Some(Mode::Iptables),
            _ => None,
        }
    }
}

/// Who asks whom, and how the server is addressed where there is a proxy.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Route {
    /// A pod asks a ClusterIP whose backend is on its node.
    ClusterIpNear,
    /// A pod asks a ClusterIP whose backend is on the other node.
    ClusterIpFar,
    /// A pod asks a pod IP on the other node that is no Service's.
    PodIp,
    /// A client outside asks a node port whose backend is on the other node.
    NodePort,
}

impl Route {
    /// All, in the order of the report.
    pub const ALL: [Self; 4] =
        [Self::ClusterIpNear, Self::ClusterIpFar, Self::PodIp, Self::NodePort];

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Self::ClusterIpNear => "pod to ClusterIP, same node",
            Self::ClusterIpFar => "pod to ClusterIP, other node",
            Self::PodIp => "pod to pod IP without Service, other node",
            Self::NodePort => "outside to node port, other node",
        }
    }

    /// Lanes that differ on this route. At a node port lb never translates at connect(), and only
    /// there direct server return is any different.
    pub fn has(self, proxy: Proxy) -> bool {
        match proxy {
            Proxy::LbConnect => self != Self::NodePort,
            Proxy::LbDsr => self == Self::NodePort,
            _ => true,
        }
    }

    fn server(self) -> &'static str {
        match self {
            Self::ClusterIpNear => NEAR,
            Self::ClusterIpFar | Self::NodePort => FAR,
            Self::PodIp => PLAIN,
        }
    }
}

/// The control plane that all lanes share.
pub struct Shared {
    plane: ControlPlane,
    cluster: Cluster,
}

impl Shared {
    /// Starts it, in a cluster of its own.
    ///
    /// # Errors
    /// What cannot be made or started.
    pub fn start() -> Result<Self> {
        let cluster = Cluster::builder().nodes(1).build()?;
        let namespace = cluster.fabric().netns().path();
        let plane =
            ControlPlane::start(&namespace, NODE_GATEWAY.v4.into(), PlaneOptions::default())?;
        Ok(Self { plane, cluster })
    }

    /// Creates nodes and pods as this lane, and therefore every lane, has them, and the Services.
    ///
    /// # Errors
    /// The API server refuses one.
    pub fn fill(&mut self, lane: &Lane) -> Result<()> {
        for node in lane.cluster.nodes() {
            let addresses = node.addresses();
            self.plane.create_node(node.name(), &[addresses.v4.into(), addresses.v6.into()])?;
        }
        for name in [NEAR, FAR] {
            let pod = lane.cluster.pod(name);
            let addresses = pod.addresses();
            self.plane.create_pod(Pod {
                namespace: "default",
                name,
                labels: &[("app", name)],
                node: &pod.node_name(),
                addresses: &[addresses.v4.into(), addresses.v6.into()],
                ready: true,
            })?;
        }
        for name in [NEAR, FAR] {
            self.plane.apply(&service(name).to_string())?;
            self.plane
                .wait_for_slice("default", name, PATIENCE, |endpoints| endpoints.len() == 2)?;
        }
        Ok(())
    }
}

/// The numbers that the ClusterIPs of a Service end with.
fn number(service: &str) -> u8 {
    if service == NEAR { 40 } else { 41 }
}

/// [`FAR`] is there for clients outside as well.
fn service(name: &str) -> Value {
    let addresses = cluster_ip(number(name));
    let is_exposed = name == FAR;
    let ports = ["TCP", "UDP"].into_iter().flat_map(|protocol| {
        (0..2).map(move |offset: u16| {
            let mut port = json!({
                "name": format!("{}-{offset}", protocol.to_lowercase()),
                "protocol": protocol,
                "port": PORT + offset,
                "targetPort": TARGET + offset,
            });
            if is_exposed {
                port["nodePort"] = json!(NODE_PORT + offset);
            }
            port
        })
    });
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "default", "name": name},
        "spec": {
            "type": if is_exposed { "NodePort" } else { "ClusterIP" },
            "selector": {"app": name},
            "ipFamilyPolicy": "RequireDualStack",
            "clusterIP": addresses.v4,
            "clusterIPs": [addresses.v4.to_string(), addresses.v6.to_string()],
            "ports": ports.collect::<Vec<_>>(),
        },
    })
}

/// A cluster with one kind of proxy.
pub struct Lane {
    /// The proxy of its nodes.
    pub proxy: Proxy,
    agents: Vec<Agent>,
    kube_proxies: Vec<KubeProxy>,
    _servers: Vec<Process>,
    processor: String,
    // The last field: its namespaces outlive the processes in them.
    cluster: Cluster,
}

impl Lane {
    /// Makes the cluster and its servers on this processor; no proxy yet.
    ///
    /// # Errors
    /// What cannot be made or started.
    pub fn new(proxy: Proxy, processor: usize) -> Result<Self> {
        // Direct server return answers from addresses that are not the node's.
        let builder = Cluster::builder().any_source();
        let cluster = builder.pod(1, CLIENT).pod(1, NEAR).pod(2, FAR).pod(2, PLAIN).build()?;
        let mut lane = Self {
            proxy,
            agents: Vec::new(),
            kube_proxies: Vec::new(),
            _servers: Vec::new(),
            processor: processor.to_string(),
            cluster,
        };
        for name in [NEAR, FAR, PLAIN] {
            let mut command = own_program()?;
            command.args(["traffic-server", "--processor", &lane.processor]);
            command.args(["--port", &TARGET.to_string()]);
            let mut server = lane.cluster.pod(name).spawn("server", command)?;
            server.wait_for_output("ready", PATIENCE)?;
            lane._servers.push(server);
        }
        Ok(lane)
    }

    /// Starts the proxy on both nodes.
    ///
    /// # Errors
    /// It does not become ready.
    pub fn start_proxy(&mut self, shared: &Shared) -> Result<()> {
        if self.proxy.is_direct() {
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
        if let Some([socket_lb, external_mode]) = self.proxy.agent_modes() {
            let cluster_cidr = cidr::cluster();
            let options = agent::Options::kubeconfig(&shared.plane.agent_kubeconfig())
                .arguments(&["--cluster-cidr", &cluster_cidr, "--socket-lb", socket_lb])
                .arguments(&["--external-mode", external_mode]);
            self.agents.push(Agent::start(node, &options)?);
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
        eventually(|| self.turn(route, load, family, 1)).map(drop)
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
        let to = self.address(route, load, family);
        let load = serde_json::to_value(load)?;
        let mut command = own_program()?;
        command.args(["traffic-client", "--processor", &self.processor]);
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
        self.agents.first().map(|agent| agent.counted("flow_created")).transpose()
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

/// The running program, for its subcommands of client and server.
fn own_program() -> Result<Command> {
    Ok(Command::new(env::current_exe().context("cannot find the running program")?))
}
