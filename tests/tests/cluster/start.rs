//! How an agent starts beside an API server that is missing, old, strange or strict.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lb_tests::harness::controlplane::Options;
use lb_tests::harness::controlplane::live::{LiveCluster, PORT};
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::actors::agent::{self, Agent, cleanup};
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::wait::PATIENCE;

/// Connections a second while agents come and go.
const RATE: u64 = 200;
const TRAFFIC: Duration = Duration::from_secs(120);

/// The role without one resource.
fn role_without(resource: &str) -> String {
    let rbac = include_str!("../../../manifests/base/rbac.yaml");
    assert!(rbac.contains(resource), "no {resource} in rbac.yaml");
    rbac.replace(resource, "nothing")
}

fn world_with_web() -> Result<LiveCluster> {
    let builder = Cluster::builder().nodes(1).pod(1, "a").pod(1, "b");
    let mut live = LiveCluster::start(builder, Options::default())?;
    live.serve(&["a", "b"])?;
    live.create_pods("web", &["b"])?;
    live.create_service("web", 20)?;
    Ok(live)
}

fn is_ready(live: &mut LiveCluster) -> Result<bool> {
    Ok(live.agent(1)?.http(10256, "/healthz").is_ok_and(|(status, _)| status == 200))
}

/// Nothing is known of the server, and the agent says so where it is asked.
fn expect_unready(live: &mut LiveCluster, log: &str) -> Result<()> {
    live.wait_log(1, log)?;
    let (status, said) = live.agent(1)?.http(10256, "/healthz")?;
    ensure!(status == 503, "{status} {said}");
    Ok(())
}

#[test]
fn a_kubeconfig_that_is_no_use_ends_the_agent_with_a_sentence() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    let directory = tempfile::tempdir()?;
    let config = |name: &str, text: &str| -> Result<_> {
        let path = directory.path().join(name);
        fs::write(&path, text)?;
        Ok(path)
    };
    let cluster_of = |more: &str| {
        format!(
            "{{apiVersion: v1, kind: Config, current-context: x, \
             contexts: [{{name: x, context: {{cluster: x, user: x}}}}], \
             clusters: [{{name: x, cluster: {{server: 'https://172.18.0.1:6443'{more}}}}}], \
             users: [{{name: x, user: {{token: x}}}}]}}"
        )
    };
    let no_ca = cluster_of(", certificate-authority: /nowhere/ca.crt");
    let cases = [
        (directory.path().join("missing"), "missing"),
        (directory.path().to_owned(), "Is a directory"),
        (config("no-yaml", "clusters: [")?, "parse"),
        (config("no-context", "{apiVersion: v1, kind: Config}")?, "context"),
        (config("no-ca", &no_ca)?, "/nowhere/ca.crt"),
    ];
    for (path, named) in cases {
        let case = path.display();
        let mut agent = Agent::spawn(&node, &agent::Options::kubeconfig(&path))?;
        let process = agent.process();
        let status = process.wait(PATIENCE)?;
        let said = process.stderr();
        let last = said.lines().last().unwrap_or_default();
        ensure!(status.code() == Some(1), "{case}: {status}: {said}");
        let sentence = last.starts_with("lb-agent: ") && last.contains("--kubeconfig");
        let named = last.contains(named) && last.contains(&case.to_string());
        ensure!(sentence && named, "{case}: {last}");
    }
    cleanup(&node)?;
    Ok(())
}

#[test]
fn an_agent_without_its_server_serves_what_the_maps_hold() -> Result<()> {
    let mut live = world_with_web()?;
    live.start_agents(&[])?;
    live.wait_backends("web", Some(1))?;
    let a = live.cluster.pod("a");
    let to = |family| (cluster_ip(20).get(family), PORT).into();
    let loads = [
        a.load(&Probe::tcp(to(Family::V4)), RATE, TRAFFIC)?,
        a.load(&Probe::udp(to(Family::V6)), RATE, TRAFFIC)?,
    ];
    live.plane.stop_api_server()?;
    live.take_agent(1)?.terminate()?;
    live.spawn_agent(1, &[])?;
    expect_unready(&mut live, "watch broken, retrying")?;
    let again = live.kubeconfig_with("stranger", "token-of-nobody")?;
    live.plane.start_api_server()?;
    live.agent(1)?.wait_ready()?;

    live.take_agent(1)?.kill9()?;
    live.spawn_agent_with(1, &agent::Options::kubeconfig(&again))?;
    expect_unready(&mut live, "401 Unauthorized")?;
    for load in loads {
        let report = load.stop()?;
        ensure!(report.failures() == 0, "{report:?}");
    }
    Ok(())
}

#[test]
fn missing_rights_are_named_and_do_not_stop_the_agent() -> Result<()> {
    let mut live = world_with_web()?;
    live.plane.apply(&role_without("servicecidrs"))?;
    live.start_agents(&[])?;
    live.wait_backends("web", Some(1))?;
    live.wait_log(1, "not allowed to read this kind")?;
    let log = live.agent(1)?.process().stderr();
    ensure!(log.contains("kind=ServiceCIDR"), "{log}");
    live.plane.apply(include_str!("../../../manifests/base/rbac.yaml"))?;
    live.wait_log(1, "listed kind=ServiceCIDR objects=1")?;

    // Without Services there is nothing to program: it waits.
    live.take_agent(1)?.terminate()?;
    live.plane.apply(&role_without("services, "))?;
    live.spawn_agent(1, &[])?;
    expect_unready(&mut live, "403 services is forbidden")?;
    let start = Instant::now();
    live.plane.apply(include_str!("../../../manifests/base/rbac.yaml"))?;
    while !is_ready(&mut live)? {
        ensure!(start.elapsed() < PATIENCE, "not ready although it may read everything");
    }
    Ok(())
}

fn check_server(options: Options) -> Result<String> {
    let builder = Cluster::builder().nodes(1).pod(1, "a").pod(1, "b");
    let mut live = LiveCluster::start(builder, options)?;
    live.serve(&["b"])?;
    live.create_pods("web", &["b"])?;
    live.create_service("web", 20)?;
    live.start_agents(&["-v", "4"])?;
    live.wait_backends("web", Some(1))?;
    let answer = live.cluster.pod("a").tcp((cluster_ip(20).v4, PORT).into())?;
    ensure!(answer.name() == Some("b"), "{answer:?}");
    live.kubectl(&["delete", "service", "web"])?;
    live.wait_backends("web", None)?;
    Ok(live.agent(1)?.process().stderr())
}

fn server(argument: &str) -> Options {
    Options { api_server_arguments: vec![argument.to_owned()], ..Options::default() }
}

#[test]
fn a_server_without_streaming_lists_is_listed() -> Result<()> {
    let log = check_server(server("--feature-gates=WatchList=false"))?;
    ensure!(log.contains("has no streaming lists"), "{log}");
    Ok(())
}

#[test]
fn a_store_that_reports_no_progress_is_listed() -> Result<()> {
    // etcd of Debian bookworm, 3.4.23, is older than the first that does.
    let etcd = Path::new("/usr/bin/etcd");
    let options = Options { etcd: Some(etcd.to_owned()), ..Options::default() };
    let log = check_server(options)?;
    ensure!(log.contains("has no streaming lists"), "{log}");
    Ok(())
}

#[test]
fn a_server_without_service_cidrs_is_followed() -> Result<()> {
    // As a server of 1.33 could be told: later ones cannot do without.
    let options = Options {
        api_server_arguments: [
            "--emulated-version=1.33",
            "--feature-gates=MultiCIDRServiceAllocator=false",
            "--runtime-config=networking.k8s.io/v1/servicecidrs=false",
        ]
        .map(str::to_owned)
        .to_vec(),
        ..Options::default()
    };
    let log = check_server(options)?;
    ensure!(log.contains("does not serve this kind kind=ServiceCIDR"), "{log}");
    Ok(())
}
