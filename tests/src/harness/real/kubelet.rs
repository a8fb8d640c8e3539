//! kubelet of a node.

use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};

use super::containerd::SOCKET;
use super::daemon::Daemon;
use super::node::Node;
use super::plan::{self, CLUSTER_DNS, Plan};
use crate::harness::controlplane::programs::program;
use crate::harness::netns::topology::plan::Addresses;

const CONFIGURATION: &str = "/etc/kubernetes/kubelet.json";

/// Configures and starts kubelet; it registers its Node when it is ready.
pub(super) fn start(plan: &Plan, node: &Node) -> Result<Daemon> {
    node.write(CONFIGURATION, &configuration(plan, node).to_string())?;
    let Addresses { v4, v6 } = plan::node(node.number());
    let mut command = Command::new(program("kubelet")?);
    command
        .args(["--config", CONFIGURATION])
        .arg("--kubeconfig")
        .arg(plan.kubeconfig(&node.name()))
        .args(["--hostname-override", &node.name()])
        .arg(format!("--node-ip={v4},{v6}"));
    node.daemon("kubelet", command)
}

/// Thresholds of the disk are low and images stay, because the disk is the machine's. The API
/// server asks without a name: there is one user here.
fn configuration(plan: &Plan, node: &Node) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}", plan.cgroup(&node.name())),
        "failCgroupV1": false,
        "clusterDNS": [CLUSTER_DNS],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": format!("unix://{SOCKET}"),
        "evictionHard": {
            "imagefs.available": "1%",
            "memory.available": "50Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
        },
        "failSwapOn": false,
        "imageGCHighThresholdPercent": 100,
        "oomScoreAdj": 0,
        "resolvConf": "/etc/resolv.conf",
        "serializeImagePulls": false,
    })
}
