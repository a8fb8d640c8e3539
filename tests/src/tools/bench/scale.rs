//! `lb-bench scale`: an agent with ten thousand Services: how soon it serves, how soon a change is
//! in the maps, and what it uses of the node and of the API server.
//!
//! The API server is made of prepared answers ([`api`]), in a namespace of its own beside the node:
//! no etcd and no TLS, so that the figures are the agent's. Without HTTP/2 each watch has a
//! connection of its own, and the question whether the server serves has another.
//! More Services ([`beyond`]) and constant change ([`churn`]) are measured so as well. The real API
//! server has [`real`], which compares with kube-proxy, and [`fleet`], many agents at once.
//!
//! Counts and memory are judged. Times are shown with their targets: they are those of the machine.

pub mod api;
pub mod audit;
pub mod beyond;
pub mod churn;
pub mod create;
pub mod fleet;
pub mod growth;
pub mod maps;
pub mod objects;
pub mod process;
pub mod real;
pub mod report;
pub mod wire;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lb_agent::maps::pins;
use lb_agent::options::sizes::Sizes;
use lb_agent::watch::admit::admit;
use lb_control::controller::Controller;
use lb_control::dataplane::fake::Fake;
use lb_control::model::event::{Object, ObjectEvent, ObjectKind};
use lb_control::options::ExternalMode;
use serde_json::{Value, json};

use crate::harness::echo::Probe;
use crate::harness::netns::actors::agent::{Agent, Options};
use crate::harness::netns::actors::host::Serve;
use crate::harness::netns::actors::process::Process;
use crate::harness::netns::topology::cluster::Cluster;
use crate::harness::netns::topology::node::Node;
use crate::harness::netns::topology::plan::NODE_GATEWAY;
use api::{Server, Usage, modified};
use maps::Watcher;
use objects::{PORT, Size, TARGET, cluster_ip};
use report::{Figure, percentile};

const SLICES: &str = "endpointslices";
const MEGABYTE: f64 = (1 << 20) as f64;
/// How long the first state may take, also that of kube-proxy.
const START: Duration = Duration::from_secs(300);
/// Changes a second of a cluster that is busy.
const BUSY: u64 = 1_000;
/// Changes a second of a cluster as most are.
const USUAL: u64 = 20;

const ANSWERED: &str = "start of the process to the answer of the last Service";
/// When the memory is judged.
const STARTED: &str = "after the start";

/// How large the cluster is, and how long it is watched.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Services and endpoints.
    pub size: Size,
    /// Changes that are measured one by one.
    pub changes: u32,
    /// How long each of the rates, and the time without changes, lasts.
    pub time: Duration,
}

/// What a start is judged by.
#[derive(Clone, Copy, Debug)]
struct Targets {
    /// Until the last Service answers, in seconds: aim and must.
    start: (f64, f64),
    /// Resident memory, in megabytes: aim and must.
    memory: Option<(f64, f64)>,
}

impl Targets {
    /// Those of 10,000 Services with 10 endpoints each.
    const USUAL: Self = Self { start: (1.0, 2.0), memory: Some((40.0, 60.0)) };
}

/// Measures all of it.
///
/// # Errors
/// The node cannot be built, or the agent does not do what it should.
pub fn measure(plan: Plan) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let mut lab = Lab::new(plan)?;
    lab.start(&[], Targets::USUAL, &mut figures)?;
    lab.single_changes(&mut figures)?;
    lab.rate(BUSY, &mut figures)?;
    lab.burst(&mut figures)?;
    lab.rate(USUAL, &mut figures)?;
    lab.rest(&mut figures)?;
    figures.push(writes(plan.size)?);
    figures.sort_by_key(|figure| (figure.row == 0, figure.row));
    Ok(figures)
}

/// Starts an API server of prepared answers for the first node of a cluster, and says how an agent
/// finds it.
///
/// # Errors
/// The port is taken, or the file cannot be written.
pub fn serve(cluster: &Cluster, size: Size) -> Result<(Server, tempfile::NamedTempFile)> {
    let node = cluster.node(1);
    let address = SocketAddr::from((NODE_GATEWAY.v4, 8080));
    let listener = cluster.fabric().netns().run(|| api::listen(address))?;
    let server = Server::start(listener, size.objects(node.name(), node.addresses().v4));
    let kubeconfig = tempfile::NamedTempFile::new()?;
    std::fs::write(kubeconfig.path(), configuration(address).to_string())?;
    Ok((server, kubeconfig))
}

/// A node with an agent, the server of its last Service, and the API server.
struct Lab {
    plan: Plan,
    agent: Option<Agent>,
    server: Server,
    /// Whether the first endpoint of each Service is ready.
    ready: Vec<bool>,
    cluster: Cluster,
    kubeconfig: tempfile::NamedTempFile,
    _last_service: Process,
}

impl Lab {
    fn new(plan: Plan) -> Result<Self> {
        let size = plan.size;
        let cluster = Cluster::builder().nodes(1).build()?;
        let node = cluster.node(1);
        let (server, kubeconfig) = serve(&cluster, size)?;
        let last_service = serve_last(&node, size)?;
        let ready = vec![true; size.services as usize];
        Ok(Self {
            plan,
            agent: None,
            server,
            ready,
            cluster,
            kubeconfig,
            _last_service: last_service,
        })
    }

    fn pid(&mut self) -> Result<u32> {
        Ok(self.agent.as_mut().context("no agent")?.process().pid())
    }

    /// Starts the agent, with more arguments, and waits until the last Service answers.
    fn start(
        &mut self,
        arguments: &[&str],
        targets: Targets,
        figures: &mut Vec<Figure>,
    ) -> Result<()> {
        let node = self.cluster.node(1);
        // The client process is there before the time runs.
        node.ask(last_service(self.plan.size))?;
        let start = Instant::now();
        let options = Options::kubeconfig(self.kubeconfig.path()).arguments(arguments);
        let agent = self.agent.insert(Agent::spawn(&node, &options)?);
        wait_last_service(&node, self.plan.size, agent.process())?;
        let took = start.elapsed().as_secs_f64();
        agent.wait_ready()?;
        let (aim, must) = targets.start;
        figures.push(Figure::time(12, ANSWERED, took, "s").limits(aim, must));
        let Usage { connections, requests, bytes } = self.server.usage();
        let megabytes = bytes as f64 / MEGABYTE;
        figures.push(
            Figure::count(0, "API: connections at the start", connections as f64, "")
                .limits(5.0, 8.0),
        );
        figures.push(
            Figure::count(0, "API: requests at the start", requests as f64, "").limits(6.0, 12.0),
        );
        figures.push(Figure::count(0, "API: answers at the start", megabytes, "MB"));
        // What is left of the start is over by then: Events, the first sweep of the maps.
        thread::sleep(Duration::from_secs(3));
        self.memory(STARTED, targets.memory, figures)
    }

    fn memory(
        &mut self,
        when: &str,
        limits: Option<(f64, f64)>,
        figures: &mut Vec<Figure>,
    ) -> Result<()> {
        let memory = process::memory(self.pid()?)?;
        let figure = |what: &str, bytes: u64| {
            Figure::count(17, format!("{what} {when}"), bytes as f64 / MEGABYTE, "MB")
        };
        let resident = figure("memory", memory.resident);
        figures.push(match limits {
            Some((aim, must)) => resident.limits(aim, must),
            None => resident,
        });
        figures.push(figure("of it, not shared with maps or files", memory.anonymous));
        figures.push(figure("most memory until", memory.peak));
        Ok(())
    }

    /// Sends the change of one Service. Returns how many backends it has then.
    fn change(&mut self, service: u32) -> Result<u32> {
        let (line, backends) = self.next_change(service);
        self.server.send(SLICES, &line)?;
        Ok(backends)
    }

    /// The event of one endpoint that becomes ready, or not, and how many are ready then.
    fn next_change(&mut self, service: u32) -> (Vec<u8>, u32) {
        let ready = &mut self.ready[service as usize];
        *ready = !*ready;
        let size = self.plan.size;
        let line = modified(&size.slice(service, *ready));
        (line, size.endpoints - u32::from(!*ready))
    }

    fn watcher(&self) -> Result<Watcher> {
        Watcher::open(self.cluster.node(1).bpf_dir(), self.plan.size.services)
    }

    /// One change at a time, when the agent has nothing else to do.
    fn single_changes(&mut self, figures: &mut Vec<Figure>) -> Result<()> {
        let mut watcher = self.watcher()?;
        let before = self.server.usage();
        let mut times = Vec::new();
        for number in 0..self.plan.changes {
            let service = number % self.plan.size.services;
            let (line, backends) = self.next_change(service);
            let sent = Instant::now();
            self.server.send(SLICES, &line)?;
            times.push((watcher.wait(service, backends)? - sent).as_secs_f64() * 1e3);
            thread::sleep(Duration::from_millis(10));
        }
        let used = self.server.usage().since(before);
        let changes = f64::from(self.plan.changes);
        figures.push(
            Figure::time(13, "one change, event to map: p50", percentile(&mut times, 50), "ms")
                .limits(0.3, 2.0),
        );
        figures.push(
            Figure::time(13, "one change, event to map: p99", percentile(&mut times, 99), "ms")
                .limits(2.0, 5.0),
        );
        let requests = used.requests as f64 / changes;
        figures
            .push(Figure::count(0, "API: requests for a change", requests, "").limits(0.0, 0.01));
        let bytes = used.bytes as f64 / changes / 1024.0;
        figures.push(Figure::count(0, "API: answers for a change", bytes, "kB"));
        Ok(())
    }

    /// So many changes a second.
    fn rate(&mut self, rate: u64, figures: &mut Vec<Figure>) -> Result<()> {
        let (mut watcher, pid) = (self.watcher()?, self.pid()?);
        let count = rate * self.plan.time.as_secs();
        let services = u64::from(self.plan.size.services);
        // Prepared: to make them takes as long as the agent has.
        let changes: VecDeque<_> = (0..count)
            .map(|number| (number % services) as u32)
            .map(|service| (service, self.next_change(service)))
            .collect();
        let (server, (sent, seen)) = (self.server.clone(), mpsc::channel());
        let (cpu, start) = (process::cpu(pid)?, Instant::now());
        let sender = thread::spawn(move || -> Result<()> {
            for (number, (service, (line, backends))) in (0u64..).zip(changes) {
                let due = start + Duration::from_micros(number * 1_000_000 / rate);
                thread::sleep(due.saturating_duration_since(Instant::now()));
                let at = Instant::now();
                server.send(SLICES, &line)?;
                sent.send((service, backends, at)).context("nobody looks at the maps")?;
            }
            Ok(())
        });
        let mut times = Vec::new();
        for (service, backends, at) in seen {
            times.push((watcher.wait(service, backends)? - at).as_secs_f64() * 1e3);
        }
        sender.join().ok().context("the sender panicked")??;
        let used = (process::cpu(pid)? - cpu).as_secs_f64() / start.elapsed().as_secs_f64() * 100.0;
        let p99 = percentile(&mut times, 99);
        let at = format!("at {rate} changes a second");
        if rate == BUSY {
            let name = format!("event to map {at}: p99");
            figures.push(Figure::time(14, name, p99, "ms").limits(10.0, 50.0));
            figures.push(Figure::time(0, format!("CPU {at}"), used, "% of a core"));
        } else {
            figures
                .push(Figure::time(18, format!("CPU {at}"), used, "% of a core").limits(0.5, 2.0));
        }
        Ok(())
    }

    /// A change of every Service at once.
    fn burst(&mut self, figures: &mut Vec<Figure>) -> Result<()> {
        let mut watcher = self.watcher()?;
        let services = self.plan.size.services;
        let changes: Vec<_> = (0..services).map(|service| self.next_change(service)).collect();
        let (server, wanted) = (self.server.clone(), changes.iter().map(|(_, backends)| *backends));
        let wanted: Vec<_> = wanted.collect();
        let start = Instant::now();
        let sender = thread::spawn(move || {
            changes.iter().try_for_each(|(line, _)| server.send(SLICES, line))
        });
        let mut last = start;
        for (service, backends) in (0..).zip(wanted) {
            last = watcher.wait(service, backends)?;
        }
        sender.join().ok().context("the sender panicked")??;
        let rate = f64::from(services) / (last - start).as_secs_f64();
        let name = format!("{services} changes at once");
        figures.push(Figure::rate(14, name, rate, "changes/s").limits(50_000.0, 10_000.0));
        self.memory("after all changes", None, figures)
    }

    /// No change at all.
    fn rest(&mut self, figures: &mut Vec<Figure>) -> Result<()> {
        // A last change, so that nothing of the changes before is left to do.
        let backends = self.change(0)?;
        self.watcher()?.wait(0, backends)?;
        thread::sleep(Duration::from_secs(2));
        let (pid, before) = (self.pid()?, self.server.usage());
        let (cpu, start) = (process::cpu(pid)?, Instant::now());
        thread::sleep(self.plan.time);
        let used = (process::cpu(pid)? - cpu).as_secs_f64() / start.elapsed().as_secs_f64() * 100.0;
        figures.push(Figure::time(18, "CPU without changes", used, "% of a core").limits(0.1, 0.5));
        let usage = self.server.usage().since(before);
        let seconds = self.plan.time.as_secs();
        for (what, count) in [("requests", usage.requests), ("connections", usage.connections)] {
            let name = format!("API: {what} in {seconds} s without changes");
            figures.push(Figure::count(0, name, count as f64, "").limits(0.0, 1.0));
        }
        Ok(())
    }
}

/// Makes the endpoints of the last Service processes of a node.
fn serve_last(node: &Node, size: Size) -> Result<Process> {
    let last = (0..size.endpoints).map(|number| size.endpoint(size.services - 1, number));
    let lines: Vec<_> = last.map(|ip| format!("addr add {ip}/32 dev lo")).collect();
    node.netns().ip_lines(&lines)?;
    node.serve(&Serve::default().tcp(TARGET))
}

/// The question whether the last Service answers.
fn last_service(size: Size) -> Probe {
    let last = SocketAddr::from((cluster_ip(size.services - 1), PORT));
    Probe::tcp(last).timeout(Duration::from_millis(20)).reset()
}

/// Waits until a proxy of a node lets the last Service answer.
fn wait_last_service(node: &Node, size: Size, proxy: &mut Process) -> Result<()> {
    let start = Instant::now();
    while node.ask(last_service(size))?.reached().is_none() {
        if let Some(status) = proxy.ended()? {
            bail!("the proxy ended with {status}\n{}", proxy.tail());
        }
        if start.elapsed() > START {
            bail!("the last Service does not answer after {START:?}\n{}", proxy.tail());
        }
    }
    Ok(())
}

/// The kubeconfig of a server that asks for no credentials.
pub fn configuration(server: SocketAddr) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "bench",
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
        "clusters": [{"name": "bench", "cluster": {"server": format!("http://{server}")}}],
        "users": [{"name": "bench", "user": {}}],
    })
}

/// How many writes one change of an endpoint takes, counted in maps that are no maps.
fn writes(size: Size) -> Result<Figure> {
    const CHANGES: u32 = 100;
    let (services, backends) = (size.services * 4, size.services * size.endpoints * 2);
    let sizes = Sizes { services, backends, slots: backends * 4, flows: 0 };
    let mut fake = Fake::new(pins::capacity(&sizes));
    let mut controller = Controller::new("node1", ExternalMode::Snat, []);
    let mut objects = size.objects("node1", NODE_GATEWAY.v4);
    for (kind, name) in [(ObjectKind::Service, "services"), (ObjectKind::EndpointSlice, SLICES)] {
        let values = objects.remove(name).unwrap_or_default().into_iter();
        let all = values.map(|value| object(kind, value)).collect::<Result<_>>()?;
        controller.apply(ObjectEvent::Replaced(kind, all));
    }
    controller.reconcile(0, &mut fake)?;
    fake.take_writes();
    for service in 0..CHANGES {
        let changed = object(ObjectKind::EndpointSlice, size.slice(service, false))?;
        controller.apply(ObjectEvent::Applied(changed));
        controller.reconcile(0, &mut fake)?;
    }
    let writes = fake.take_writes();
    let count = writes.stores + writes.published + writes.upserts + writes.deletes;
    let each = count as f64 / f64::from(CHANGES);
    Ok(Figure::count(15, "writes of maps for a change of an endpoint", each, "").limits(4.0, 4.0))
}

fn object(kind: ObjectKind, value: Value) -> Result<Object> {
    let object: Object = match kind {
        ObjectKind::Service => {
            serde_json::from_value::<k8s_openapi::api::core::v1::Service>(value)?.into()
        }
        _ => {
            serde_json::from_value::<k8s_openapi::api::discovery::v1::EndpointSlice>(value)?.into()
        }
    };
    admit(object).context("an object for another proxy")
}
