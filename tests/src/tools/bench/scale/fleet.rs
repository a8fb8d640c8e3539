//! Many agents on one real API server: the agent's own watch, many times in one process and without
//! a datapath, beside a few processes of the real kube-proxy.
//!
//! What each asks and receives is counted at rest, while the endpoints of a Service are replaced,
//! and after an outage of the API server. [`NODES`] times as much is what a large cluster does.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use jiff::Timestamp;
use lb_agent::watch::api;
use lb_control::model::event::ObjectEvent;
use tokio::sync::{mpsc, oneshot, watch};

use super::audit::{AGENT, KUBE_PROXY, Request, most_in_a_second};
use super::create;
use super::objects::Size;
use super::real::Plane;
use super::report::Figure;
use super::wire::Wire;
use crate::harness::controlplane::kube_proxy::{self, KubeProxy, Mode};
use crate::harness::netns::topology::node::Node;

/// The nodes of the cluster that the figures are multiplied to.
const NODES: f64 = 5_000.0;
/// What each agent watches: Services, slices, its Node, the ranges of ClusterIPs.
const KINDS: u64 = 4;
/// The pause between the starts of two agents.
const STARTS: Duration = Duration::from_millis(20);
/// How long all agents together may take to list everything, or to hear of a change.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long the API server is down.
const OUTAGE: Duration = Duration::from_secs(10);
/// How long after the outage requests are counted.
const RECOVERY: Duration = Duration::from_secs(60);

/// How many clients there are, of what, and for how long each part is observed.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Services and endpoints.
    pub size: Size,
    /// Agents.
    pub agents: u32,
    /// Processes of kube-proxy.
    pub proxies: u8,
    /// The time at rest.
    pub rest: Duration,
}

/// Measures all of it.
///
/// # Errors
/// A program is missing, or a client does not do what it should.
pub fn measure(plan: Plan) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let mut plane = Plane::start(1 + plan.proxies, plan.size, &mut figures)?;
    let node = plane.live.cluster.node(1);
    let agents = Agents::start(&node, &plane.live.plane.agent_kubeconfig(), plan.agents)?;
    agents.wait("list everything", |seen| seen.lists >= KINDS * u64::from(plan.agents))?;
    let mut proxies = Vec::new();
    for number in 0..plan.proxies {
        let node = plane.live.cluster.node(number + 2);
        let options = kube_proxy::Options::new(Mode::Nftables);
        proxies.push(KubeProxy::spawn(&plane.live.plane, &node, options)?);
    }
    for proxy in &mut proxies {
        proxy.wait_synced()?;
    }
    let nodes = (2..=plan.proxies + 1).map(|number| plane.live.cluster.node(number)).collect();
    let fleets = [
        Fleet { name: "agent", user: AGENT, count: plan.agents, nodes: vec![node] },
        Fleet { name: "kube-proxy", user: KUBE_PROXY, count: plan.proxies.into(), nodes },
    ];
    let fleets: Vec<_> = fleets.into_iter().filter(|fleet| fleet.count > 0).collect();
    at_rest(&plane, &fleets, plan.rest, &mut figures)?;
    in_rollout(&plane, &fleets, &agents, plan, &mut figures)?;
    after_outage(&mut plane, &fleets, &mut figures)?;
    agents.stop()?;
    Ok(figures)
}

fn at_rest(
    plane: &Plane,
    fleets: &[Fleet],
    time: Duration,
    figures: &mut Vec<Figure>,
) -> Result<()> {
    let before = Used::of_all(plane, fleets)?;
    thread::sleep(time);
    let minutes = time.as_secs_f64() / 60.0;
    for (fleet, used) in fleets.iter().zip(Used::since(plane, fleets, &before)?) {
        let (requests, kilobytes, opened) = fleet.each(&used);
        let name = |what: &str| format!("{}: {what} in a minute at rest", fleet.name);
        figures.push(Figure::count(0, name("requests"), requests / minutes, ""));
        figures.push(Figure::count(0, name("connections opened"), opened / minutes, ""));
        figures.push(Figure::count(0, name("received"), kilobytes / minutes, "kB"));
        let all = requests / time.as_secs_f64() * NODES;
        let name = format!("{NODES} x {}: requests in a second at rest", fleet.name);
        figures.push(Figure::count(0, name, all, ""));
    }
    Ok(())
}

fn in_rollout(
    plane: &Plane,
    fleets: &[Fleet],
    agents: &Agents,
    plan: Plan,
    figures: &mut Vec<Figure>,
) -> Result<()> {
    let before = Used::of_all(plane, fleets)?;
    let heard = agents.seen().changes;
    let fabric = plane.live.cluster.fabric().netns();
    create::roll_out(fabric, &plane.live.plane.admin_kubeconfig(), plan.size, 0)?;
    let wanted = heard + u64::from(plan.agents * plan.size.endpoints);
    agents.wait("hear of the rollout", |seen| seen.changes >= wanted)?;
    for (fleet, used) in fleets.iter().zip(Used::since(plane, fleets, &before)?) {
        let (requests, kilobytes, _) = fleet.each(&used);
        let replaced = plan.size.endpoints;
        let name =
            |what: &str| format!("{}: {what} in a rollout of {replaced} endpoints", fleet.name);
        let requests = Figure::count(0, name("requests"), requests, "");
        // A watch may end meanwhile, as it does every few minutes.
        let is_ours = fleet.user == AGENT;
        figures.push(if is_ours { requests.limits(0.0, 0.1) } else { requests });
        figures.push(Figure::count(0, name("received"), kilobytes, "kB"));
        let name = format!("{NODES} x {}: received in that rollout", fleet.name);
        figures.push(Figure::count(0, name, kilobytes * NODES / 1024.0, "MB"));
    }
    Ok(())
}

fn after_outage(plane: &mut Plane, fleets: &[Fleet], figures: &mut Vec<Figure>) -> Result<()> {
    let before = Used::of_all(plane, fleets)?;
    plane.live.plane.stop_api_server()?;
    thread::sleep(OUTAGE);
    plane.live.plane.start_api_server()?;
    let ready = Timestamp::now();
    thread::sleep(RECOVERY);
    for (fleet, used) in fleets.iter().zip(Used::since(plane, fleets, &before)?) {
        let (requests, kilobytes, opened) = fleet.each(&used);
        let count = f64::from(fleet.count);
        let lists: Vec<_> = used.requests.iter().filter(|one| one.is_list()).cloned().collect();
        let most = most_in_a_second(&used.requests) as f64;
        let most_lists = most_in_a_second(&lists) as f64;
        let name = |what: &str| format!("{}: {what} after an outage", fleet.name);
        figures.push(Figure::count(0, name("requests"), requests, ""));
        figures.push(Figure::count(0, name("lists among them"), lists.len() as f64 / count, ""));
        figures.push(Figure::count(0, name("connections tried, outage included"), opened, ""));
        figures.push(Figure::count(0, name("received"), kilobytes, "kB"));
        let last = used.requests.iter().map(|one| one.at).max().unwrap_or(ready);
        let seconds = last.duration_since(ready).as_secs_f64();
        let name = format!("{}: last request after the server was ready", fleet.name);
        figures.push(Figure::time(0, name, seconds, "s"));
        let scaled = |what: &str, most: f64| {
            let name = format!("{NODES} x {}: most {what} in one second after it", fleet.name);
            Figure::count(0, name, most / count * NODES, "")
        };
        figures.extend([scaled("requests", most), scaled("lists", most_lists)]);
    }
    Ok(())
}

/// Clients of one kind.
struct Fleet {
    name: &'static str,
    user: &'static str,
    count: u32,
    /// Where they run; nothing else runs there.
    nodes: Vec<Arc<Node>>,
}

impl Fleet {
    /// Requests, kilobytes and connections for each client.
    fn each(&self, used: &Used) -> (f64, f64, f64) {
        let count = f64::from(self.count);
        let kilobytes = used.wire.received as f64 / 1024.0;
        (used.requests.len() as f64 / count, kilobytes / count, used.wire.opened as f64 / count)
    }
}

/// What a fleet has asked and received.
struct Used {
    requests: Vec<Request>,
    wire: Wire,
}

impl Used {
    fn of(plane: &Plane, fleet: &Fleet) -> Result<Self> {
        let mut wire = Wire::default();
        for node in &fleet.nodes {
            let one = Wire::of(node.netns())?;
            wire.received += one.received;
            wire.opened += one.opened;
        }
        Ok(Self { requests: plane.audit.requests(fleet.user)?, wire })
    }

    fn of_all(plane: &Plane, fleets: &[Fleet]) -> Result<Vec<Self>> {
        fleets.iter().map(|fleet| Self::of(plane, fleet)).collect()
    }

    /// What came after `before`.
    fn since(plane: &Plane, fleets: &[Fleet], before: &[Self]) -> Result<Vec<Self>> {
        let now = Self::of_all(plane, fleets)?.into_iter().zip(before);
        let since = now.map(|(mut now, before)| {
            now.requests.drain(..before.requests.len());
            Self { requests: now.requests, wire: now.wire.since(before.wire) }
        });
        Ok(since.collect())
    }
}

/// The watches of many agents, until they are stopped.
struct Agents {
    counts: Arc<Counts>,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<Result<()>>,
}

#[derive(Default)]
struct Counts {
    lists: AtomicU64,
    changes: AtomicU64,
}

/// What all agents have received so far.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// Complete lists.
    lists: u64,
    /// Changes of an object.
    changes: u64,
}

impl Agents {
    fn start(node: &Arc<Node>, kubeconfig: &Path, count: u32) -> Result<Self> {
        let counts = Arc::new(Counts::default());
        let (stop, stopped) = oneshot::channel();
        let (node, kubeconfig) = (Arc::clone(node), kubeconfig.to_owned());
        let counting = Arc::clone(&counts);
        let thread = thread::spawn(move || {
            node.netns().run(|| {
                let runtime = create::runtime()?;
                let options = api::Options { kubeconfig: Some(kubeconfig), ..Default::default() };
                let name = node.name().to_owned();
                runtime.spawn(async move {
                    for _ in 0..count {
                        tokio::spawn(follow(options.clone(), name.clone(), Arc::clone(&counting)));
                        tokio::time::sleep(STARTS).await;
                    }
                });
                // It ends by a word, or with the measurement.
                runtime.block_on(stopped).ok();
                runtime.shutdown_background();
                Ok(())
            })
        });
        Ok(Self { counts, stop, thread })
    }

    fn seen(&self) -> Seen {
        let [lists, changes] = [&self.counts.lists, &self.counts.changes];
        Seen { lists: lists.load(Ordering::Relaxed), changes: changes.load(Ordering::Relaxed) }
    }

    fn wait(&self, what: &str, is_met: impl Fn(Seen) -> bool) -> Result<()> {
        let start = Instant::now();
        while !is_met(self.seen()) {
            ensure!(!self.thread.is_finished(), "the agents have ended");
            if start.elapsed() > PATIENCE {
                bail!("the agents did not {what} in {PATIENCE:?}: {:?}", self.seen());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn stop(self) -> Result<()> {
        self.stop.send(()).ok();
        self.thread.join().ok().context("the thread of the agents panicked")?
    }
}

/// One agent's watch. What it receives is counted and dropped.
async fn follow(options: api::Options, node: String, counts: Arc<Counts>) {
    let connection = match api::connect(&options).await {
        Ok(connection) => connection,
        Err(error) => return eprintln!("an agent cannot connect: {error}"),
    };
    let (sender, mut events) = mpsc::channel(1024);
    // The sender is kept: a scope without one counts as that of an agent that ends.
    let (_needed, scope) = watch::channel(Some(api::Nodes::Own));
    let counting = async {
        while let Some(event) = events.recv().await {
            let is_list =
                matches!(event, ObjectEvent::Replaced(..) | ObjectEvent::ReplacedExcept(..));
            let count = if is_list { &counts.lists } else { &counts.changes };
            count.fetch_add(1, Ordering::Relaxed);
        }
    };
    tokio::join!(api::watch(connection, api::NodeScope::new(&node, scope), sender), counting);
}
