//! `lb-agent explain` against real sockets: what it says of a packet is what becomes of it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::{Answer, Probe, Transport};
use lb_tests::harness::netns::actors::agent::{self, explain};
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::cluster::{Builder, Cluster};
use lb_tests::harness::netns::topology::plan::{Family, cidr, cluster_ip};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::frontends::{Frontend, SILENT, kinds};
use lb_tests::harness::netns::words::manifests::Endpoint;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario, TARGET};
use serde_json::Value;

/// The Services of the tests by number: what their addresses and node ports end with.
const BOTH: u8 = 1;
const FAR: u8 = 2;
const HOST: u8 = 3;
const OWN: u8 = 4;
const NONE: u8 = 5;
const FAR_LOCAL: u8 = 6;
const STICKY: u8 = 7;
const RANGED: u8 = 8;
const FAR_DSR: u8 = 9;
const NOBODYS: u8 = 99;

/// How often a client asks at most until every backend has answered that may.
const ATTEMPTS: u32 = 60;

/// Node 1 is asked, and explains.
fn start(mode: &str) -> Result<Scenario> {
    let builder: Builder = Cluster::builder().pod(1, "a").pod(1, "b").pod(2, "c").pod(2, "d");
    let cluster = cidr::cluster();
    let arguments = ["--socket-lb", mode, "--cluster-cidr", &cluster];
    let mut scenario = Scenario::start(builder, &[&arguments[..], &SMALL_MAPS].concat())?;
    scenario.serve(&["a", "b", "c"])?;
    scenario.serve_node(1)?;
    let node1 = scenario.cluster.node(1);
    let host = Family::ALL.map(|family| Endpoint::at(node1.ip(family)).node("node1"));
    let (both, far) = (scenario.endpoints(&["b", "c"]), scenario.endpoints(&["c"]));
    scenario.publish(&scenario.exposed("both", BOTH), &both)?;
    scenario.publish(&scenario.exposed("far", FAR), &far)?;
    scenario.publish(&scenario.exposed("host", HOST), &host)?;
    scenario.publish(&scenario.exposed("own", OWN), &scenario.endpoints(&["a"]))?;
    scenario.publish(&scenario.exposed("none", NONE), &[])?;
    scenario.publish(&scenario.exposed("far-local", FAR_LOCAL).external_local(), &far)?;
    let sticky = scenario.exposed("sticky", STICKY).affinity(Duration::from_secs(60));
    scenario.publish(&sticky, &both)?;
    let ranged = scenario.exposed("ranged", RANGED).source_range("10.0.0.0/8");
    scenario.publish(&ranged.source_range("fd00::/8"), &both)?;
    scenario.publish(&scenario.exposed("far-dsr", FAR_DSR).external_mode("dsr"), &far)?;
    scenario.cluster.fabric().route_external_to(1)?;
    scenario.cluster.fabric().route_services_to(1)?;
    Ok(scenario)
}

/// A client, as node 1 sees it.
struct Client<'a> {
    scenario: &'a Scenario,
    name: &'a str,
}

impl Client<'_> {
    fn at(&self) -> &'static str {
        match self.name {
            "a" => "pod",
            "node1" => "node",
            _ => "eth0",
        }
    }

    fn with<T>(&self, act: impl FnOnce(&Host) -> Result<T>) -> Result<T> {
        let cluster = &self.scenario.cluster;
        match self.name {
            "outside" => act(cluster.outside()),
            "node1" => act(&cluster.node(1)),
            "node2" => act(&cluster.node(2)),
            pod => act(&cluster.pod(pod)),
        }
    }

    fn source(&self, to: SocketAddr) -> Result<IpAddr> {
        if to.ip().is_loopback() {
            return Ok(to.ip());
        }
        self.with(|host| Ok(host.ip(Family::of(to.ip()))))
    }
}

/// What an explanation says will be seen.
struct Told {
    result: String,
    /// The servers that may answer, and the client's address that they see, if explain names it.
    servers: Vec<(SocketAddr, Option<IpAddr>)>,
    /// The hook that decides, and the reason that it counts.
    counter: Option<(String, String)>,
}

fn told(explanation: &Value) -> Result<Told> {
    let result = explanation["outcome"]["result"].as_str().context("no result")?.to_owned();
    let empty = Vec::new();
    let path = explanation["path"].as_array().unwrap_or(&empty);
    let connect = &explanation["connect"];
    let is_connect = matches!(connect["verdict"].as_str(), Some("translate" | "answer"));
    let deciding = if is_connect {
        Some(connect)
    } else {
        path.iter().rfind(|step| {
            !matches!(step["reason"].as_str(), None | Some("no_flow" | "not_service"))
        })
    };
    let mut servers = Vec::new();
    for backend in deciding.and_then(|step| step["backends"].as_array()).unwrap_or(&empty) {
        if backend["possible"] == true {
            let address = backend["address"].as_str().context("no address")?.parse()?;
            let seen = backend["client_address"].as_str().map(str::parse).transpose()?;
            servers.push((address, seen));
        }
    }
    if servers.is_empty() {
        let destination = explanation["outcome"]["destination"].as_str().context("nowhere")?;
        servers.push((destination.parse()?, None));
    }
    let text = |step: &Value, field: &str| step[field].as_str().map(ToOwned::to_owned);
    let counter = deciding.and_then(|step| text(step, "hook").zip(text(step, "reason")));
    Ok(Told { result, servers, counter })
}

/// Which server has this address.
fn server_at(scenario: &Scenario, address: SocketAddr) -> Result<&'static str> {
    ensure!(address.port() == TARGET, "{address} is no server");
    let family = Family::of(address.ip());
    let pods = ["a", "b", "c"].into_iter();
    let found = pods.clone().find(|pod| scenario.cluster.pod(pod).ip(family) == address.ip());
    let host = (scenario.cluster.node(1).ip(family) == address.ip()).then_some("node1");
    found.or(host).with_context(|| format!("nobody has {address}"))
}

fn count_of(scenario: &Scenario, (hook, reason): &(String, String)) -> Result<u64> {
    let counters = agent::get(&scenario.cluster.node(1), "counters")?;
    let rows = counters.as_array().into_iter().flatten();
    let mut rows =
        rows.filter(|row| row["hook"] == hook.as_str() && row["reason"] == reason.as_str());
    Ok(rows.next().and_then(|row| row["count"].as_u64()).unwrap_or(0))
}

/// Asks, compares the outcome with `explain` on node 1, and returns the result that it gave.
fn compare(client: &Client<'_>, transport: Transport, to: SocketAddr) -> Result<String> {
    let scenario = client.scenario;
    let source = client.source(to)?;
    let protocol = if transport == Transport::Tcp { "tcp" } else { "udp" };
    let explanation = explain(
        &scenario.cluster.node(1),
        &source.to_string(),
        &format!("{to}/{protocol}"),
        client.at(),
    )?;
    let told = told(&explanation)?;
    let probe = Probe::new(transport, to);
    let before = told.counter.as_ref().map(|counter| count_of(scenario, counter)).transpose()?;
    match told.result.as_str() {
        "answered" => {
            let answer = client.with(|host| host.ask(probe.clone()))?;
            ensure!(answer.error() == Some("ECONNREFUSED"), "not refused: {answer:?}");
        }
        "dropped" => {
            let answer = client.with(|host| host.ask(probe.clone().timeout(SILENT)))?;
            let silent = ["timeout", "EHOSTUNREACH", "ENETUNREACH"];
            let is_silent = answer.error().is_some_and(|error| silent.contains(&error));
            ensure!(is_silent, "not dropped: {answer:?}");
        }
        "delivered" | "leaves" | "connected" => served(client, &probe, &told)?,
        other => anyhow::bail!("no such result: {other}"),
    }
    if let (Some(counter), Some(before)) = (&told.counter, before) {
        let after = count_of(scenario, counter)?;
        ensure!(after > before, "{counter:?} was not counted: {explanation:#}");
    }
    Ok(told.result)
}

/// Asks until every backend has answered that may, and no other does.
fn served(client: &Client<'_>, probe: &Probe, told: &Told) -> Result<()> {
    let mut missing: Vec<&str> = Vec::new();
    for (address, _) in &told.servers {
        missing.push(server_at(client.scenario, *address)?);
    }
    let all = missing.clone();
    for _ in 0..ATTEMPTS {
        let answer = client.with(|host| host.ask(probe.clone()))?;
        let Answer::Reached(reached) = &answer else { anyhow::bail!("no answer: {answer:?}") };
        let name = reached.greeting.name.as_str();
        let index = all.iter().position(|server| *server == name);
        let index = index.with_context(|| format!("{name} answered, not one of {all:?}"))?;
        if let Some(seen) = told.servers[index].1 {
            let by = reached.greeting.client_address;
            ensure!(by == seen, "{name} saw {by}, not {seen}");
        }
        missing.retain(|server| *server != name);
        if missing.is_empty() {
            return Ok(());
        }
    }
    anyhow::bail!("{missing:?} never answered")
}

/// What is asked, and what the explanation is to tell of it.
type Row = (&'static str, Frontend, u8, &'static str);

fn try_row(
    scenario: &Scenario,
    expectations: &mut Expectations,
    (name, front, number, result): Row,
) {
    for kind @ (transport, family) in kinds() {
        let client = Client { scenario, name };
        let to = front.at(scenario, number, family);
        let outcome = compare(&client, transport, to).and_then(|told| {
            // Without a connect-time hook for it, what is connected here is delivered there.
            let same = told == result
                || told == "connected" && matches!(result, "delivered" | "leaves" | "either");
            ensure!(
                same || result == "either" && matches!(told.as_str(), "delivered" | "leaves"),
                "told {told}, not {result}"
            );
            Ok(())
        });
        expectations.check(format!("{name} -> {front:?} {number} {kind:?}"), outcome);
    }
}

/// Everything that does not depend on how sockets are translated.
const ROWS: [Row; 25] = [
    ("a", Frontend::ClusterIp, BOTH, "either"),
    ("a", Frontend::ClusterIp, FAR, "leaves"),
    ("a", Frontend::ClusterIp, HOST, "delivered"),
    ("a", Frontend::ClusterIp, NONE, "answered"),
    ("a", Frontend::ClusterIp, NOBODYS, "dropped"),
    ("a", Frontend::NodePort(1), BOTH, "either"),
    ("a", Frontend::Balancer, FAR_LOCAL, "leaves"),
    ("a", Frontend::Balancer, RANGED, "either"),
    ("node1", Frontend::ClusterIp, BOTH, "either"),
    ("node1", Frontend::ClusterIp, HOST, "delivered"),
    ("node1", Frontend::ClusterIp, NONE, "answered"),
    ("node1", Frontend::NodePort(1), FAR, "leaves"),
    ("node1", Frontend::Loopback, FAR, "leaves"),
    ("outside", Frontend::NodePort(1), BOTH, "either"),
    ("outside", Frontend::Balancer, FAR, "leaves"),
    ("outside", Frontend::External, HOST, "delivered"),
    ("outside", Frontend::Balancer, NONE, "answered"),
    ("outside", Frontend::Balancer, FAR_LOCAL, "dropped"),
    ("outside", Frontend::Balancer, RANGED, "dropped"),
    ("outside", Frontend::NodePort(1), RANGED, "either"),
    ("outside", Frontend::Balancer, FAR_DSR, "leaves"),
    ("outside", Frontend::ClusterIp, FAR, "leaves"),
    ("d", Frontend::NodePort(1), BOTH, "either"),
    ("d", Frontend::NodePort(1), FAR_LOCAL, "dropped"),
    ("node2", Frontend::NodePort(1), FAR_LOCAL, "dropped"),
];

fn check(scenario: &Scenario, own: &'static str) -> Result<()> {
    let mut expectations = Expectations::default();
    for row in ROWS {
        try_row(scenario, &mut expectations, row);
    }
    try_row(scenario, &mut expectations, ("a", Frontend::ClusterIp, OWN, own));
    for (transport, family) in kinds() {
        let a = Client { scenario, name: "a" };
        let what = |what: &str| format!("{what} {transport:?} {family:?}");
        let wrong = SocketAddr::new(cluster_ip(BOTH).get(family), PORT + 1);
        let refused = compare(&a, transport, wrong);
        expectations.is_true(what("wrong port"), refused.is_ok_and(|told| told == "answered"));
        let direct = scenario.cluster.pod("b").at(family, TARGET);
        let direct = compare(&a, transport, direct);
        expectations
            .is_true(what("no Service address"), direct.is_ok_and(|told| told == "delivered"));
    }
    expectations.finish()
}

#[test]
fn packets_go_where_explain_says() -> Result<()> {
    let scenario = start("off")?;
    check(&scenario, "delivered")?;
    affinity_is_told(&scenario)?;
    known_flows_are_told(&scenario)
}

#[test]
fn sockets_go_where_explain_says() -> Result<()> {
    check(&start("tcp")?, "delivered")
}

/// Once a client is bound to a backend, that one alone is possible.
fn affinity_is_told(scenario: &Scenario) -> Result<()> {
    for (transport, family) in kinds() {
        let a = Client { scenario, name: "a" };
        let to = Frontend::ClusterIp.at(scenario, STICKY, family);
        let first = a.with(|host| host.ask(Probe::new(transport, to)))?;
        let first = first.name().context("no answer")?.to_owned();
        let protocol = if transport == Transport::Tcp { "tcp" } else { "udp" };
        let from = a.source(to)?.to_string();
        let said = explain(&scenario.cluster.node(1), &from, &format!("{to}/{protocol}"), "pod")?;
        let told = told(&said)?;
        ensure!(told.servers.len() == 1, "{first} answered: {said:#}");
        ensure!(server_at(scenario, told.servers[0].0)? == first, "{first} answered: {said:#}");
    }
    Ok(())
}

/// With the client's port, explain finds the flow, which keeps its backend.
fn known_flows_are_told(scenario: &Scenario) -> Result<()> {
    const SOURCE_PORT: u16 = 41_234;
    for (transport, family) in kinds() {
        let a = Client { scenario, name: "a" };
        let to = Frontend::ClusterIp.at(scenario, BOTH, family);
        let probe = Probe::new(transport, to).connected().source_port(SOURCE_PORT);
        let connection = a.with(|host| host.open(probe))?;
        let server = connection.first().name().context("no answer")?.to_owned();
        let protocol = if transport == Transport::Tcp { "tcp" } else { "udp" };
        let from = SocketAddr::new(a.source(to)?, SOURCE_PORT).to_string();
        let said = explain(&scenario.cluster.node(1), &from, &format!("{to}/{protocol}"), "pod")?;
        let step = &said["path"][0];
        ensure!(step["reason"] == "request", "{said:#}");
        let to = step["new_destination"].as_str().context("no destination")?.parse()?;
        ensure!(server_at(scenario, to)? == server, "{server} has the flow: {said:#}");
        // Nothing of it was written.
        let again = connection.exchange("again", Duration::from_secs(1))?;
        ensure!(again.name() == Some(&server), "{again:?}");
    }
    Ok(())
}

#[test]
fn explain_says_in_a_sentence_what_it_cannot_answer() -> Result<()> {
    let cluster = Cluster::builder().pod(1, "a").build()?;
    let node = cluster.node(1);
    let fails = |from: &str, to: &str, at: &str| match explain(&node, from, to, at) {
        Ok(said) => anyhow::bail!("explained: {said:#}"),
        Err(error) => Ok(format!("{error:#}")),
    };
    let text = fails("10.244.1.2", "10.96.0.1:80/tcp", "pod")?;
    ensure!(text.contains("nothing is pinned at"), "{text}");
    let scenario = Scenario::start(Cluster::builder().pod(1, "a"), &SMALL_MAPS)?;
    let node = scenario.cluster.node(1);
    let fails = |from: &str, to: &str, at: &str| match explain(&node, from, to, at) {
        Ok(said) => anyhow::bail!("explained: {said:#}"),
        Err(error) => Ok(format!("{error:#}")),
    };
    let pod = scenario.cluster.pod("a").ip(Family::V4).to_string();
    let own = node.ip(Family::V4).to_string();
    let rows = [
        (pod.as_str(), "[fd00:10:96::1]:80/tcp", "pod", "different families"),
        (&pod, "10.96.0.1:80/tcp", "eth7", "no such device"),
        (&pod, "10.96.0.1:80/tcp", "node", "not an address of this node"),
        (&own, "10.96.0.1:80/tcp", "pod", "give --at node"),
        ("192.0.2.99", "10.96.0.1:80/tcp", "pod", "give --at eth0"),
    ];
    for (from, to, at, expected) in rows {
        let text = fails(from, to, at)?;
        ensure!(text.contains(expected), "{from} {to} {at}: {text}");
    }
    Ok(())
}
