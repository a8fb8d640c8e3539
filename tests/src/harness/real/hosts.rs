//! Nodes, pods and the client outside as places where a test's clients run.
//!
//! A pod is a real one: its namespace and cgroup are those that kubelet, containerd and the CNI
//! plug-in made. The client is a process of the test that enters them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::plan::{self, node_names};
use super::{Cluster, fabric};
use crate::harness::netns::actors::agent::lb_agent;
use crate::harness::netns::actors::host::Host;
use crate::harness::netns::topology::cgroup::{Cgroup, mount_point};
use crate::harness::netns::topology::namespace::Netns;
use crate::harness::netns::topology::plan::Addresses;
use crate::harness::real::node::Node;

impl Cluster {
    /// Processes of a node; nodes count from 1. Logs of clients are in `logs`.
    ///
    /// # Errors
    /// The node is gone.
    pub fn host_of_node(&self, number: u8, logs: &Path) -> Result<Host> {
        let node = self.node(number);
        let netns = Netns::open(node.netns().name())?;
        let addresses = plan::node(number);
        Ok(Host::adopt(&node.name(), netns, node.cgroup().clone(), addresses, logs.to_owned()))
    }

    /// The client outside, which has no route to pods and ClusterIPs.
    ///
    /// # Errors
    /// No permission.
    pub fn host_outside(&self, logs: &Path) -> Result<Host> {
        let netns = Netns::open(self.outside().name())?;
        let cgroup = Cgroup::create(&self.plan().cgroup(fabric::OUTSIDE))?;
        Ok(Host::adopt(fabric::OUTSIDE, netns, cgroup, plan::outside(), logs.to_owned()))
    }

    /// A running pod.
    ///
    /// # Errors
    /// It does not run.
    pub fn host_of_pod(&self, namespace: &str, name: &str, logs: &Path) -> Result<Host> {
        let pod = self.kubectl().get(&["pod", name, "-n", namespace])?;
        let node = pod["spec"]["nodeName"].as_str().context("the pod has no node yet")?;
        let number = node_names().iter().position(|other| other == node);
        let number = number.with_context(|| format!("unknown node {node}"))?;
        let node = &self.nodes()[number];
        let id = pod["status"]["containerStatuses"][0]["containerID"].as_str();
        let id = id.and_then(|id| id.strip_prefix("containerd://"));
        let process = process_of(node, id.context("the pod has no container yet")?)?;
        let cgroup = Cgroup::at(cgroup_of(process)?);
        let addresses = addresses_of(&pod)?;
        let netns = Netns::of_process(process)?;
        Ok(Host::adopt(name, netns, cgroup, addresses, logs.to_owned()))
    }
}

impl Node {
    /// Runs a command of `lb-agent` on the node, beside its pods, and returns what it prints.
    ///
    /// # Errors
    /// It fails; with what it said.
    pub fn lb_agent(&self, arguments: &[&str]) -> Result<String> {
        let mut command = lb_agent()?;
        command.args(arguments);
        let output = self.run(command)?;
        ensure!(
            output.status.success(),
            "`lb-agent {}` on {}: {}: {}",
            arguments.join(" "),
            self.name(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// The first process of a container.
fn process_of(node: &Node, container: &str) -> Result<u32> {
    let tasks = node.output("ctr", &["-n", "k8s.io", "tasks", "list"])?;
    let mut lines = tasks.lines().map(str::split_whitespace);
    let process = lines.find_map(|mut words| {
        (words.next() == Some(container)).then(|| words.next()?.parse().ok())?
    });
    process.with_context(|| format!("container {container} does not run on {}", node.name()))
}

/// The cgroup of version 2 of a process: the line `0::PATH`.
fn cgroup_of(process: u32) -> Result<PathBuf> {
    let lines = fs::read_to_string(format!("/proc/{process}/cgroup"))?;
    let path = lines.lines().find_map(|line| line.strip_prefix("0::/"));
    Ok(mount_point()?.join(path.with_context(|| format!("no cgroup v2 in {lines:?}"))?))
}

fn addresses_of(pod: &Value) -> Result<Addresses> {
    let ips = pod["status"]["podIPs"].as_array().into_iter().flatten();
    let ips: Vec<&str> = ips.filter_map(|ip| ip["ip"].as_str()).collect();
    let v4 = ips.iter().find_map(|ip| ip.parse().ok());
    let v6 = ips.iter().find_map(|ip| ip.parse().ok());
    let missing = || format!("the pod has not an address of each family: {ips:?}");
    Ok(Addresses { v4: v4.with_context(missing)?, v6: v6.with_context(missing)? })
}
