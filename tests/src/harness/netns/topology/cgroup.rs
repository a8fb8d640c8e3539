//! cgroup v2 directories: one tree per cluster, below it nodes, agents and pods.
//!
//! Which connect-time hook a process meets depends on its cgroup, so every process of a test is
//! in the one that a kubelet would have put it in.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::harness::wait::PATIENCE;

/// The file system type of version 1, of which each controller has a hierarchy.
pub(in crate::harness) const VERSION_1: &str = "cgroup";
/// The file system type of version 2.
const VERSION_2: &str = "cgroup2";

/// Where cgroup v2 is mounted, from /proc/self/mountinfo.
///
/// # Errors
/// It is not mounted.
pub fn mount_point() -> Result<PathBuf> {
    let mut mounts = mount_points(VERSION_2)?.into_iter();
    mounts.next().context("no cgroup v2 mount in /proc/self/mountinfo")
}

/// Where file systems of this type are mounted: [`VERSION_1`] or [`VERSION_2`].
pub(in crate::harness) fn mount_points(of: &str) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read mountinfo")?;
    Ok(parse_mounts(&mounts, of))
}

/// `ID PARENT DEVICE ROOT MOUNT-POINT OPTIONS… - TYPE SOURCE OPTIONS`, see proc(5).
fn parse_mounts(mounts: &str, of: &str) -> Vec<PathBuf> {
    let mount_point = |line: &str| {
        let (mount, filesystem) = line.split_once(" - ")?;
        (filesystem.split(' ').next() == Some(of)).then_some(())?;
        mount.split(' ').nth(4).map(PathBuf::from)
    };
    mounts.lines().filter_map(mount_point).collect()
}

/// A cgroup directory.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    pub(in crate::harness) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Makes the directory, and those above it, below the cgroup v2 mount.
    ///
    /// # Errors
    /// No cgroup v2 mount, or no permission.
    pub fn create(name: &str) -> Result<Self> {
        let path = mount_point()?.join(name);
        fs::create_dir_all(&path)
            .with_context(|| format!("cannot make cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// Makes a cgroup below this one.
    ///
    /// # Errors
    /// No permission.
    pub fn child(&self, name: &str) -> Result<Self> {
        let path = self.path.join(name);
        fs::create_dir_all(&path)
            .with_context(|| format!("cannot make cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opened so that a process which writes `0` joins the cgroup.
    pub(in crate::harness) fn joiner(&self) -> Result<File> {
        let path = self.path.join("cgroup.procs");
        OpenOptions::new()
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))
    }

    /// Kills every process in the tree and removes the directories. Says on stderr what stays.
    pub fn remove(&self) {
        if !self.path.exists() {
            return;
        }
        fs::write(self.path.join("cgroup.kill"), "1").ok();
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = remove_tree(&self.path) {
            if Instant::now() > deadline {
                eprintln!("cannot remove cgroup {}: {error}", self.path.display());
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Removes the directories of a tree without processes.
pub(in crate::harness) fn remove_tree(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mounts_of_each_version_are_found_beside_those_of_the_other() {
        let mounts = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw\n\
                      32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(parse_mounts(mounts, VERSION_2), [PathBuf::from("/sys/fs/cgroup/unified")]);
        assert_eq!(parse_mounts(mounts, VERSION_1), [PathBuf::from("/sys/fs/cgroup/cpu")]);
        let none = "31 23 0:28 / /sys rw - sysfs sysfs rw\n";
        assert!(parse_mounts(none, VERSION_2).is_empty());
    }
}
