//! Which backend a client gets: one and the same with session affinity, any without.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::manifests::{Endpoint, Service};
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario};

const SERVERS: [&str; 3] = ["b", "c", "d"];
/// How long a client is remembered.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Ports of the Service with affinity; each is chosen for by itself, so that together they
/// hardly ever come out as before by chance (3 backends, 2 families: 1 in 3^12).
const PORTS: u16 = 6;

/// The first of the backends' ports behind them.
const TARGETS: u16 = 9000;

const STICKY: u8 = 1;
const SPREAD: u8 = 2;

type Kind = (Transport, Family);
/// What becomes of an endpoint; `None` if it goes.
type Change = fn(Endpoint) -> Option<Endpoint>;
/// Who answered, by port and kind.
type Choices = BTreeMap<String, String>;

fn sticky() -> Service {
    let service = Service::new("sticky").cluster_ips(cluster_ip(STICKY)).affinity(TIMEOUT);
    // Targets of their own: a client's port that is in use towards one would make a new
    // flow choose again.
    (PORT..PORT + PORTS).fold(service, |service, port| {
        let target = TARGETS + port - PORT;
        service.tcp(port, target).udp(port, target)
    })
}

fn set_up(mode: &str) -> Result<Scenario> {
    let builder = Cluster::builder().pod(1, "a").pod(1, "b").pod(1, "c").pod(2, "d");
    let mut scenario =
        Scenario::start(builder, &[&["--socket-lb", mode][..], &SMALL_MAPS].concat())?;
    scenario.serve(&SERVERS)?;
    scenario.serve_ports(&SERVERS, TARGETS..TARGETS + PORTS)?;
    scenario.publish(&sticky(), &scenario.endpoints(&SERVERS))?;
    scenario.publish(&scenario.service("spread", SPREAD), &scenario.endpoints(&SERVERS))?;
    Ok(scenario)
}

fn ask(client: &Host, number: u8, port: u16, (transport, family): Kind) -> Result<String> {
    let to = (cluster_ip(number).get(family), port).into();
    let answer = client.ask(Probe::new(transport, to))?;
    answer.name().map(str::to_owned).with_context(|| format!("{to} {transport:?}: {answer:?}"))
}

/// Asks every port of the Service with affinity once.
fn choices(client: &Host, transport: Transport) -> Result<Choices> {
    let mut choices = Choices::new();
    for family in Family::ALL {
        for port in PORT..PORT + PORTS {
            let name = ask(client, STICKY, port, (transport, family))?;
            choices.insert(format!("{family:?} {port}"), name);
        }
    }
    Ok(choices)
}

/// `get affinity` of node 1: the backends' addresses of a client.
fn bound_to(scenario: &mut Scenario, client: &str) -> Result<Vec<String>> {
    let rows = scenario.agent(1)?.get("affinity")?;
    let of_client = rows.as_array().into_iter().flatten().filter(|row| row["client"] == client);
    Ok(of_client.filter_map(|row| row["backend"].as_str().map(str::to_owned)).collect())
}

fn check_shown(
    scenario: &mut Scenario,
    expectations: &mut Expectations,
    client: &Host,
    (mode, transport): (&str, Transport),
) -> Result<()> {
    let is_by_connect = mode == "all" || mode == "tcp" && transport == Transport::Tcp;
    for family in Family::ALL {
        let shown = if is_by_connect {
            format!("netns:{}", client.netns().cookie()?)
        } else {
            client.ip(family).to_string()
        };
        let backends = bound_to(scenario, &shown)?;
        let is_of_family = |address: &&String| address.starts_with('[') == (family == Family::V6);
        let count = backends.iter().filter(is_of_family).count();
        let what = format!("{mode} {transport:?}: {count} {family:?} entries of {shown}");
        expectations.is_true(what, count >= usize::from(PORTS));
    }
    Ok(())
}

/// A client keeps its backend for as long as it comes back in time, and no longer.
fn check_sliding(
    expectations: &mut Expectations,
    client: &Host,
    transport: Transport,
) -> Result<()> {
    let what = |case: &str| format!("{} {transport:?}: {case}", client.name());
    let first = choices(client, transport)?;
    let spread: std::collections::BTreeSet<_> = first.values().collect();
    expectations.is_true(what(&format!("one backend for all ports: {first:?}")), spread.len() > 1);
    for _ in 0..5 {
        let again = choices(client, transport)?;
        expectations
            .is_true(what(&format!("another backend: {first:?} {again:?}")), again == first);
    }
    // Longer than the timeout in all, but never without a question for so long.
    let start = Instant::now();
    while start.elapsed() < TIMEOUT * 3 / 2 {
        thread::sleep(TIMEOUT / 4);
        let again = choices(client, transport)?;
        let case = format!("forgotten after {:?}: {first:?} {again:?}", start.elapsed());
        expectations.is_true(what(&case), again == first);
    }
    thread::sleep(TIMEOUT + Duration::from_millis(300));
    let later = choices(client, transport)?;
    expectations.is_true(what(&format!("remembered past the timeout: {later:?}")), later != first);
    Ok(())
}

/// A client whose backend takes no new ones moves, and stays where it moved.
fn check_moving(
    scenario: &Scenario,
    expectations: &mut Expectations,
    client: &Host,
    transport: Transport,
    change: (&str, Change),
) -> Result<()> {
    let kind = (transport, Family::V4);
    let what = |case: &str| format!("{} {transport:?} {}: {case}", client.name(), change.0);
    let first = ask(client, STICKY, PORT, kind)?;
    let others: Vec<_> = SERVERS.into_iter().filter(|name| *name != first).collect();
    let kept = scenario.endpoints(&others);
    let changed = scenario.endpoints(&[&first]).into_iter().filter_map(change.1);
    let endpoints: Vec<_> = kept.iter().cloned().chain(changed).collect();
    scenario.publish(&sticky(), &endpoints)?;
    let second = ask(client, STICKY, PORT, kind)?;
    expectations.is_true(what(&format!("still {second}")), second != first);
    scenario.publish(&sticky(), &scenario.endpoints(&SERVERS))?;
    for _ in 0..8 {
        let now = ask(client, STICKY, PORT, kind)?;
        expectations.is_true(what(&format!("left {second} for {now}")), now == second);
    }
    Ok(())
}

/// Without affinity every backend gets its share: 100 +- 5 standard deviations (8.2).
fn check_spread(expectations: &mut Expectations, client: &Host, kind: Kind) -> Result<()> {
    let mut counts: BTreeMap<String, u32> = SERVERS.map(|name| (name.to_owned(), 0)).into();
    for _ in 0..300 {
        *counts.entry(ask(client, SPREAD, PORT, kind)?).or_default() += 1;
    }
    let is_even = counts.len() == SERVERS.len() && counts.values().all(|n| (59..=141).contains(n));
    expectations.is_true(format!("{} {kind:?}: {counts:?}", client.name()), is_even);
    Ok(())
}

fn check_affinity(mode: &str) -> Result<()> {
    let mut scenario = set_up(mode)?;
    let mut expectations = Expectations::default();
    let (a, node1) = (scenario.cluster.pod("a"), scenario.cluster.node(1));
    for (client, transport) in [(&**a, Transport::Tcp), (&**node1, Transport::Udp)] {
        check_sliding(&mut expectations, client, transport)?;
        check_shown(&mut scenario, &mut expectations, client, (mode, transport))?;
    }
    for (client, transport) in [(&**a, Transport::Udp), (&**node1, Transport::Tcp)] {
        let changes: [(&str, Change); 3] = [
            ("removed", |_| None),
            ("terminating", |endpoint| Some(endpoint.terminating())),
            ("not ready", |endpoint| Some(endpoint.not_ready())),
        ];
        for change in changes {
            check_moving(&scenario, &mut expectations, client, transport, change)?;
        }
    }
    for client in [&**a, &**node1] {
        for transport in [Transport::Tcp, Transport::Udp] {
            for family in Family::ALL {
                check_spread(&mut expectations, client, (transport, family))?;
            }
        }
    }
    let services = scenario.agent(1)?.get("services")?;
    let shown =
        services.as_array().into_iter().flatten().find(|row| {
            row["name"].as_str().is_some_and(|name| name.starts_with("default/sticky:"))
        });
    let seconds = shown.and_then(|row| row["affinity_seconds"].as_u64());
    let what = format!("get services shows {shown:?}");
    expectations.is_true(what, seconds == Some(TIMEOUT.as_secs()));
    expectations.finish()
}

#[test]
fn packets_of_a_client_keep_to_a_backend() -> Result<()> {
    check_affinity("off")
}

#[test]
fn connects_of_a_client_keep_to_a_backend() -> Result<()> {
    check_affinity("tcp")
}

#[test]
fn connects_and_datagrams_of_a_client_keep_to_a_backend() -> Result<()> {
    check_affinity("all")
}
