//! Control groups of a cluster: one directory of the same name in every hierarchy.
//!
//! Processes join the one of version 2, where connect-time hooks are attached and where
//! everything that a cluster started can be found and killed. kubelet and runc want theirs in
//! each hierarchy of version 1, where the kernel has them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::plan::Plan;
use crate::harness::netns::topology::cgroup::{
    Cgroup, VERSION_1, mount_point, mount_points, remove_tree,
};

/// The weight of the whole cluster; that of a process outside is 1024.
const SHARES: &str = "8192";

/// Makes the directories of a part of the cluster, and returns the one of version 2.
pub(super) fn create(plan: &Plan, of: &str) -> Result<Cgroup> {
    let name = plan.cgroup(of);
    for root in mount_points(VERSION_1)? {
        let mut directory = root.clone();
        for part in Path::new(&name) {
            let parent = directory.clone();
            directory.push(part);
            fs::create_dir_all(&directory)
                .with_context(|| format!("cannot make cgroup {}", directory.display()))?;
            inherit(&parent, &directory)?;
        }
        // Beside a build on the same machine, a cluster is no more than one process by default.
        let shares = root.join(plan.name()).join("cpu.shares");
        if shares.exists() {
            fs::write(&shares, SHARES)
                .with_context(|| format!("cannot write {}", shares.display()))?;
        }
    }
    Cgroup::create(&name)
}

/// A cpuset without CPUs and memory nodes takes no process: both are the parent's.
fn inherit(parent: &Path, directory: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if let Ok(value) = fs::read_to_string(parent.join(file)) {
            fs::write(directory.join(file), value.trim())
                .with_context(|| format!("cannot write {}", directory.join(file).display()))?;
        }
    }
    Ok(())
}

/// Kills every process of the cluster and removes its directories.
pub(super) fn remove(plan: &Plan) -> Result<()> {
    Cgroup::create(plan.name())?.remove();
    for root in mount_points(VERSION_1)? {
        let directory = root.join(plan.name());
        if directory.exists() {
            remove_tree(&directory)
                .with_context(|| format!("cannot remove cgroup {}", directory.display()))?;
        }
    }
    Ok(())
}

/// Whether a process of the cluster runs.
pub(super) fn is_populated(plan: &Plan) -> Result<bool> {
    let events = mount_point()?.join(plan.name()).join("cgroup.events");
    Ok(fs::read_to_string(events).is_ok_and(|events| events.contains("populated 1")))
}
