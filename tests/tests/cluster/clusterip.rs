//! A Service from its creation by kubectl to its deletion: real API server, real endpointslice
//! controller, real sockets.

use std::net::SocketAddr;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use lb_tests::harness::controlplane::Options;
use lb_tests::harness::controlplane::live::{HTTP, LiveCluster, PORT, service};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::words::scenario::expect;
use lb_tests::harness::wait::PATIENCE;
use serde_json::Value;

const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Udp];
/// The address that an API server gives the Service of its own.
const KUBERNETES: &str = "https://10.96.0.1";
/// How often a Service is deleted for the figure.
const DELETIONS: u8 = 7;
/// The median of the last new connection after the request to delete is sooner.
const DELETED: Duration = Duration::from_millis(50);
/// How long a client waits where nobody is to answer.
const IMPATIENT: Duration = Duration::from_millis(100);

fn kinds() -> impl Iterator<Item = (Transport, Family)> {
    TRANSPORTS.into_iter().flat_map(|transport| Family::ALL.map(|family| (transport, family)))
}

fn start(arguments: &[&str]) -> Result<LiveCluster> {
    let builder = Cluster::builder().pod(1, "a").pod(1, "b").pod(2, "c");
    let mut live = LiveCluster::start(builder, Options::default())?;
    live.serve(&["a", "b", "c"])?;
    live.start_agents(arguments)?;
    Ok(live)
}

fn front_end(number: u8, family: Family) -> SocketAddr {
    (cluster_ip(number).get(family), PORT).into()
}

/// Who answers for the Service of this number; checks the client address that it saw.
fn answered_by(
    client: &Host,
    (transport, family): (Transport, Family),
    number: u8,
    servers: &[&str],
) -> Result<String> {
    let to = front_end(number, family);
    let what = format!("{} -> {to} {transport:?}", client.name());
    let answer = client.ask(Probe::new(transport, to))?;
    expect(&what, &answer, to, servers, &[client.ip(family)])
}

/// Every kind of client sees every kind of backend, and backends see the client itself.
fn check_reach(live: &LiveCluster) -> Result<()> {
    let (a, node1) = (live.cluster.pod("a"), live.cluster.node(1));
    for kind in kinds() {
        for (number, server) in [(20, "b"), (21, "c")] {
            answered_by(&a, kind, number, &[server])?;
            answered_by(&node1, kind, number, &[server])?;
        }
    }
    for family in Family::ALL {
        for (number, server) in [(20, "b"), (21, "c")] {
            let to = SocketAddr::new(cluster_ip(number).get(family), HTTP);
            let said = live.curl(&a, &[&format!("http://{to}/")])?;
            let seen = format!("name={server}\nclient_address={}\n", a.ip(family));
            ensure!(said.starts_with(&seen), "{to}: {said:?} instead of {seen:?}");
        }
    }
    Ok(())
}

/// The API server's own Service: its endpoint is no pod, and the agents reach it too.
fn check_kubernetes(live: &LiveCluster) -> Result<()> {
    let (a, c) = (live.cluster.pod("a"), live.cluster.pod("c"));
    let (node1, node2) = (live.cluster.node(1), live.cluster.node(2));
    let url = format!("{KUBERNETES}/healthz");
    for client in [&**a, &**c, &**node1, &**node2] {
        let said = live.curl(client, &["--insecure", &url])?;
        ensure!(said == "ok", "{} hears {said:?}", client.name());
    }
    Ok(())
}

/// Who answers `count` new connections.
fn spread(client: &Host, number: u8, family: Family, count: usize) -> Result<Vec<String>> {
    let mut servers = (0..count)
        .map(|_| answered_by(client, (Transport::Tcp, family), number, &["b", "c"]))
        .collect::<Result<Vec<_>>>()?;
    servers.sort();
    servers.dedup();
    Ok(servers)
}

/// Endpoints that cease to be ready, become it again, terminate and go.
fn check_endpoints(live: &LiveCluster) -> Result<()> {
    live.create_service("both", 22)?;
    live.kubectl(&["label", "pod", "b", "c", "app=both", "--overwrite"])?;
    live.wait_backends("both", Some(2))?;
    let a = live.cluster.pod("a");
    for family in Family::ALL {
        ensure!(spread(&a, 22, family, 60)? == ["b", "c"], "not both serve");
    }
    let held = loop {
        let connection = a.open(Probe::tcp(front_end(22, Family::V4)))?;
        if connection.first().name() == Some("b") {
            break connection;
        }
    };
    let is_held = || {
        let answer = held.exchange("again", Duration::from_secs(1))?;
        ensure!(answer.name() == Some("b"), "the established connection is broken: {answer:?}");
        Ok(())
    };
    let only_c = || {
        for family in Family::ALL {
            ensure!(spread(&a, 22, family, 20)? == ["c"], "new connections reach pod b");
        }
        is_held()
    };
    live.plane.set_ready("default", "b", false)?;
    live.wait_backends("both", Some(1))?;
    only_c().context("not ready")?;
    live.plane.set_ready("default", "b", true)?;
    live.wait_backends("both", Some(2))?;
    ensure!(spread(&a, 22, Family::V4, 60)? == ["b", "c"], "b is ready again and not used");
    live.plane.delete_pod("default", "b", Duration::from_secs(600))?;
    live.wait_backends("both", Some(1))?;
    only_c().context("terminating")?;
    // The last one that serves is used although it terminates.
    live.plane.delete_pod("default", "c", Duration::from_secs(600))?;
    live.wait_backends("both", Some(2))?;
    ensure!(spread(&a, 22, Family::V6, 60)? == ["b", "c"], "terminating pods do not serve");
    live.plane.delete_pod("default", "b", Duration::ZERO)?;
    live.wait_backends("both", Some(1))?;
    only_c().context("deleted")?;
    live.plane.delete_pod("default", "c", Duration::ZERO)?;
    live.wait_backends("both", Some(0))?;
    for kind @ (transport, family) in kinds() {
        let answer = a.ask(Probe::new(transport, front_end(22, family)))?;
        let refused = answer.error() == Some("ECONNREFUSED");
        ensure!(refused, "{kind:?} without endpoint: {answer:?}");
    }
    Ok(())
}

/// Deletes a Service while a client connects to it without a pause. Returns how long after
/// the request was *sent*, which is earlier than its answer, the last connection was begun
/// that somebody answered.
fn delete(live: &mut LiveCluster, client: &Host, transport: Transport) -> Result<Duration> {
    let to = front_end(23, Family::V4);
    let ask = || client.ask(Probe::new(transport, to).timeout(IMPATIENT));
    let (sent, asked) = mpsc::channel();
    thread::scope(|scope| {
        let last = scope.spawn(move || {
            let (mut last, start) = (None, Instant::now());
            // Two in a row, so that one datagram that is lost is no end.
            let mut failed = 0;
            while failed < 2 {
                let now = Instant::now();
                ensure!(now - start < PATIENCE, "the Service lives on");
                if ask()?.reached().is_some() {
                    if last.is_none() {
                        sent.send(())?;
                    }
                    (last, failed) = (Some(now), 0);
                } else {
                    failed += 1;
                }
            }
            anyhow::Ok(last)
        });
        asked.recv().context("the Service never answered")?;
        let path = "/api/v1/namespaces/default/services/gone";
        let start = Instant::now();
        let (status, object) = live.request("DELETE", path, &Value::Null)?;
        ensure!(status == 200, "{status} {object}");
        let last = last.join().map_err(|_| anyhow!("the client panicked"))??;
        Ok(last.context("the Service never answered")?.saturating_duration_since(start))
    })
}

fn check_deletion(live: &mut LiveCluster, transport: Transport) -> Result<()> {
    let a = live.cluster.pod("a");
    live.create_pods("gone", &["c"])?;
    let mut times = Vec::new();
    let mut held = Vec::new();
    for _ in 0..DELETIONS {
        let created = service("gone", 23);
        let (status, said) =
            live.request("POST", "/api/v1/namespaces/default/services", &created)?;
        ensure!(status == 201, "{status} {said}");
        live.wait_backends("gone", Some(1))?;
        held.push(a.open(Probe::tcp(front_end(23, Family::V4)))?);
        held.push(a.open(Probe::tcp(front_end(23, Family::V6)))?);
        times.push(delete(live, &a, transport)?);
        live.wait_backends("gone", None)?;
    }
    for connection in &held {
        let answer = connection.exchange("again", Duration::from_secs(1))?;
        ensure!(answer.name() == Some("c"), "an established connection is broken: {answer:?}");
    }
    for (transport, family) in kinds() {
        let to = front_end(23, family);
        // From a port that no socket is given: flows of the ports asked from above go on.
        let probe = Probe::new(transport, to).source_port(20_023).timeout(IMPATIENT);
        let answer = a.ask(probe)?;
        ensure!(answer.reached().is_none(), "{to} still answers: {answer:?}");
    }
    live.plane.delete_pod("default", "c", Duration::ZERO)?;
    times.sort();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!(
        "{transport:?}: last new connection after the request to delete: median {median:?}, worst {worst:?}"
    );
    ensure!(median <= DELETED, "{times:?}");
    Ok(())
}

fn check_all(arguments: &[&str]) -> Result<()> {
    let mut live = start(arguments)?;
    live.create_pods("near", &["b"])?;
    live.create_pods("far", &["c"])?;
    live.create_service("near", 20)?;
    live.create_service("far", 21)?;
    live.wait_backends("near", Some(1))?;
    live.wait_backends("far", Some(1))?;
    check_reach(&live)?;
    check_kubernetes(&live)?;
    check_endpoints(&live)?;
    let leaked = live.cluster.fabric().service_packets()?;
    ensure!(leaked == 0, "{leaked} packets to ClusterIPs left a node");
    live.plane.check_running()
}

#[test]
fn a_service_of_kubectl_works_until_it_is_deleted() -> Result<()> {
    check_all(&[])
}

#[test]
fn and_by_packets_alone() -> Result<()> {
    check_all(&["--socket-lb", "off"])
}

/// The last new connection to a deleted Service, in time.
fn check_deletions(arguments: &[&str]) -> Result<()> {
    let mut live = start(arguments)?;
    for transport in TRANSPORTS {
        check_deletion(&mut live, transport)?;
    }
    let leaked = live.cluster.fabric().service_packets()?;
    ensure!(leaked == 0, "{leaked} packets to ClusterIPs left a node");
    Ok(())
}

#[test]
fn new_connections_end_within_50_ms_of_a_deletion() -> Result<()> {
    check_deletions(&[])
}

#[test]
fn new_flows_end_within_50_ms_of_a_deletion() -> Result<()> {
    check_deletions(&["--socket-lb", "off"])
}
