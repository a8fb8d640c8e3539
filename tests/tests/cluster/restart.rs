//! The API server goes away and comes back: who is connected does not notice.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_tests::harness::controlplane::Options;
use lb_tests::harness::controlplane::live::{LiveCluster, PORT};
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::wait::PATIENCE;
use nix::sys::signal::Signal;

/// Longer than the API server takes to come back.
const TRAFFIC: Duration = Duration::from_secs(120);
/// Connections, or datagrams, a second.
const RATE: u64 = 200;
/// How long the API server is away.
const AWAY: Duration = Duration::from_secs(3);

/// How often the agent of a node wrote to the maps since it was started.
fn writes(live: &mut LiveCluster, node: u8) -> Result<usize> {
    let log = live.agent(node)?.process().stderr();
    Ok(log.lines().filter(|line| line.contains("programmed")).count())
}

/// How often it has listed a kind.
fn lists(live: &mut LiveCluster, node: u8, kind: &str) -> Result<usize> {
    let log = live.agent(node)?.process().stderr();
    let listed = format!("listed kind={kind} ");
    Ok(log.lines().filter(|line| line.contains(&listed)).count())
}

#[test]
fn an_api_server_that_restarts_loses_no_connection() -> Result<()> {
    let builder = Cluster::builder().pod(1, "a").pod(1, "b").pod(2, "c");
    let mut live = LiveCluster::start(builder, Options::default())?;
    live.serve(&["b", "c"])?;
    live.start_agents(&["-v", "4"])?;
    live.create_pods("web", &["b", "c"])?;
    live.create_service("web", 20)?;
    live.wait_backends("web", Some(2))?;
    // What the watches have seen is then too old for the server that comes back: they list again.
    live.kubectl(&["create", "configmap", "newer"])?;
    let before = [writes(&mut live, 1)?, writes(&mut live, 2)?];
    let a = live.cluster.pod("a");
    let to = |family| (cluster_ip(20).get(family), PORT).into();
    let loads = [
        a.load(&Probe::tcp(to(Family::V4)), RATE, TRAFFIC)?,
        a.load(&Probe::tcp(to(Family::V6)), RATE, TRAFFIC)?,
        a.load(&Probe::udp(to(Family::V4)), RATE, TRAFFIC)?,
        a.load_keepalive(&Probe::tcp(to(Family::V6)), RATE, TRAFFIC)?,
    ];
    live.plane.stop_api_server()?;
    thread::sleep(AWAY);
    for node in [1, 2] {
        let (status, said) = live.agent(node)?.http(10256, "/healthz")?;
        ensure!(status == 200, "node{node} is not healthy without API server: {status} {said}");
    }
    live.plane.start_api_server()?;
    let returned = Instant::now();
    live.plane.delete_pod("default", "b", Duration::ZERO)?;
    live.wait_backends("web", Some(1)).context("the change after the return")?;
    println!("a change made at the return is seen after {:?}", returned.elapsed());
    let kinds = ["Service", "EndpointSlice", "Node", "ServiceCIDR"];
    for (node, kind) in [1, 2].into_iter().flat_map(|node| kinds.map(|kind| (node, kind))) {
        while lists(&mut live, node, kind)? < 2 {
            ensure!(returned.elapsed() < PATIENCE, "node{node} does not list {kind} again");
            thread::sleep(Duration::from_millis(10));
        }
    }
    println!("everything is listed again after {:?}", returned.elapsed());
    for load in loads {
        let report = load.stop()?;
        ensure!(report.failures() == 0, "{report:?}");
        ensure!(report.ok > RATE * AWAY.as_secs(), "{report:?}");
    }
    let answer = a.ask(Probe::tcp(to(Family::V4)))?;
    ensure!(answer.name() == Some("c"), "{answer:?}");
    for (node, before) in [1, 2].into_iter().zip(before) {
        let more = writes(&mut live, node)? - before;
        // Both families of the endpoint that went, each with its reclaiming later.
        ensure!(
            more <= 4,
            "node{node} wrote {more} times:\n{}",
            live.agent(node)?.process().tail()
        );
    }
    Ok(())
}

#[test]
fn an_agent_ends_at_once_although_its_server_hangs() -> Result<()> {
    let mut live = LiveCluster::start(Cluster::builder().nodes(2), Options::default())?;
    live.start_agent(1, &[])?;
    live.signal_api_server(Signal::SIGSTOP)?;
    // One that was connected before, and one that never hears a word.
    live.spawn_agent(2, &[])?;
    live.wait_log(2, "running")?;
    for node in [1, 2] {
        let start = Instant::now();
        let status = live.take_agent(node)?.terminate()?;
        ensure!(status.success(), "node{node}: {status}");
        ensure!(start.elapsed() < Duration::from_secs(10), "node{node} ended late");
        println!("node{node} ended after {:?}", start.elapsed());
    }
    live.signal_api_server(Signal::SIGCONT)
}
