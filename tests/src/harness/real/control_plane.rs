//! The control plane of a cluster: [`ControlPlane`] in a process that stays.

use std::io::{BufRead, BufReader, Write, stdout};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::cgroups;
use super::daemon::{Daemon, Namespaces};
use super::fabric::{CONTROL, Fabric};
use super::kubectl::Kubectl;
use super::plan::{self, NODES, Plan, node_name, node_names};
use crate::harness::controlplane::{ControlPlane, Options};
use crate::harness::netns::actors::client::program;
use crate::harness::netns::topology::plan::cidr;

/// The argument that makes `lb-cluster` the control plane of the cluster that is named next.
pub const COMMAND: &str = "control-plane";

/// What the process says when the API server and the controllers run.
const READY: &str = "ready";

/// Starts the process and returns when it is ready.
pub(super) fn start(plan: &Plan, fabric: &Fabric) -> Result<Daemon> {
    let cgroup = cgroups::create(plan, CONTROL)?;
    let mut command = Command::new(program("LB_CLUSTER", "lb-cluster", &[])?);
    command.args([COMMAND, "--name", plan.name()]);
    let namespaces = Namespaces { network: fabric.control.file(), holder: None, unshare: false };
    let log = plan.directory().join("control-plane.log");
    let mut daemon =
        Daemon::start("the control plane", command, (&namespaces, &cgroup), &log, true)?;
    let output = daemon.output().context("the control plane has no output")?;
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    ensure!(line.trim() == READY, "the control plane did not start\n{}", daemon.log_tail());
    Ok(daemon)
}

/// Is the control plane, until it is killed.
///
/// # Errors
/// A program of it does not start.
pub fn run(plan: &Plan) -> Result<()> {
    let options =
        Options { directory: Some(plan.directory()), kubelets: node_names(), ..Options::default() };
    let namespace = format!("/run/netns/{}", plan.namespace(CONTROL));
    let address = plan::control_plane().v4.into();
    let mut plane = ControlPlane::start(namespace.as_ref(), address, options)?;
    writeln!(stdout(), "{READY}")?;
    loop {
        // Says in the log when a program ends, and takes the others with it.
        plane.check_running()?;
        thread::sleep(std::time::Duration::from_secs(5));
    }
}

/// Creates the Nodes with the address ranges of their pods; kubelets adopt them.
pub(super) fn create_nodes(kubectl: &Kubectl) -> Result<()> {
    let nodes: Vec<Value> = (1..=NODES)
        .map(|number| {
            let pods = cidr::pods_of_node(number).map(|net| net.to_string());
            json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": node_name(number)},
                "spec": {"podCIDR": pods[0], "podCIDRs": pods},
            })
        })
        .collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": nodes});
    kubectl.apply(&list.to_string())
}
