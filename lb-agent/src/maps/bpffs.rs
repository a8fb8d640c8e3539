//! The bpffs of the pins, and the cgroup v2 mount.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sys::{
        statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs},
        statvfs::{FsFlags, statvfs},
    },
};
use tracing::{info, warn};

use crate::privileges::{Capability, Privileges};

/// The mount point of the bpffs on common distributions.
const USUAL: &str = "/sys/fs/bpf";

/// Ensures that `bpf_dir` exists and is on a bpffs. Mounts one if necessary: on `/sys/fs/bpf` for a
/// directory below that, else on `bpf_dir` itself.
///
/// # Errors
/// [`BpffsError`], with the remedy.
pub fn ensure(bpf_dir: &Path) -> Result<(), BpffsError> {
    if !is_bpffs(bpf_dir) {
        let target = mount_point(bpf_dir);
        mount_at(&target).map_err(|source| BpffsError::mount(target.clone(), source))?;
        info!(path = %target.display(), "mounted a bpffs");
        if !is_initial_pid_namespace() && !is_propagated(&target).unwrap_or(true) {
            warn!(
                path = %target.display(),
                "no other container sees this bpffs, and its pins vanish with this container: mount \
                 it on the node, or with mountPropagation: Bidirectional"
            );
        }
    }
    if is_read_only(bpf_dir) {
        return Err(BpffsError::ReadOnly { path: bpf_dir.to_owned() });
    }
    fs::create_dir_all(bpf_dir)
        .map_err(|source| BpffsError::Create { path: bpf_dir.to_owned(), source })
}

/// Whether `path`, or its nearest existing ancestor, is on a bpffs.
pub fn is_bpffs(path: &Path) -> bool {
    path.ancestors()
        .find_map(|ancestor| statfs(ancestor).ok())
        .is_some_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}

/// Whether `path` is a directory of a cgroup v2 hierarchy.
pub fn is_cgroup2(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// Whether `path`, or its nearest existing ancestor, is on a mount that cannot be written.
pub fn is_read_only(path: &Path) -> bool {
    path.ancestors()
        .find_map(|ancestor| statvfs(ancestor).ok())
        .is_some_and(|found| found.flags().contains(FsFlags::ST_RDONLY))
}

fn mount_point(bpf_dir: &Path) -> PathBuf {
    if bpf_dir.starts_with(USUAL) { PathBuf::from(USUAL) } else { bpf_dir.to_owned() }
}

fn mount_at(target: &Path) -> io::Result<()> {
    fs::create_dir_all(target)?;
    mount(Some("bpf"), target, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .map_err(io::Error::from)
}

/// Whether this process sees all processes of the machine: its PID namespace is the first one,
/// which always has this number.
fn is_initial_pid_namespace() -> bool {
    const FIRST: &str = "pid:[4026531836]";
    fs::read_link("/proc/self/ns/pid").is_ok_and(|own| own == Path::new(FIRST))
}

/// Whether the mount at `point` came from another mount namespace, or goes to others.
fn is_propagated(point: &Path) -> Option<bool> {
    propagation_of(&fs::read_to_string("/proc/self/mountinfo").ok()?, point)
}

/// Whether the last mount at `point` in `mountinfo` (proc(5)) has peers or a master.
fn propagation_of(mountinfo: &str, point: &Path) -> Option<bool> {
    let mount = mountinfo.lines().rev().find_map(|line| {
        let (mount, _) = line.split_once(" - ")?;
        let place = mount.split(' ').nth(4)?;
        (Path::new(&unescaped(place)) == point).then_some(mount)
    })?;
    let mut optional = mount.split(' ').skip(6);
    Some(optional.any(|field| field.starts_with("shared:") || field.starts_with("master:")))
}

/// Whether the bpffs at `bpf_dir` is mounted in this mount namespace but not in that of process 1,
/// so that its pins vanish with the last process of the namespace. `None` if that is unknown, as
/// in a container, which does not see that process.
pub fn dies_with_mount_namespace(bpf_dir: &Path) -> Option<bool> {
    if !is_initial_pid_namespace() {
        return None;
    }
    let own = fs::read_link("/proc/self/ns/mnt").ok()?;
    let first = fs::read_link("/proc/1/ns/mnt").ok()?;
    if own == first {
        return Some(false);
    }
    let device = fs::metadata(bpf_dir.ancestors().find(|path| path.exists())?)
        .map(|metadata| std::os::unix::fs::MetadataExt::dev(&metadata))
        .ok()?;
    let number = format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let mounts = fs::read_to_string("/proc/1/mountinfo").ok()?;
    Some(!has_device(&mounts, &number))
}

/// Whether `mountinfo` has a mount of the device `number` (`major:minor`).
fn has_device(mountinfo: &str, number: &str) -> bool {
    mountinfo.lines().any(|line| line.split(' ').nth(2) == Some(number))
}

/// The mount point of the cgroup v2 hierarchy, from `/proc/self/mountinfo`.
pub fn cgroup2_mount() -> Option<PathBuf> {
    find_cgroup2(&fs::read_to_string("/proc/self/mountinfo").ok()?)
}

/// The first mount of a whole cgroup v2 hierarchy in `mountinfo` (proc(5)).
fn find_cgroup2(mountinfo: &str) -> Option<PathBuf> {
    let mut found = None;
    for line in mountinfo.lines() {
        let Some((mount, filesystem)) = line.split_once(" - ") else { continue };
        if filesystem.split(' ').next() != Some("cgroup2") {
            continue;
        }
        let mut fields = mount.split(' ').skip(3);
        let (Some(root), Some(point)) = (fields.next(), fields.next()) else { continue };
        let point = PathBuf::from(unescaped(point));
        if root == "/" {
            return Some(point);
        }
        found.get_or_insert(point);
    }
    found
}

/// Decodes the octal escapes that proc(5) uses for white space and backslashes.
fn unescaped(field: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(field.to_owned(), |text, (escape, character)| text.replace(escape, character))
}

/// There is no bpffs for the pins.
#[derive(Debug, thiserror::Error)]
pub enum BpffsError {
    /// A bpffs could not be mounted.
    #[error(
        "there is no bpffs at {0} and mounting one failed: mount it on the node \
         (mount -t bpf bpf {0}) or name another --bpf-dir",
        path.display()
    )]
    Mount {
        /// Where it was to be mounted.
        path: PathBuf,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// This process may not mount one.
    #[error(
        "there is no bpffs at {0}, and mounting one needs CAP_SYS_ADMIN: mount it on the node \
         (mount -t bpf bpf {0}), or run `lb-agent run --init-only` in a privileged init container",
        path.display()
    )]
    Unprivileged {
        /// Where it was to be mounted.
        path: PathBuf,
    },
    /// The bpffs is mounted read-only.
    #[error(
        "{} is on a read-only mount, so nothing can be pinned there: remove readOnly from the \
         volume mount of /sys/fs/bpf, or the option ro from its mount on the node",
        path.display()
    )]
    ReadOnly {
        /// The directory.
        path: PathBuf,
    },
    /// The directory could not be created.
    #[error("cannot create the directory {}", path.display())]
    Create {
        /// The directory.
        path: PathBuf,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
}

impl BpffsError {
    fn mount(path: PathBuf, source: io::Error) -> Self {
        if Privileges::own().has(Capability::SysAdmin) {
            return Self::Mount { path, source };
        }
        Self::Unprivileged { path }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_with_peers_or_a_master_is_propagated() {
        let mounts = "1 0 0:1 / / rw shared:1 - ext4 x rw\n\
                      2 1 0:35 / /a rw,nosuid - bpf bpf rw\n\
                      3 1 0:35 / /b rw master:7 - bpf bpf rw\n\
                      4 1 0:36 / /b rw - bpf bpf rw\n5 1 0:36 / /c rw shared:9 - bpf bpf rw\n";
        let cases = [("/a", Some(false)), ("/b", Some(false)), ("/c", Some(true)), ("/d", None)];
        for (point, expected) in cases {
            assert_eq!(propagation_of(mounts, Path::new(point)), expected, "{point}");
        }
    }

    #[test]
    fn the_cgroup2_mount_is_found_at_any_path() {
        let hybrid = "31 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      32 31 0:27 / /sys/fs/cgroup/uni\\040fied rw shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_cgroup2(hybrid), Some(PathBuf::from("/sys/fs/cgroup/uni fied")));
        assert_eq!(find_cgroup2("31 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"), None);
        let bind = "1 2 0:27 /pod /mnt rw - cgroup2 x rw\n2 3 0:27 / /cg rw - cgroup2 x rw\n";
        assert_eq!(find_cgroup2(bind), Some(PathBuf::from("/cg")));
    }

    #[test]
    fn a_bpffs_is_recognised_by_its_device() {
        let mounts = "40 23 0:35 / /sys/fs/bpf rw - bpf bpf rw\n";
        assert!(has_device(mounts, "0:35"));
        assert!(!has_device(mounts, "0:36"));
    }

    #[test]
    fn the_usual_mount_point_is_preferred() {
        assert_eq!(mount_point(Path::new("/sys/fs/bpf/lb")), Path::new("/sys/fs/bpf"));
        assert_eq!(mount_point(Path::new("/run/lb/bpf")), Path::new("/run/lb/bpf"));
    }
}
