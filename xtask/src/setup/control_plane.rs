//! The Kubernetes programs that the tests start, built from the Go modules in
//! `tests/controlplane`, which name their versions.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::go::{Kind, Module, Program};
use crate::run;
use crate::workspace::Workspace;

const SOURCE: &str = "tests/controlplane";
const KUBERNETES: &str = "k8s.io/kubernetes";

/// What the tier `cluster` starts. etcd's own is no main package of the module that its server
/// is published in, so `tests/controlplane` has one.
const CONTROL_PLANE: Module = Module {
    source: SOURCE,
    made_for: KUBERNETES,
    name: "controlplane",
    takes: "five minutes",
    programs: &[
        Program::new("etcd", "./etcd"),
        Program::new("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
        Program::new("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
        Program::new("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
        Program::new("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
    ],
};

/// What real nodes need beside it, and the program of the pods on them.
const NODES: Module = Module {
    programs: &[
        Program::new("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
        Program::new("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
        Program::new("agnhost", "k8s.io/kubernetes/test/images/agnhost"),
        Program::new(
            "regression-issue-74839",
            "k8s.io/kubernetes/test/images/regression-issue-74839",
        ),
    ],
    takes: "four minutes",
    ..CONTROL_PLANE
};

/// Upstream's end-to-end tests, and the program that runs them side by side.
const END_TO_END: Module = Module {
    programs: &[
        Program::new("ginkgo", "github.com/onsi/ginkgo/v2/ginkgo"),
        Program { name: "e2e.test", package: "k8s.io/kubernetes/test/e2e", kind: Kind::Tests },
    ],
    takes: "four minutes",
    ..CONTROL_PLANE
};

/// The DNS server of clusters.
const COREDNS: Module = Module {
    source: "tests/controlplane/coredns",
    made_for: "github.com/coredns/coredns",
    name: "coredns",
    takes: "two minutes",
    programs: &[Program::new("coredns", ".")],
};

/// A network of pods with routes or an overlay between nodes, and its CNI plug-in.
const FLANNEL: Module = Module {
    source: "tests/controlplane/flannel",
    made_for: "github.com/flannel-io/flannel",
    name: "flannel",
    takes: "a minute",
    programs: &[Program {
        name: "flanneld",
        package: "github.com/flannel-io/flannel",
        kind: Kind::WithC,
    }],
};
const FLANNEL_CNI: Module = Module {
    source: "tests/controlplane/flannel-cni",
    made_for: "github.com/containernetworking/plugins",
    name: "flannel-cni",
    takes: "a minute",
    programs: &[Program::new(
        "flannel",
        "github.com/containernetworking/plugins/plugins/meta/flannel",
    )],
};

/// What renders the chart.
const HELM: Module = Module {
    source: "tests/controlplane/helm",
    made_for: "helm.sh/helm/v3",
    name: "helm",
    takes: "two minutes",
    programs: &[Program::new("helm", "helm.sh/helm/v3/cmd/helm")],
};

/// What checks the alert rules and runs their tests.
const PROMTOOL: Module = Module {
    source: "tests/controlplane/promtool",
    made_for: "github.com/prometheus/prometheus",
    name: "promtool",
    takes: "four minutes",
    programs: &[Program::new("promtool", "github.com/prometheus/prometheus/cmd/promtool")],
};

/// The control plane, Helm and promtool, for the tier `cluster`.
pub(super) fn ensure(workspace: &Workspace) -> Result<bool> {
    let mut changed = HELM.ensure(workspace)?;
    changed |= PROMTOOL.ensure(workspace)?;
    Ok(changed | ensure_control_plane(workspace)?)
}

fn ensure_control_plane(workspace: &Workspace) -> Result<bool> {
    if env::var_os("KUBEBUILDER_ASSETS").is_some_and(|dir| !dir.is_empty()) {
        return Ok(false);
    }
    CONTROL_PLANE.ensure(workspace)
}

/// The programs of clusters with real nodes.
pub(super) fn ensure_nodes(workspace: &Workspace) -> Result<bool> {
    let mut changed = NODES.ensure(workspace)?;
    changed |= COREDNS.ensure(workspace)?;
    changed |= FLANNEL.ensure(workspace)?;
    changed |= FLANNEL_CNI.ensure(workspace)?;
    Ok(changed)
}

/// Upstream's end-to-end tests.
pub(super) fn ensure_end_to_end(workspace: &Workspace) -> Result<bool> {
    END_TO_END.ensure(workspace)
}

/// The version of Kubernetes.
pub(super) fn kubernetes(workspace: &Workspace) -> Result<String> {
    NODES.version(workspace)
}

/// Where the Kubernetes programs of nodes and pods are.
pub(super) fn programs(workspace: &Workspace) -> Result<PathBuf> {
    NODES.dir(workspace)
}

/// Where kube-proxy is: if `KUBEBUILDER_ASSETS` names the control plane, it is there.
pub(super) fn kube_proxy(workspace: &Workspace) -> Result<PathBuf> {
    let assets = env::var_os("KUBEBUILDER_ASSETS").filter(|dir| !dir.is_empty());
    let directory = match assets {
        Some(directory) => PathBuf::from(directory),
        None => CONTROL_PLANE.dir(workspace)?,
    };
    Ok(directory.join("kube-proxy"))
}

/// Where CoreDNS is, and its version.
pub(super) fn coredns(workspace: &Workspace) -> Result<(PathBuf, String)> {
    Ok((COREDNS.dir(workspace)?, COREDNS.version(workspace)?))
}

/// flanneld and its version, and the CNI plug-in.
pub(super) fn flannel(workspace: &Workspace) -> Result<(PathBuf, String, PathBuf)> {
    let daemon = FLANNEL.dir(workspace)?.join("flanneld");
    let plugin = FLANNEL_CNI.dir(workspace)?.join("flannel");
    Ok((daemon, FLANNEL.version(workspace)?, plugin))
}

/// Where Go keeps the source of Kubernetes.
pub(super) fn source(workspace: &Workspace) -> Result<PathBuf> {
    let directory = workspace.root().join(SOURCE);
    let mut download = workspace.command("go");
    download.current_dir(&directory).args(["mod", "download", KUBERNETES]);
    run::logged(&mut download, &workspace.log("go-source"))?;
    let mut list = workspace.command("go");
    list.current_dir(&directory);
    list.args(["list", "-m", "-f", "{{.Dir}}", KUBERNETES]);
    let answer = run::answer(&mut list).filter(|dir| !dir.is_empty());
    answer.map(PathBuf::from).with_context(|| {
        format!("`go list -m {KUBERNETES}` in {SOURCE} does not say where its source is")
    })
}
