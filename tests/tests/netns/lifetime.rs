//! Connections over time: which changes an established one survives, and where new ones go.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::actors::client::Connection;
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::manifests::{Endpoint, Service};
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario};
use lb_tests::harness::wait::PATIENCE;

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(1);
/// How long an answer is awaited that must not come.
const SILENT: Duration = Duration::from_millis(100);
/// How soon a change must be seen by clients.
const SEEN: Duration = Duration::from_millis(50);

const SERVICE: u8 = 1;
const STREAM: u8 = 2;
const LATER: u8 = 3;
const BRIEF: u8 = 4;

fn set_up(mode: &str) -> Result<Scenario> {
    let builder = Cluster::builder().pod(1, "a").pod(1, "b").pod(2, "c");
    let mut scenario =
        Scenario::start(builder, &[&["--socket-lb", mode][..], &SMALL_MAPS].concat())?;
    scenario.serve(&["b", "c"])?;
    Ok(scenario)
}

fn to(number: u8, family: Family) -> SocketAddr {
    SocketAddr::new(cluster_ip(number).get(family), PORT)
}

/// Connections that stay, each with the server that it must keep.
struct Held<'a> {
    connections: Vec<(String, String, Connection)>,
    clients: Vec<&'a Host>,
}

impl<'a> Held<'a> {
    /// Opens a few from each client and family: enough that both backends have some.
    fn open(clients: &[&'a Host]) -> Result<Self> {
        let mut connections = Vec::new();
        for client in clients {
            for family in Family::ALL {
                for _ in 0..6 {
                    let connection = client.open(Probe::tcp(to(SERVICE, family)))?;
                    let server = connection.first().name().context("no name")?.to_owned();
                    let label = format!("{} {family:?}", client.name());
                    connections.push((label, server, connection));
                }
            }
        }
        let servers: BTreeSet<_> = connections.iter().map(|(_, server, _)| server).collect();
        ensure!(servers.len() == 2, "all connections went to {servers:?}");
        Ok(Self { connections, clients: clients.to_vec() })
    }

    /// All connections go on with their servers, and new ones find one of `servers`, all of
    /// them in turn, or are refused if there is none.
    fn check(&self, expectations: &mut Expectations, when: &str, servers: &[&str]) -> Result<()> {
        for (label, server, connection) in &self.connections {
            let answer = connection.exchange(when, ANSWER)?;
            let goes_on = answer.name() == Some(server);
            expectations.is_true(format!("{when}: {label} lost {server}: {answer:?}"), goes_on);
        }
        let patience = if servers.is_empty() { SILENT } else { ANSWER };
        for client in &self.clients {
            for family in Family::ALL {
                let mut found = BTreeSet::new();
                for _ in 0..12 {
                    let answer = client.ask(Probe::tcp(to(SERVICE, family)).timeout(patience))?;
                    found.insert(answer.name().unwrap_or("none").to_owned());
                }
                let wanted: BTreeSet<_> = if servers.is_empty() { &["none"] } else { servers }
                    .iter()
                    .map(ToString::to_string)
                    .collect();
                let what = format!("{when}: new from {} {family:?}: {found:?}", client.name());
                expectations.is_true(what, found == wanted);
            }
        }
        Ok(())
    }
}

/// What becomes of one endpoint.
type Change = fn(Endpoint) -> Endpoint;
/// When, what becomes of the endpoints then, and who serves new connections.
type Step<'a> = (&'a str, &'a [(&'a str, Change)], &'a [&'a str]);

fn changed(scenario: &Scenario, pods: &[(&str, Change)]) -> Vec<Endpoint> {
    let of_pod = |(pod, change): &(&str, Change)| {
        scenario.endpoints(&[pod]).into_iter().map(*change).collect::<Vec<_>>()
    };
    pods.iter().flat_map(of_pod).collect()
}

fn check_endpoints(
    scenario: &Scenario,
    expectations: &mut Expectations,
    held: &Held<'_>,
    service: &Service,
) -> Result<()> {
    const READY: Change = |endpoint| endpoint;
    const TERMINATING: Change = Endpoint::terminating;
    const NOT_READY: Change = Endpoint::not_ready;
    const STEPS: [Step<'_>; 8] = [
        ("at first", &[("b", READY), ("c", READY)], &["b", "c"]),
        ("b terminating", &[("b", TERMINATING), ("c", READY)], &["c"]),
        ("only b, terminating", &[("b", TERMINATING)], &["b"]),
        ("both terminating", &[("b", TERMINATING), ("c", TERMINATING)], &["b", "c"]),
        ("c not ready", &[("b", READY), ("c", NOT_READY)], &["b"]),
        ("none ready", &[("b", NOT_READY), ("c", NOT_READY)], &[]),
        ("b removed", &[("c", READY)], &["c"]),
        ("all removed", &[], &[]),
    ];
    for (when, endpoints, servers) in STEPS {
        let endpoints = changed(scenario, endpoints);
        scenario.publish(service, &endpoints).context(when)?;
        held.check(expectations, when, servers)?;
    }
    scenario.publish(service, &scenario.endpoints(&["b", "c"]))
}

fn check_agents(
    scenario: &mut Scenario,
    expectations: &mut Expectations,
    held: &Held<'_>,
) -> Result<()> {
    for node in [1, 2] {
        scenario.take_agent(node)?.kill9()?;
    }
    held.check(expectations, "agents killed", &["b", "c"])?;
    for node in [1, 2] {
        scenario.start_agent(node)?;
    }
    held.check(expectations, "agents started again", &["b", "c"])?;
    for node in [1, 2] {
        let start = Instant::now();
        let status = scenario.take_agent(node)?.terminate()?;
        expectations.is_true(format!("SIGTERM: {status}"), status.code() == Some(0));
        eprintln!("ended {:?} after SIGTERM", start.elapsed());
    }
    held.check(expectations, "agents terminated", &["b", "c"])?;
    for node in [1, 2] {
        scenario.start_agent(node)?;
    }
    Ok(())
}

/// Datagrams from one socket follow the endpoints.
fn check_stream(
    scenario: &Scenario,
    expectations: &mut Expectations,
    client: &Host,
    source_port: u16,
) -> Result<()> {
    let service = scenario.service("stream", STREAM);
    for family in Family::ALL {
        let what = |case: &str| format!("stream of {} {family:?}: {case}", client.name());
        scenario.publish(&service, &scenario.endpoints(&["b", "c"]))?;
        let probe = Probe::udp(to(STREAM, family)).source_port(source_port).connected();
        let stream = client.open(probe)?;
        let name = |case: &str| -> Result<String> {
            Ok(stream.exchange(case, ANSWER)?.name().unwrap_or("nobody").to_owned())
        };
        let first = name("first")?;
        let all_first = (0..10).all(|_| name("again").is_ok_and(|again| again == first));
        expectations.is_true(what("it does not keep its backend"), all_first && first != "nobody");
        let other = if first == "b" { "c" } else { "b" };
        let keep = changed(scenario, &[(&first, Endpoint::terminating), (other, |ready| ready)]);
        scenario.publish(&service, &keep)?;
        let drained = name("terminating")?;
        expectations.is_true(what(&format!("{first} terminating: {drained}")), drained == first);
        scenario.publish(&service, &scenario.endpoints(&[other]))?;
        let second = name("second")?;
        expectations.is_true(what(&format!("{first} removed: {second}")), second == other);
        scenario.publish(&service, &[])?;
        let third = stream.exchange("third", ANSWER)?;
        let is_refused = third.error() == Some("ECONNREFUSED");
        expectations.is_true(what(&format!("none left: {third:?}")), is_refused);
        scenario.publish(&service, &scenario.endpoints(&[&first]))?;
        let fourth = name("fourth")?;
        expectations.is_true(what(&format!("{first} came back: {fourth}")), fourth == first);
    }
    Ok(())
}

/// A Service takes over the datagrams that were sent to its address before it was there.
fn check_takeover(
    scenario: &Scenario,
    expectations: &mut Expectations,
    client: &Host,
    source_port: u16,
) -> Result<()> {
    let service = scenario.service("later", LATER);
    for family in Family::ALL {
        let probe = Probe::udp(to(LATER, family)).source_port(source_port).timeout(SILENT);
        let stream = client.open(probe)?;
        for _ in 0..3 {
            let answer = stream.exchange("too early", SILENT)?;
            let is_nobody = answer.name().is_none();
            expectations.is_true(format!("before it was there: {answer:?}"), is_nobody);
        }
        scenario.publish(&service, &[])?;
        let refused = stream.exchange("no endpoint", SILENT)?;
        expectations.is_true(format!("without endpoints: {refused:?}"), refused.name().is_none());
        scenario.publish(&service, &scenario.endpoints(&["b"]))?;
        // What was queued on the socket as an error is told first.
        let answers = [stream.exchange("late", ANSWER)?, stream.exchange("now", ANSWER)?];
        let what = format!("{} {family:?} not taken over: {answers:?}", client.name());
        expectations.is_true(what, answers[1].name() == Some("b"));
        scenario.delete(&service)?;
    }
    Ok(())
}

/// When the last connection that still got through was begun, after `change`.
fn last_reached(
    client: &Host,
    to: SocketAddr,
    change: impl FnOnce() -> Result<()>,
    is_reached: impl Fn(Option<&str>) -> bool,
) -> Result<Duration> {
    /// Only after so many others in a row is it believed to have been the last.
    const OTHERS: u32 = 12;
    let probe = Probe::tcp(to).timeout(Duration::from_millis(20));
    let start = Instant::now();
    change()?;
    let (mut last, mut others) = (Duration::ZERO, 0);
    while others < OTHERS {
        let begun = start.elapsed();
        ensure!(begun < PATIENCE, "it never ended");
        if is_reached(client.ask(probe.clone())?.name()) {
            (last, others) = (begun, 0);
        } else {
            others += 1;
        }
    }
    Ok(last)
}

fn median(mut figures: Vec<Duration>) -> Duration {
    figures.sort_unstable();
    figures[figures.len() / 2]
}

fn check_ends(
    scenario: &Scenario,
    expectations: &mut Expectations,
    mode: &str,
    client: &Host,
) -> Result<()> {
    const ROUNDS: usize = 7;
    let service = scenario.service("brief", BRIEF);
    let address = to(BRIEF, Family::V4);
    let (mut removals, mut deletions) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        scenario.publish(&service, &scenario.endpoints(&["b", "c"]))?;
        let remove = || scenario.manifests.endpoints(&service, &scenario.endpoints(&["c"]));
        removals.push(last_reached(client, address, remove, |name| name == Some("b"))?);
        let delete = || scenario.manifests.delete(&service);
        deletions.push(last_reached(client, address, delete, |name| name.is_some())?);
        scenario.wait_gone(&service)?;
    }
    let who = format!("--socket-lb {mode}, {}", client.name());
    for (what, figures) in [("removed endpoint", removals), ("deleted Service", deletions)] {
        let (worst, median) = (figures.iter().max().copied().unwrap_or_default(), median(figures));
        println!("{who}: last new connection to a {what}: median {median:?}, worst {worst:?}");
        expectations.is_true(format!("{who}: {what}: {median:?}"), median < SEEN);
    }
    Ok(())
}

fn check_lifetimes(mode: &str) -> Result<()> {
    let mut scenario = set_up(mode)?;
    let mut expectations = Expectations::default();
    let (a, node1) = (scenario.cluster.pod("a"), scenario.cluster.node(1));
    let clients: [&Host; 2] = [&a, &node1];
    let service = scenario.service("lasting", SERVICE);
    scenario.publish(&service, &scenario.endpoints(&["b", "c"]))?;
    let held = Held::open(&clients)?;
    check_endpoints(&scenario, &mut expectations, &held, &service)?;
    check_agents(&mut scenario, &mut expectations, &held)?;
    for (client, port) in clients.into_iter().zip([40_001, 40_011]) {
        check_stream(&scenario, &mut expectations, client, port)?;
        check_takeover(&scenario, &mut expectations, client, port + 1)?;
    }
    scenario.delete(&service)?;
    held.check(&mut expectations, "Service deleted", &[])?;
    let leaked = scenario.cluster.fabric().service_packets()?;
    expectations.is_true(format!("{leaked} packets to ClusterIPs left a node"), leaked == 0);
    expectations.finish()
}

#[test]
fn flows_live_through_changes() -> Result<()> {
    check_lifetimes("off")
}

#[test]
fn connections_live_through_changes() -> Result<()> {
    check_lifetimes("tcp")
}

/// How long a removed endpoint or a deleted Service still gets new connections.
fn check_last_connections(mode: &str) -> Result<()> {
    let scenario = set_up(mode)?;
    let mut expectations = Expectations::default();
    let (a, node1) = (scenario.cluster.pod("a"), scenario.cluster.node(1));
    for client in [&**a, &**node1] {
        check_ends(&scenario, &mut expectations, mode, client)?;
    }
    expectations.finish()
}

#[test]
fn new_flows_leave_a_removed_endpoint_within_50_ms() -> Result<()> {
    check_last_connections("off")
}

#[test]
fn new_connections_leave_a_removed_endpoint_within_50_ms() -> Result<()> {
    check_last_connections("tcp")
}
