//! A watch that has been broken for longer than `--watch-timeout` makes `/healthz` fail, one that
//! is only quiet does not, and neither makes `/livez` fail or keeps packets from being served.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lb_tests::harness::controlplane::Options;
use lb_tests::harness::controlplane::live::{LiveCluster, PORT};
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::cluster_ip;
use lb_tests::harness::wait::PATIENCE;

const LIMIT: Duration = Duration::from_secs(4);
const HEALTH: u16 = 10256;

fn healthz(live: &mut LiveCluster) -> Result<u16> {
    Ok(live.agent(1)?.http(HEALTH, "/healthz")?.0)
}

/// Waits for a status; returns how long it took.
fn wait_status(live: &mut LiveCluster, status: u16) -> Result<Duration> {
    let start = Instant::now();
    while healthz(live)? != status {
        ensure!(start.elapsed() < PATIENCE, "not {status} after {PATIENCE:?}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(start.elapsed())
}

fn ensure_served(live: &LiveCluster) -> Result<()> {
    let answer = live.cluster.pod("a").tcp((cluster_ip(20).v4, PORT).into())?;
    ensure!(answer.name() == Some("b"), "{answer:?}");
    Ok(())
}

#[test]
fn an_api_server_that_is_gone_for_long_makes_healthz_fail_if_asked_to_until_it_is_back()
-> Result<()> {
    let builder = Cluster::builder().nodes(1).pod(1, "a").pod(1, "b");
    let mut live = LiveCluster::start(builder, Options::default())?;
    live.serve(&["b"])?;
    live.create_pods("web", &["b"])?;
    live.create_service("web", 20)?;
    let limit = format!("{}s", LIMIT.as_secs());
    live.start_agent(1, &["--watch-timeout", &limit])?;
    live.wait_backends("web", Some(1))?;
    // Nobody changes anything: the watches are quiet for far longer than the limit.
    let quiet = Instant::now();
    while quiet.elapsed() < 2 * LIMIT {
        ensure!(healthz(&mut live)? == 200, "a quiet watch was taken for dead");
        thread::sleep(Duration::from_millis(100));
    }
    live.plane.stop_api_server()?;
    let waited = wait_status(&mut live, 503)?;
    ensure!(waited > LIMIT - Duration::from_secs(1), "dead after {waited:?} already");
    let log = live.agent(1)?.process().stderr();
    let named = format!("no watch for longer than {LIMIT:?}: Service: ");
    ensure!(log.matches(&named).count() == 1, "the log does not name it once:\n{log}");
    let (status, body) = live.agent(1)?.http(HEALTH, "/livez")?;
    ensure!(status == 200 && body.contains("\"healthy\":true"), "{status} {body}");
    ensure_served(&live)?;
    live.plane.start_api_server()?;
    wait_status(&mut live, 200)?;
    // It follows again what is changed.
    live.create_service("more", 21)?;
    live.wait_backends("more", Some(0))
}

#[test]
fn a_short_outage_or_no_limit_keeps_the_proxy_healthy() -> Result<()> {
    let builder = Cluster::builder().nodes(1).pod(1, "a");
    let mut live = LiveCluster::start(builder, Options::default())?;
    for limit in ["1m", "0"] {
        live.start_agent(1, &["--watch-timeout", limit])?;
        live.plane.stop_api_server()?;
        let start = Instant::now();
        while start.elapsed() < LIMIT {
            ensure!(healthz(&mut live)? == 200, "unhealthy with --watch-timeout {limit}");
            thread::sleep(Duration::from_millis(100));
        }
        let log = live.agent(1)?.process().stderr();
        ensure!(log.contains("cannot reach") || log.contains("watch broken"), "no outage:\n{log}");
        live.take_agent(1)?.terminate()?;
        live.plane.start_api_server()?;
    }
    Ok(())
}
