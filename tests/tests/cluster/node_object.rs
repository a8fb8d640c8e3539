//! What the agent does with its own Node object: a startup taint, and a name that is none.

use anyhow::{Context, Result, ensure};
use lb_tests::harness::controlplane::Options;
use lb_tests::harness::controlplane::live::LiveCluster;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::wait::eventually;
use serde_json::Value;

const RIGHT: &str = include_str!("../../../manifests/components/startup-taint/rbac.yaml");
const COMPONENT: &str =
    include_str!("../../../manifests/components/startup-taint/kustomization.yaml");
/// The taint that the component names.
const TAINT: &str = "lb-agent/not-ready";

fn world() -> Result<LiveCluster> {
    LiveCluster::start(Cluster::builder().nodes(1).pod(1, "a"), Options::default())
}

/// Key and effect of the Node's taints, without those of the API server itself, which no
/// kubelet takes away here; sorted.
fn taints(live: &LiveCluster) -> Result<Vec<(String, String)>> {
    let node = live.kubectl(&["get", "node", "node1", "-o", "json"])?;
    let node: Value = serde_json::from_str(&node)?;
    let text = |taint: &Value, field: &str| taint[field].as_str().unwrap_or_default().to_owned();
    let all = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
    let all = all.iter().map(|taint| (text(taint, "key"), text(taint, "effect")));
    let mut all: Vec<_> = all.filter(|(key, _)| !key.starts_with("node.kubernetes.io/")).collect();
    all.sort();
    Ok(all)
}

fn wait_taints(live: &LiveCluster, expected: &[(&str, &str)]) -> Result<()> {
    let expected: Vec<_> =
        expected.iter().map(|(key, effect)| (key.to_string(), effect.to_string())).collect();
    eventually(|| {
        let found = taints(live)?;
        ensure!(found == expected, "taints {found:?}");
        Ok(())
    })
}

#[test]
fn the_startup_taint_goes_once_services_work_and_other_taints_stay() -> Result<()> {
    ensure!(COMPONENT.contains(TAINT), "the component names another taint");
    let mut live = world()?;
    let [no_schedule, no_execute] =
        ["NoSchedule", "NoExecute"].map(|effect| format!("{TAINT}=:{effect}"));
    live.kubectl(&["taint", "node", "node1", "other=x:NoSchedule", &no_schedule, &no_execute])?;
    // Without Services nothing is programmed, and so nothing removed.
    let rbac = include_str!("../../../manifests/base/rbac.yaml");
    live.plane.apply(&rbac.replace("services, ", "nothing, "))?;
    live.plane.apply(RIGHT)?;
    live.spawn_agent(1, &["--startup-taint", TAINT])?;
    live.wait_log(1, "403 services is forbidden")?;
    ensure!(taints(&live)?.len() == 3, "removed before anything was programmed");
    live.plane.apply(rbac)?;
    wait_taints(&live, &[("other", "NoSchedule")])?;
    let log = live.agent(1)?.process().stderr();
    let place = |text: &str| log.find(text).with_context(|| format!("no {text:?} in\n{log}"));
    ensure!(place(" programmed services=")? < place("startup taint removed")?, "{log}");

    // A Node that registers again has it again.
    live.kubectl(&["taint", "node", "node1", &no_schedule, "more=y:NoExecute"])?;
    wait_taints(&live, &[("more", "NoExecute"), ("other", "NoSchedule")])?;

    // Without the right it says which, and goes on trying.
    live.take_agent(1)?.terminate()?;
    let role = "clusterrolebinding/lb-agent-startup-taint";
    live.kubectl(&["delete", role])?;
    live.kubectl(&["taint", "node", "node1", &no_execute])?;
    live.start_agent(1, &["--startup-taint", TAINT])?;
    live.wait_log(1, "manifests/components/startup-taint")?;
    live.plane.apply(RIGHT)?;
    wait_taints(&live, &[("more", "NoExecute"), ("other", "NoSchedule")])
}

#[test]
fn a_wrong_node_name_is_told_with_the_right_one() -> Result<()> {
    let mut live = world()?;
    let addresses = live.cluster.node(1).addresses();
    let addresses = [addresses.v4.into(), addresses.v6.into()];
    live.kubectl(&["delete", "node", "node1"])?;
    live.plane.create_node("node1.example.com", &addresses)?;
    live.spawn_agent(1, &[])?;
    live.wait_log(1, "no Node is called \\\"node1\\\"")?;
    let log = live.agent(1)?.process().stderr();
    ensure!(log.contains("give --hostname-override node1.example.com"), "{log}");
    let (status, body) = live.agent(1)?.http(10256, "/healthz")?;
    ensure!(status == 503 && body.contains("\"nodeEligible\":false"), "{status} {body}");

    live.kubectl(&["delete", "node", "node1.example.com"])?;
    live.plane.create_node("node1", &addresses)?;
    live.agent(1)?.wait_ready()
}
