//! The agent reports what it refuses where the owner of a Service looks: in its Events.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lb_tests::harness::controlplane::Options;
use lb_tests::harness::controlplane::live::{LiveCluster, PORT, TARGET, service};
use lb_tests::harness::netns::actors::agent;
use lb_tests::harness::netns::actors::host::Serve;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::wait::{PATIENCE, eventually};
use serde_json::{Value, json};

/// An Event as the tests look at it.
#[derive(Debug, PartialEq)]
struct Told {
    kind: String,
    reason: String,
    by: String,
    note: String,
    times: u64,
}

/// The Events about a Service that agents have sent, by node. Controllers send some too, for
/// example when they update a slice at once, or when the API server repairs the allocation of an
/// address after a restart.
fn events(live: &LiveCluster, service: &str) -> Result<Vec<Told>> {
    events_of(live, "Service", service)
}

/// The same about an object of any kind.
fn events_of(live: &LiveCluster, kind: &str, name: &str) -> Result<Vec<Told>> {
    let selector =
        format!("--field-selector=involvedObject.kind={kind},involvedObject.name={name}");
    let said = live.kubectl(&["get", "events", "-o", "json", &selector])?;
    let events: Value = serde_json::from_str(&said)?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut told: Vec<_> = events["items"]
        .as_array()
        .context("a list of Events")?
        .iter()
        .filter(|event| event["reportingComponent"] == "lb-agent")
        .map(|event| Told {
            kind: text(&event["type"]),
            reason: text(&event["reason"]),
            by: text(&event["reportingInstance"]),
            note: text(&event["message"]),
            times: event["series"]["count"].as_u64().unwrap_or(1),
        })
        .collect();
    told.sort_by(|one, other| one.by.cmp(&other.by));
    Ok(told)
}

fn wait_events(live: &LiveCluster, service: &str, count: usize) -> Result<Vec<Told>> {
    let told = eventually(|| {
        let told = events(live, service)?;
        ensure!(told.len() >= count, "{count} Events were expected: {told:#?}");
        Ok(told)
    })?;
    ensure!(told.len() == count, "{told:#?}");
    Ok(told)
}

/// As kubectl describe finds them: by the identity of the object too.
fn described(live: &LiveCluster, service: &str) -> Result<String> {
    live.kubectl(&["describe", "service", service])
}

fn with_sctp(name: &str, number: u8) -> Value {
    let mut object = service(name, number);
    let port = json!({"name": "signal", "protocol": "SCTP", "port": 81, "targetPort": TARGET});
    if let Some(ports) = object["spec"]["ports"].as_array_mut() {
        ports.push(port);
    }
    object
}

#[test]
fn sctp_is_refused_once_and_the_other_ports_work() -> Result<()> {
    let pods = Cluster::builder().pod(1, "a").pod(2, "b").pod(1, "c").pod(2, "d");
    let mut live = LiveCluster::start(pods, Options::default())?;
    live.serve(&["b"])?;
    live.start_agents(&[])?;
    // The nodes of endpoints share the reports: here are some on both.
    live.create_pods("other", &["c", "d"])?;
    live.create_service("other", 21)?;
    live.wait_backends("other", Some(2))?;
    live.create_pods("mixed", &["b"])?;
    live.plane.apply(&with_sctp("mixed", 20).to_string())?;
    let expected = |told: &[Told]| {
        let [told] = told else { bail!("not one of one node: {told:#?}") };
        let good = ["node1", "node2"].contains(&told.by.as_str())
            && told.kind == "Warning"
            && told.reason == "ProtocolNotSupported"
            && told.note.contains("SCTP")
            && told.times == 1;
        ensure!(good, "{told:#?}");
        Ok(())
    };
    expected(&wait_events(&live, "mixed", 1)?)?;
    let said = described(&live, "mixed")?;
    ensure!(said.contains("ProtocolNotSupported"), "{said}");
    live.wait_backends("mixed", Some(1))?;
    let answer = live.cluster.pod("a").tcp((cluster_ip(20).v4, PORT).into())?;
    ensure!(answer.name() == Some("b"), "{answer:?}");

    // A change that concerns something else is no reason to say it again, nor is a new list.
    live.kubectl(&[
        "patch",
        "service",
        "mixed",
        "-p",
        r#"{"spec":{"sessionAffinity":"ClientIP"}}"#,
    ])?;
    live.plane.stop_api_server()?;
    live.plane.start_api_server()?;
    live.plane.delete_pod("default", "b", Duration::ZERO)?;
    live.wait_backends("mixed", Some(0))?;
    expected(&events(&live, "mixed")?)?;

    // Another object of the same name is.
    live.kubectl(&["delete", "service", "mixed"])?;
    live.wait_backends("mixed", None)?;
    live.plane.apply(&with_sctp("mixed", 20).to_string())?;
    wait_events(&live, "mixed", 2)?;
    for node in [1, 2] {
        let log = live.agent(node)?.process().stderr();
        ensure!(!log.contains("not published"), "{log}");
    }
    Ok(())
}

#[test]
fn a_health_check_port_in_use_is_reported_and_tried_again() -> Result<()> {
    const TAKEN: u16 = 31_234;
    let mut live = LiveCluster::start(Cluster::builder().nodes(1).pod(1, "a"), Options::default())?;
    live.start_agents(&[])?;
    let node1 = live.cluster.node(1);
    let strange = node1.serve(&Serve::default().http(TAKEN))?;
    live.create_pods("checked", &["a"])?;
    let mut object = service("checked", 20);
    object["spec"]["type"] = json!("LoadBalancer");
    object["spec"]["externalTrafficPolicy"] = json!("Local");
    object["spec"]["healthCheckNodePort"] = json!(TAKEN);
    live.plane.apply(&object.to_string())?;
    let told = wait_events(&live, "checked", 1)?;
    let start = format!(
        "node node1 failed to start healthcheck \"default/checked\" on port {TAKEN}: listen tcp4 "
    );
    let good = told[0].reason == "FailedToStartServiceHealthcheck"
        && told[0].kind == "Warning"
        && told[0].note.starts_with(&start)
        && told[0].note.ends_with(": bind: address already in use");
    ensure!(good, "{told:#?}");
    let said = described(&live, "checked")?;
    ensure!(said.contains("FailedToStartServiceHealthcheck"), "{said}");
    drop(strange);
    let url = format!("http://{}/", node1.at(Family::V4, TAKEN));
    let curl = ["--retry", "5", "--retry-connrefused", &url];
    let answer = live.curl(&node1, &curl)?;
    ensure!(answer.contains("\t\"localEndpoints\": 1,\n"), "{answer}");
    ensure!(events(&live, "checked")?.len() == 1, "told more than once");
    Ok(())
}

#[test]
fn a_service_that_does_not_fit_is_reported_and_the_others_work() -> Result<()> {
    let mut live = LiveCluster::start(
        Cluster::builder().nodes(1).pod(1, "a").pod(1, "b"),
        Options::default(),
    )?;
    live.serve(&["b"])?;
    live.create_pods("fits", &["b"])?;
    live.create_service("fits", 20)?;
    // The Service `kubernetes` takes one, each dual-stack Service six.
    let kubeconfig = live.plane.agent_kubeconfig();
    let options = agent::Options::kubeconfig(&kubeconfig).arguments(&[
        "--max-services",
        "10",
        "--max-namespace-share",
        "100",
    ]);
    live.spawn_agent_with(1, &options)?.wait_ready()?;
    live.wait_backends("fits", Some(1))?;
    live.create_service("too-much", 21)?;
    let told = wait_events(&live, "too-much", 1)?;
    let good = told[0].reason == "MapFull" && told[0].note.contains("--max-services");
    ensure!(good, "{told:#?}");
    let said = described(&live, "too-much")?;
    ensure!(said.contains("MapFull"), "{said}");
    let (status, said) = live.agent(1)?.http(10256, "/healthz")?;
    ensure!(status == 200, "{status} {said}");
    let answer = live.cluster.pod("a").tcp((cluster_ip(20).v4, PORT).into())?;
    ensure!(answer.name() == Some("b"), "{answer:?}");
    live.kubectl(&["delete", "service", "fits"])?;
    live.wait_backends("too-much", Some(0))?;
    live.agent(1)?.wait_ready()
}

#[test]
fn a_node_is_told_once_that_kube_proxy_is_back() -> Result<()> {
    let mut live = LiveCluster::start(Cluster::builder().nodes(1), Options::default())?;
    live.start_agents(&[])?;
    let node = live.cluster.node(1);
    let told = |live: &LiveCluster| -> Result<Vec<Told>> {
        let mut told = events_of(live, "Node", "node1")?;
        told.retain(|told| told.reason == "KubeProxyIsBack");
        Ok(told)
    };
    let table = |verb: &str| -> Result<()> {
        let mut command = Command::new("nft");
        command.args([verb, "table", "ip", "kube-proxy"]);
        node.output(command, PATIENCE).map(drop)
    };
    let count = |live: &LiveCluster, wanted: u64| {
        eventually(|| {
            let told = told(live)?;
            let times: u64 = told.iter().map(|told| told.times).sum();
            ensure!(times == wanted, "{wanted} times expected: {told:#?}");
            Ok(told)
        })
    };
    ensure!(told(&live)?.is_empty(), "told before it is so");
    table("add")?;
    let told = count(&live, 1)?;
    ensure!(told[0].kind == "Warning" && told[0].by == node.name(), "{told:#?}");
    let words = ["kube-proxy's rules are back", "lb-agent cleanup --kube-proxy"];
    ensure!(words.iter().all(|word| told[0].note.contains(word)), "{told:#?}");
    // Again only if it was gone in between.
    table("delete")?;
    live.wait_log(1, "kube-proxy's rules are gone")?;
    table("add")?;
    count(&live, 2).map(drop)
}
