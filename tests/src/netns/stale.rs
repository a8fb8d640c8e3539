//! Removes what an earlier run that was killed left behind.
//!
//! Every name starts with `lb-PID-`; what belongs to a process that is no more is stale. A live
//! process is never touched, even where the kernel gave the number to another program.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;

use anyhow::Result;

use super::cgroup::{self, Cgroup};
use super::namespace;

/// Where per-node BPF directories are made.
pub(super) const BPF_FS: &str = "/sys/fs/bpf";

/// Sweeps once in the life of the process, before its first cluster.
pub(super) fn sweep() -> Result<()> {
    static ONCE: Once = Once::new();
    let cgroups = cgroup::mount_point()?;
    ONCE.call_once(|| {
        for path in stale(&cgroups) {
            Cgroup::at(path).remove();
        }
        for path in stale(Path::new(BPF_FS)) {
            fs::remove_dir_all(path).ok();
        }
        for path in stale(Path::new(namespace::DIRECTORY)) {
            if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
                namespace::remove(name);
            }
        }
    });
    Ok(())
}

fn stale(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .to_str()
                .and_then(owner)
                .is_some_and(is_dead)
        })
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

/// Names of our own number are stale too: the sweep comes before we make any.
fn is_dead(pid: u32) -> bool {
    pid == std::process::id() || !Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_a_cluster_have_an_owner() {
        assert_eq!(owner("lb-12-0-node1"), Some(12));
        assert_eq!(owner("lb-12-0"), Some(12));
        for name in ["lb", "lb-12", "lb-x-0-node1", "lb-12-node1", "other-12-0"] {
            assert_eq!(owner(name), None, "{name}");
        }
    }
}
