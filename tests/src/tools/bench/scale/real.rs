//! An agent and kube-proxy, each on a node of its own, against a real API server with its etcd: the
//! same Services, one proxy after the other.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::audit::{AGENT, Audit, KUBE_PROXY};
use super::objects::Size;
use super::report::Figure;
use super::wire::{Wire, established};
use super::{ANSWERED, MEGABYTE, create, last_service, process, serve_last, wait_last_service};
use crate::harness::controlplane::Options;
use crate::harness::controlplane::kube_proxy::{self, KubeProxy, Mode};
use crate::harness::controlplane::live::LiveCluster;
use crate::harness::netns::actors::agent;
use crate::harness::netns::actors::process::Process;
use crate::harness::netns::topology::cluster::Cluster;
use crate::harness::netns::topology::node::Node;

/// After a start, until requests and memory are read.
const AT_REST: Duration = Duration::from_secs(5);

/// A real control plane that counts what it is asked, with all objects in it.
pub(super) struct Plane {
    pub(super) live: LiveCluster,
    pub(super) audit: Audit,
    _directory: tempfile::TempDir,
}

impl Plane {
    /// Starts it with so many nodes, and creates the objects.
    pub(super) fn start(nodes: u8, size: Size, figures: &mut Vec<Figure>) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let audit = Audit::new(directory.path())?;
        let options = Options { api_server_arguments: audit.arguments(), ..Options::default() };
        let live = LiveCluster::start(Cluster::builder().nodes(nodes), options)?;
        let fabric = live.cluster.fabric().netns();
        let took = create::all(fabric, &live.plane.admin_kubeconfig(), size)?;
        let name = format!("time to create {} Services and slices", size.services);
        figures.push(Figure::time(0, name, took.as_secs_f64(), "s"));
        Ok(Self { live, audit, _directory: directory })
    }
}

/// Starts both.
///
/// # Errors
/// A program is missing, or does not do what it should.
pub fn measure(size: Size) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let mut plane = Plane::start(2, size, &mut figures)?;
    let [ours, theirs] = [1, 2].map(|number| plane.live.cluster.node(number));
    let _servers = [serve_last(&ours, size)?, serve_last(&theirs, size)?];

    let options = agent::Options::kubeconfig(&plane.live.plane.agent_kubeconfig());
    let watched = Watched::new(&ours, size)?;
    let agent = plane.live.spawn_agent_with(1, &options)?;
    let used = watched.until_served(agent.process())?;
    let used = used.requests(&plane, AGENT)?;
    figures.extend(used.figures("lb", Some(Targets { time: (1.0, 2.0), memory: (40.0, 60.0) })));
    drop(plane.live.take_agent(1)?);

    let watched = Watched::new(&theirs, size)?;
    let options = kube_proxy::Options::new(Mode::Nftables);
    let mut proxy = KubeProxy::spawn(&plane.live.plane, &theirs, options)?;
    let used = watched.until_served(proxy.process())?;
    let used = used.requests(&plane, KUBE_PROXY)?;
    figures.extend(used.figures("kube-proxy (nftables)", None));
    Ok(figures)
}

/// What lb is judged by: aim and must.
struct Targets {
    time: (f64, f64),
    memory: (f64, f64),
}

/// A node whose proxy is about to start.
struct Watched {
    node: Arc<Node>,
    size: Size,
    before: Wire,
    start: Instant,
}

/// What a proxy took to serve.
struct Used {
    node: Arc<Node>,
    seconds: f64,
    memory: process::Memory,
    received: u64,
    requests: usize,
    connections: usize,
}

impl Watched {
    fn new(node: &Arc<Node>, size: Size) -> Result<Self> {
        // The client process is there before the time runs.
        node.ask(last_service(size))?;
        let before = Wire::of(node.netns())?;
        Ok(Self { node: Arc::clone(node), size, before, start: Instant::now() })
    }

    fn until_served(self, proxy: &mut Process) -> Result<Used> {
        wait_last_service(&self.node, self.size, proxy)?;
        let seconds = self.start.elapsed().as_secs_f64();
        // What is left of the start is over by then.
        thread::sleep(AT_REST);
        let memory = process::memory(proxy.pid())?;
        let received = Wire::of(self.node.netns())?.since(self.before).received;
        Ok(Used { node: self.node, seconds, memory, received, requests: 0, connections: 0 })
    }
}

impl Used {
    /// With what the API server says.
    fn requests(mut self, plane: &Plane, user: &str) -> Result<Self> {
        let SocketAddr::V4(server) = plane.live.plane.api_server_address() else {
            bail!("the API server has no IPv4 address");
        };
        self.requests = plane.audit.requests(user).context("count the requests")?.len();
        self.connections = established(self.node.netns(), server)?;
        Ok(self)
    }

    fn figures(&self, who: &str, targets: Option<Targets>) -> Vec<Figure> {
        let megabytes = |bytes: u64| bytes as f64 / MEGABYTE;
        let mut time = Figure::time(12, ANSWERED, self.seconds, "s");
        let mut memory =
            Figure::count(17, "memory after the start", megabytes(self.memory.resident), "MB");
        let mut requests = Figure::count(0, "API: requests at the start", self.requests as f64, "");
        let mut connections =
            Figure::count(0, "API: connections held", self.connections as f64, "");
        if let Some(targets) = targets {
            time = time.limits(targets.time.0, targets.time.1);
            memory = memory.limits(targets.memory.0, targets.memory.1);
            requests = requests.limits(6.0, 12.0);
            connections = connections.limits(1.0, 2.0);
        }
        let anonymous = megabytes(self.memory.anonymous);
        let figures = [
            time,
            memory,
            Figure::count(17, "of it, not shared with maps or files", anonymous, "MB"),
            Figure::count(17, "most memory until then", megabytes(self.memory.peak), "MB"),
            requests,
            connections,
            Figure::count(0, "received at the start", megabytes(self.received), "MB"),
        ];
        figures.map(|figure| figure.of(&format!("real API server: {who}"))).into()
    }
}
