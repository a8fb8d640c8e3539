//! What a client of a ClusterIP sees when there is nothing to send to.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::{Answer, Probe, Transport};
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::traffic::raw::{self, Outcome};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::scenario::{PORT, Scenario};
use nix::errno::Errno;

/// A refusal that takes longer is no refusal but a retry.
const AT_ONCE_MS: f64 = 900.0;
/// How long is waited for what is not to come.
const SILENT: Duration = Duration::from_millis(100);

/// The ClusterIPs by their number.
const EMPTY: u8 = 1;
const LIVE: u8 = 2;
const LOCAL_FAR: u8 = 3;
const LOCAL_BOTH: u8 = 4;
const DELETED: u8 = 5;
const NOT_READY: u8 = 6;
const NOBODYS: u8 = 99;

fn set_up(arguments: &[&str]) -> Result<Scenario> {
    let builder = Cluster::builder().pod(1, "a").pod(1, "b").pod(2, "c");
    let mut scenario = Scenario::start(builder, arguments)?;
    scenario.serve(&["b", "c"])?;
    let both = scenario.endpoints(&["b", "c"]);
    let far = scenario.endpoints(&["c"]);
    scenario.publish(&scenario.service("empty", EMPTY), &[])?;
    scenario.publish(&scenario.service("live", LIVE), &both)?;
    scenario.publish(&scenario.service("local-far", LOCAL_FAR).internal_local(), &far)?;
    scenario.publish(&scenario.service("local-both", LOCAL_BOTH).internal_local(), &both)?;
    let deleted = scenario.service("deleted", DELETED);
    scenario.publish(&deleted, &both)?;
    let not_ready: Vec<_> = far.into_iter().map(|endpoint| endpoint.not_ready()).collect();
    scenario.publish(&scenario.service("not-ready", NOT_READY), &not_ready)?;
    let a = scenario.cluster.pod("a");
    for kind @ (_, family) in KINDS {
        // It is there before it is gone.
        scenario.check(&a, kind, DELETED, &["b", "c"], &[a.ip(family)])?;
    }
    scenario.delete(&deleted)?;
    Ok(scenario)
}

const KINDS: [(Transport, Family); 4] = [
    (Transport::Tcp, Family::V4),
    (Transport::Tcp, Family::V6),
    (Transport::Udp, Family::V4),
    (Transport::Udp, Family::V6),
];

fn to(number: u8, family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(cluster_ip(number).get(family), port)
}

fn probe(transport: Transport, to: SocketAddr) -> Probe {
    Probe::new(transport, to).connected().timeout(Duration::from_secs(1))
}

fn is_refused(answer: &Answer) -> Result<()> {
    ensure!(answer.error() == Some("ECONNREFUSED"), "{answer:?}");
    let Answer::Failed(failed) = answer else { return Ok(()) };
    ensure!(failed.elapsed_ms < AT_ONCE_MS, "refused, but only after {} ms", failed.elapsed_ms);
    Ok(())
}

fn is_unanswered(answer: &Answer) -> Result<()> {
    let silent = ["timeout", "EHOSTUNREACH", "ENETUNREACH", "ENOBUFS"];
    ensure!(answer.error().is_some_and(|error| silent.contains(&error)), "{answer:?}");
    Ok(())
}

/// Whether sockets of this transport are translated as they connect.
fn by_connect(mode: &str, transport: Transport) -> bool {
    match transport {
        Transport::Tcp => mode != "off",
        Transport::Udp => mode == "all",
    }
}

/// The rows of one client for TCP and UDP.
fn check_sockets(expectations: &mut Expectations, mode: &str, client: &Host) -> Result<()> {
    for (transport, family) in KINDS {
        let what =
            |case: &str| format!("{mode} {} {transport:?} {family:?}: {case}", client.name());
        let ask = |number: u8, port: u16| client.ask(probe(transport, to(number, family, port)));
        expectations.check(what("no endpoint"), is_refused(&ask(EMPTY, PORT)?));
        expectations.check(what("no endpoint is ready"), is_refused(&ask(NOT_READY, PORT)?));
        expectations.check(what("unknown port"), is_refused(&ask(LIVE, PORT + 1)?));
        let silent =
            |number, port| client.ask(probe(transport, to(number, family, port)).timeout(SILENT));
        if by_connect(mode, transport) {
            expectations
                .check(what("iTP Local, endpoints elsewhere"), is_refused(&ask(LOCAL_FAR, PORT)?));
        } else {
            let dropped = silent(LOCAL_FAR, PORT)?;
            expectations.check(what("iTP Local, endpoints elsewhere"), is_unanswered(&dropped));
        }
        expectations.check(what("address of no Service"), is_unanswered(&silent(NOBODYS, PORT)?));
        expectations.check(what("deleted Service"), is_unanswered(&silent(DELETED, PORT)?));
        let answers = (0..8).map(|_| ask(LOCAL_BOTH, PORT)).collect::<Result<Vec<_>>>()?;
        let strays = answers.iter().find(|answer| answer.name() != Some("b"));
        expectations.is_true(what(&format!("iTP Local, one here: {strays:?}")), strays.is_none());
        if family == Family::V4 {
            let mapped = client.ask(probe(transport, to(EMPTY, family, PORT)).v4_mapped())?;
            expectations.check(what("no endpoint, v4-mapped"), is_refused(&mapped));
        }
        if transport == Transport::Udp {
            // An unconnected socket is told by its error queue, or by sendmsg() itself.
            let unconnected = client.udp(to(EMPTY, family, PORT))?;
            expectations.check(what("no endpoint, unconnected"), is_refused(&unconnected));
        }
    }
    Ok(())
}

/// The rows of one client for everything else.
fn check_packets(expectations: &mut Expectations, client: &Host) -> Result<()> {
    for family in Family::ALL {
        let what = |case: &str| format!("{} {family:?}: {case}", client.name());
        let ip = |number: u8| cluster_ip(number).get(family);
        let second = Duration::from_secs(1);
        let answered = raw::ping(client, ip(LIVE), second)?;
        expectations.is_true(what(&format!("ping: {answered:?}")), answered == Outcome::Answered);
        let empty = raw::ping(client, ip(EMPTY), second)?;
        let is_refusal = matches!(empty, Outcome::Refused(_));
        expectations.is_true(what(&format!("ping without endpoint: {empty:?}")), is_refusal);
        let nobody = raw::ping(client, ip(NOBODYS), SILENT)?;
        let is_unanswered = nobody != Outcome::Answered;
        expectations.is_true(what(&format!("ping of no Service: {nobody:?}")), is_unanswered);
        let strange = raw::strange_protocol(client, ip(LIVE), SILENT)?;
        let refused = match family {
            Family::V4 => Outcome::Refused(Errno::ENOPROTOOPT),
            Family::V6 => Outcome::Refused(Errno::ECONNREFUSED),
        };
        expectations.is_true(what(&format!("strange protocol: {strange:?}")), strange == refused);
        for (number, is_reset) in [(LIVE, true), (EMPTY, true), (NOBODYS, false)] {
            let out_of_the_blue = raw::tcp_ack(client, to(number, family, PORT), SILENT)?;
            let case = what(&format!("TCP of no flow to {number}: {out_of_the_blue:?}"));
            expectations.is_true(case, (out_of_the_blue == Outcome::Answered) == is_reset);
        }
    }
    Ok(())
}

fn check_table_4(mode: &str) -> Result<()> {
    let scenario = set_up(&["--socket-lb", mode])?;
    let mut expectations = Expectations::default();
    let (a, node1) = (scenario.cluster.pod("a"), scenario.cluster.node(1));
    for client in [&**a, &**node1] {
        check_sockets(&mut expectations, mode, client).with_context(|| client.name().to_owned())?;
        if mode == "off" {
            check_packets(&mut expectations, client).with_context(|| client.name().to_owned())?;
        }
    }
    for node in [1, 2] {
        let leaked = scenario.cluster.fabric().service_packets_from(node)?;
        expectations
            .is_true(format!("{leaked} packets to ClusterIPs left node{node}"), leaked == 0);
    }
    expectations.finish()
}

#[test]
fn packets_without_a_backend_are_refused_or_dropped() -> Result<()> {
    check_table_4("off")
}

#[test]
fn connects_without_a_backend_are_refused() -> Result<()> {
    check_table_4("tcp")
}

#[test]
fn connects_and_datagrams_without_a_backend_are_refused() -> Result<()> {
    check_table_4("all")
}
