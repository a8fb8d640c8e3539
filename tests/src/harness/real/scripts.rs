//! Small programs in the cluster's directory, by which a person gets into it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::Cluster;
use super::fabric::{CONTROL, OUTSIDE};
use super::plan::Plan;

/// Writes them: `kubectl`, `outside` and one for each node, the last three followed by a program
/// to run there.
pub(super) fn write(cluster: &Cluster) -> Result<()> {
    let plan = cluster.plan();
    let enter = |namespace: &str| format!("nsenter --net=/run/netns/{}", plan.namespace(namespace));
    let mut scripts = vec![
        (
            KUBECTL.to_owned(),
            format!("{} {}", enter(CONTROL), cluster.kubectl().command_line().join(" ")),
        ),
        (OUTSIDE.to_owned(), enter(OUTSIDE)),
        (CONTROL_NAMESPACE.to_owned(), enter(CONTROL)),
    ];
    for node in cluster.nodes() {
        let line = format!("nsenter --target={} --mount --uts --net", node.holder());
        scripts.push((node.name(), line));
    }
    for (name, line) in scripts {
        let path = script(plan, &name);
        let directory = path.parent().context("no directory")?;
        fs::create_dir_all(directory)?;
        fs::write(&path, format!("#!/bin/sh\nexec {line} \"$@\"\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// The one that is kubectl with every right.
pub const KUBECTL: &str = "kubectl";
/// The one that runs a program beside the API server.
pub const CONTROL_NAMESPACE: &str = "control-plane";

/// Where one of them is.
pub fn script(plan: &Plan, name: &str) -> PathBuf {
    plan.directory().join("bin").join(name)
}
