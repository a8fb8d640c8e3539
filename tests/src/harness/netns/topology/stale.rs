//! Removes what an earlier run that was killed left behind.
//!
//! Every name starts with `lb-PID-`; what belongs to a process that is no more is stale. A running
//! process is never touched, even where the kernel gave the number to another program.

use std::path::{Path, PathBuf};
use std::sync::Once;
use std::{env, fs};

use anyhow::Result;

use super::cgroup::{self, Cgroup};
use super::namespace;

/// Where per-node BPF directories are made.
pub(crate) const BPF_FS: &str = "/sys/fs/bpf";

/// Sweeps once in the life of the process, before its first cluster.
pub(crate) fn sweep() -> Result<()> {
    static ONCE: Once = Once::new();
    let cgroups = cgroup::mount_point()?;
    ONCE.call_once(|| remove_stale(&cgroups));
    Ok(())
}

fn remove_stale(cgroups: &Path) {
    // Names of our own number are stale too: the sweep comes before the first cluster.
    let is_stale = |pid| pid == std::process::id() || is_dead(pid);
    for path in owned_by(cgroups, is_stale) {
        Cgroup::at(path).remove();
    }
    for path in owned_by(Path::new(BPF_FS), is_stale) {
        fs::remove_dir_all(path).ok();
    }
    for path in owned_by(Path::new(namespace::DIRECTORY), is_stale) {
        if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
            namespace::remove(name);
        }
    }
    // Manifests may be older than the first cluster; their names never collide.
    for path in owned_by(&env::temp_dir(), is_dead) {
        fs::remove_dir_all(path).ok();
    }
}

fn owned_by(directory: &Path, matches: impl Fn(u32) -> bool) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().and_then(owner).is_some_and(&matches))
        .map(|entry| entry.path())
        .collect()
}

/// The process that a name belongs to: `lb-PID-NUMBER`, alone or before another dash.
fn owner(name: &str) -> Option<u32> {
    let (pid, rest) = name.strip_prefix("lb-")?.split_once('-')?;
    let number = rest.split('-').next()?;
    number.parse::<u32>().ok()?;
    pid.parse().ok()
}

fn is_dead(pid: u32) -> bool {
    !Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::harness::netns::topology::namespace::Netns;

    #[test]
    fn only_names_of_a_cluster_have_an_owner() {
        assert_eq!(owner("lb-12-0-node1"), Some(12));
        assert_eq!(owner("lb-12-0"), Some(12));
        for name in ["lb", "lb-12", "lb-x-0-node1", "lb-12-node1", "other-12-0"] {
            assert_eq!(owner(name), None, "{name}");
        }
    }

    #[test]
    fn what_a_dead_process_left_is_removed_and_what_a_live_one_has_is_not() {
        let mut child = Command::new("true").spawn().expect("a process");
        let dead = format!("lb-{}-0", child.id());
        child.wait().expect("its end");
        let live = format!("lb-{}-0", std::os::unix::process::parent_id());
        let cgroups = cgroup::mount_point().expect("cgroup v2");
        let kept = (
            Cgroup::create(&live).expect("a cgroup"),
            Netns::create(&format!("{live}-node1")).expect("a namespace"),
        );
        Cgroup::create(&dead).and_then(|tree| tree.child("node1")).expect("a cgroup");
        let left = Netns::create(&format!("{dead}-node1")).expect("a namespace");
        let bpf = Path::new(BPF_FS).join(format!("{dead}-node1"));
        fs::create_dir_all(bpf.join("v1")).expect("a BPF directory");
        remove_stale(&cgroups);
        let there = [kept.0.path().exists(), kept.1.path().exists()];
        kept.0.remove();
        assert_eq!(there, [true, true], "of a live process");
        let gone = [!cgroups.join(&dead).exists(), !left.path().exists(), !bpf.exists()];
        assert_eq!(gone, [true; 3], "of a dead process");
    }
}
