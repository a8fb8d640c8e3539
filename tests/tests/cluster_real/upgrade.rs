//! Agents that come and go under load: a rolling update and its rollback, pods that are deleted,
//! nodes that are drained. Nothing is lost, because the datapath stays while no agent runs.

use anyhow::{Context, Result, ensure};
use lb_tests::harness::wait::eventually;

use crate::Test;
use crate::traffic::{self, Kind, SERVERS, Traffic};
use crate::world::{AGENTS, World, nodes, of_node};

pub(crate) const TESTS: &[Test] = &[
    ("upgrade::a_rolling_update_and_its_rollback_lose_nothing", rolled),
    ("upgrade::deleted_agent_pods_lose_nothing", deleted),
    ("upgrade::drained_nodes_lose_no_connection", drained),
];

/// The name of the agent's image under which the update finds it.
const NEXT: &str = "localhost/lb-agent:next";

fn rolled(world: &World) -> Result<()> {
    let current = world.real.image("localhost/lb-agent:")?;
    for node in world.real.nodes() {
        node.output("ctr", &["-n", "k8s.io", "images", "tag", "--force", &current, NEXT])?;
    }
    traffic::set_up(world)?;
    world.wait_endpoints(SERVERS, 3)?;
    let traffic = Traffic::start(world, &Kind::ALL)?;
    let image = |image: &str| format!("*={image}");
    let set = ["-n", "kube-system", "set", "image", "daemonset/lb-agent"];
    let kubectl = world.real.kubectl();
    kubectl.run(&[&set[..], &[&*image(NEXT)]].concat())?;
    world.roll_out_agents()?;
    ensure_image(world, NEXT)?;
    kubectl.run(&["-n", "kube-system", "rollout", "undo", "daemonset/lb-agent"])?;
    world.roll_out_agents()?;
    ensure_image(world, &current)?;
    traffic.finish("rolling update and rollback")
}

/// Every agent runs from this image.
fn ensure_image(world: &World, image: &str) -> Result<()> {
    let pods = agents(world)?;
    ensure!(pods.len() == nodes().count(), "{} agents", pods.len());
    for pod in pods {
        let found = pod["spec"]["containers"][0]["image"].as_str();
        ensure!(found == Some(image), "an agent runs from {found:?} instead of {image}");
    }
    Ok(())
}

/// The agents' pods that do not terminate.
fn agents(world: &World) -> Result<Vec<serde_json::Value>> {
    let selector = ["pods", "-n", "kube-system", "-l", AGENTS];
    let pods = world.real.kubectl().get(&selector)?;
    let pods = pods["items"].as_array().cloned().unwrap_or_default();
    Ok(pods.into_iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).collect())
}

fn deleted(world: &World) -> Result<()> {
    traffic::set_up(world)?;
    world.wait_endpoints(SERVERS, 3)?;
    let traffic = Traffic::start(world, &Kind::ALL)?;
    for pod in agents(world)? {
        let name = pod["metadata"]["name"].as_str().context("a pod without a name")?;
        // At once, as after a crash of the node's runtime.
        let delete = ["-n", "kube-system", "delete", "pod", name, "--grace-period=0", "--force"];
        world.real.kubectl().run(&delete)?;
        eventually(|| {
            ensure!(agents(world)?.len() == nodes().count(), "no agent takes its place");
            world.roll_out_agents()
        })?;
    }
    traffic.finish("deleted agent pods")
}

fn drained(world: &World) -> Result<()> {
    traffic::set_up(world)?;
    world.wait_endpoints(SERVERS, 3)?;
    // Connections that stay end with their pod. So does a flow of datagrams, for its endpoint is
    // there until the kubelet has seen the pod's end.
    let traffic = Traffic::start(world, &[Kind::NewConnections])?;
    for node in [1, 3] {
        let options = ["--ignore-daemonsets", "--delete-emptydir-data", "--timeout=120s"];
        of_node(world, &["drain"], node, &options)?;
        world.roll_out(&format!("deployment/{SERVERS}"))?;
        of_node(world, &["uncordon"], node, &[])?;
    }
    traffic.finish("drained nodes")
}
