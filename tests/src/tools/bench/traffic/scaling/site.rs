//! A node with one kind of proxy and a number of Services.
//!
//! The API server is one of prepared answers, which has ten thousand Services at once. One pod
//! serves every endpoint: all their addresses are local to it.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::super::case::{CLIENT, Proxy};
use super::super::exchange::Sample;
use super::super::lane::{Settings, TURN, own_program};
use super::super::shared::TARGET;
use super::objects::{ENDPOINTS, First, LEAST, Used};
use super::work::Work;
use crate::harness::controlplane::kube_proxy::{self, KubeProxy};
use crate::harness::netns::actors::agent::{self, Agent, cleanup};
use crate::harness::netns::actors::exec::tool;
use crate::harness::netns::actors::host::Serve;
use crate::harness::netns::actors::process::Process;
use crate::harness::netns::topology::cluster::Cluster;
use crate::harness::netns::topology::plan::NODE_GATEWAY;
use crate::harness::wait::{PATIENCE, within};
use crate::tools::bench::scale::api::{self, Server, modified};
use crate::tools::bench::scale::configuration;
use crate::tools::bench::scale::objects::Size;

/// The pod that serves.
const SERVER: &str = "server";
/// How long a proxy may take to program its Services: kube-proxy with iptables most of a minute for
/// ten thousand, when it has a processor of its own.
const SERVED: Duration = Duration::from_secs(300);
/// Where slices are in the API server.
pub(super) const SLICES: &str = "endpointslices";

/// A node, its proxy, a pod that asks and one that serves.
pub struct Site {
    /// The proxy.
    pub proxy: Proxy,
    /// How many Services there are, with how many endpoints.
    pub size: Size,
    pub(super) api: Server,
    /// How many changes [`super::churn`] has sent.
    pub(super) changes: AtomicU32,
    agent: Option<Agent>,
    kube_proxy: Option<KubeProxy>,
    client_processor: String,
    _servers: Vec<Process>,
    _kubeconfig: tempfile::NamedTempFile,
    // The last field: its namespaces outlive the processes in them.
    pub(super) cluster: Cluster,
}

impl Site {
    /// Makes it and starts its proxy, for which [`Site::wait_served`] waits.
    ///
    /// # Errors
    /// What cannot be made or started.
    pub fn start(proxy: Proxy, services: u32, settings: &Settings) -> Result<Self> {
        let cluster = Cluster::builder().nodes(1).pod(1, CLIENT).pod(1, SERVER).build()?;
        let rules = ["delete", "table", "netdev", "fabric"];
        cluster.fabric().netns().run(|| tool("nft", &rules, "").map(drop))?;
        let servers = serve(&cluster, settings)?;
        let size = Size { services, endpoints: if services > 10_000 { 1 } else { 2 } };
        let address = SocketAddr::from((NODE_GATEWAY.v4, 8080));
        let listener = cluster.fabric().netns().run(|| api::listen(address))?;
        let node = cluster.node(1);
        let mut objects = size.objects(node.name(), node.addresses().v4);
        for used in used(services) {
            let number = usize::try_from(used.number(services))?;
            let slices = objects.get_mut(SLICES).context("no slices")?;
            slices[number] = used.slice(size, node.name(), First::Ready);
            used.expose(&mut objects.get_mut("services").context("no Services")?[number]);
        }
        let kubeconfig = tempfile::NamedTempFile::new()?;
        std::fs::write(kubeconfig.path(), configuration(address).to_string())?;
        let mut site = Self {
            proxy,
            size,
            api: Server::start(listener, objects),
            changes: AtomicU32::new(0),
            agent: None,
            kube_proxy: None,
            client_processor: settings.client_processor.to_string(),
            _servers: servers,
            _kubeconfig: kubeconfig,
            cluster,
        };
        site.start_proxy()?;
        Ok(site)
    }

    fn start_proxy(&mut self) -> Result<()> {
        let node = self.cluster.node(1);
        let kubeconfig = self._kubeconfig.path();
        if let Some([socket_lb, external_mode, xdp]) = self.proxy.agent_modes() {
            let most = (self.size.services * 4).max(65_536).to_string();
            let options = agent::Options::kubeconfig(kubeconfig)
                .arguments(&["--socket-lb", socket_lb, "--max-services", &most])
                .arguments(&["--external-mode", external_mode, "--xdp", xdp]);
            self.agent = Some(Agent::spawn(&node, &options)?);
        }
        if let Some(mode) = self.proxy.kube_proxy_mode() {
            let options = kube_proxy::Options::new(mode)
                .arguments(&["--kube-api-content-type=application/json"]);
            self.kube_proxy = Some(KubeProxy::spawn_with(kubeconfig, &node, options)?);
        }
        Ok(())
    }

    /// Waits until the proxy has programmed everything and its Services answer.
    ///
    /// # Errors
    /// They do not.
    pub fn wait_served(&mut self) -> Result<()> {
        if let Some(agent) = &mut self.agent {
            agent.wait_ready()?;
        }
        if let Some(proxy) = &mut self.kube_proxy {
            proxy.wait_synced_within(SERVED)?;
        }
        for used in used(self.size.services).filter(|used| *used != Used::Held) {
            within(PATIENCE, || self.said(Work::Endpoints, used, 1, 1))
                .with_context(|| format!("{}, {used:?}", self.title()))?;
        }
        Ok(())
    }

    /// For people.
    pub fn title(&self) -> String {
        format!("{} with {} Services", self.proxy.title(), self.size.services)
    }

    /// Does a number of operations, in a number of flows.
    ///
    /// # Errors
    /// One fails.
    pub fn turn(&self, work: Work, used: Used, count: u64, flows: u32) -> Result<Sample> {
        let said = self.said(work, used, count, flows)?;
        serde_json::from_value(said).context("the client said something else")
    }

    /// What a client has to say after its work.
    ///
    /// # Errors
    /// An operation fails.
    pub fn said(&self, work: Work, used: Used, count: u64, flows: u32) -> Result<Value> {
        let said = self.cluster.pod(CLIENT).output(self.client(work, used, count, flows)?, TURN);
        let said = said.with_context(|| self.title())?;
        serde_json::from_str(&said).with_context(|| format!("the client said {said:?}"))
    }

    /// Starts a client that works on its own.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, work: Work, used: Used, count: u64) -> Result<Process> {
        self.cluster.pod(CLIENT).spawn("client", self.client(work, used, count, 1)?)
    }

    fn client(&self, work: Work, used: Used, count: u64, flows: u32) -> Result<Command> {
        let to = match self.proxy {
            Proxy::Direct => (used.endpoint(1), used.target()).into(),
            _ => used.address(self.size.services),
        };
        let mut command = own_program()?;
        command.args(["scaling-client", "--processor", &self.client_processor]);
        command.args(["--work", work.name(), "--to", &to.to_string()]);
        command.args(["--count", &count.to_string(), "--flows", &flows.to_string()]);
        Ok(command)
    }

    /// Changes the first endpoint of a Service.
    ///
    /// # Errors
    /// Nobody watches.
    pub fn change(&self, used: Used, first: First) -> Result<()> {
        let slice = used.slice(self.size, self.cluster.node(1).name(), first);
        self.api.send(SLICES, &modified(&slice)).with_context(|| self.title())
    }

    /// Fails if the proxy has ended.
    ///
    /// # Errors
    /// It has; with the end of its log.
    pub fn check(&mut self) -> Result<()> {
        let title = self.title();
        let agent = self.agent.as_mut().map(Agent::process);
        let kube_proxy = self.kube_proxy.as_mut().map(KubeProxy::process);
        for process in agent.into_iter().chain(kube_proxy) {
            if let Some(status) = process.ended()? {
                bail!("{title} ended with {status}\n{}", process.tail());
            }
        }
        Ok(())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.kube_proxy = None;
        if self.agent.take().is_some()
            && let Err(error) = cleanup(&self.cluster.node(1))
        {
            eprintln!("cleanup of {}: {error:#}", self.title());
        }
    }
}

/// The Services with a purpose among so many.
fn used(services: u32) -> impl Iterator<Item = Used> {
    let others = Used::OTHERS.into_iter().filter(move |_| services >= LEAST);
    [Used::One].into_iter().chain(others)
}

/// Has the pod answer at every endpoint.
fn serve(cluster: &Cluster, settings: &Settings) -> Result<Vec<Process>> {
    let pod = cluster.pod(SERVER);
    pod.netns().ip(&format!("route add local {ENDPOINTS} dev lo"))?;
    let (via, device) = (pod.addresses().v4, pod.host_device());
    let line = format!("route add {ENDPOINTS} via {via} dev {device} onlink");
    cluster.node(1).netns().ip(&line)?;
    let mut command = own_program()?;
    command.args(["scaling-server", "--processor", &settings.server_processor.to_string()]);
    command.args(["--port", &TARGET.to_string()]);
    command.args(["--datagrams", &Used::One.endpoint(1).to_string()]);
    let mut server = pod.spawn("server", command)?;
    server.wait_for_output("ready", PATIENCE)?;
    Ok(vec![server, pod.serve(&Serve::default().crowd(Used::Held.target()))?])
}
