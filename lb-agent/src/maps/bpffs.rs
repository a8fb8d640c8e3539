//! The bpffs of the pins, and the cgroup v2 mount.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs},
};
use tracing::info;

/// The mount point of the bpffs on common distributions.
const USUAL: &str = "/sys/fs/bpf";

/// Ensures that `bpf_dir` exists and is on a bpffs. Mounts one if necessary: on `/sys/fs/bpf` for a
/// directory below that, else on `bpf_dir` itself.
///
/// # Errors
/// [`BpffsError`], whose text says what to do.
pub fn ensure(bpf_dir: &Path) -> Result<(), BpffsError> {
    if !is_bpffs(bpf_dir) {
        let target = mount_point(bpf_dir);
        mount_at(&target).map_err(|source| BpffsError::Mount { path: target.clone(), source })?;
        info!(path = %target.display(), "mounted a bpffs");
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

fn mount_point(bpf_dir: &Path) -> PathBuf {
    if bpf_dir.starts_with(USUAL) { PathBuf::from(USUAL) } else { bpf_dir.to_owned() }
}

fn mount_at(target: &Path) -> io::Result<()> {
    fs::create_dir_all(target)?;
    mount(Some("bpf"), target, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .map_err(io::Error::from)
}

/// Whether the bpffs at `bpf_dir` is mounted in this mount namespace but not in that of process 1,
/// so that its pins vanish with the last process of the namespace. `None` if that is unknown.
pub fn dies_with_mount_namespace(bpf_dir: &Path) -> Option<bool> {
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
        "there is no bpffs at {0} and mounting one failed: mount it \
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

#[cfg(test)]
mod tests {
    use super::*;

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
