//! containerd of a node, and the images in it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::cni;
use super::daemon::Daemon;
use super::node::Node;
use crate::harness::wait::eventually;

/// Where it listens, as the node sees it.
pub(super) const SOCKET: &str = "/run/containerd/containerd.sock";

const CONFIGURATION: &str = "/etc/containerd/config.toml";

/// Configures and starts containerd; returns when it answers.
pub(super) fn start(node: &Node, pause_image: &str) -> Result<Daemon> {
    node.write(CONFIGURATION, &configuration(pause_image))?;
    let mut command = Command::new("containerd");
    command.args(["--config", CONFIGURATION]);
    let mut daemon = node.daemon("containerd", command)?;
    let answered = eventually(|| {
        daemon.check_running()?;
        node.output("ctr", &["--connect-timeout", "1s", "version"])
    });
    answered.with_context(|| daemon.log_tail())?;
    Ok(daemon)
}

/// Imports the images of an archive, so that kubelet finds them there.
pub(super) fn import(node: &Node, archive: &Path) -> Result<()> {
    let archive = archive.to_str().with_context(|| format!("{archive:?} is no text"))?;
    node.output("ctr", &["-n", "k8s.io", "images", "import", "--digests=false", archive]).map(drop)
}

/// Names of the images that the node has.
pub(super) fn images(node: &Node) -> Result<Vec<String>> {
    let names = node.output("ctr", &["-n", "k8s.io", "images", "list", "-q"])?;
    Ok(names.lines().map(str::to_owned).collect())
}

/// Keeps kubelet from removing images when the machine's disk fills.
pub(super) fn pin(node: &Node, images: &[String]) -> Result<()> {
    for image in images {
        let label = "io.cri-containerd.pinned=pinned";
        node.output("ctr", &["-n", "k8s.io", "images", "label", image, label])?;
    }
    ensure!(!images.is_empty(), "{} has no image", node.name());
    Ok(())
}

/// `restrict_oom_score_adj`, because nothing here may lower a score below its own.
fn configuration(pause_image: &str) -> String {
    format!(
        r#"version = 2
oom_score = 0
[grpc]
address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause_image}"
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{}"
conf_dir = "{}"
"#,
        cni::PLUGINS,
        cni::CONFIGURATION
    )
}
