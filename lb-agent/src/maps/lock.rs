//! The lock of a `--bpf-dir`: two agents would overwrite each other's maps.
//!
//! The directory itself is locked with flock(2), so the lock holds across network and mount
//! namespaces, and the kernel releases it when the process ends.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::stat::{major, minor},
};

/// The lock of a `--bpf-dir`, held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _directory: Flock<File>,
}

impl Lock {
    /// Locks `bpf_dir`, which must exist.
    ///
    /// # Errors
    /// [`LockError::Held`] if another process holds it.
    pub fn take(bpf_dir: &Path) -> Result<Self, LockError> {
        let failed = |source| LockError::Open { path: bpf_dir.to_owned(), source };
        let directory = File::open(bpf_dir).map_err(failed)?;
        let metadata = directory.metadata().map_err(failed)?;
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(directory) => Ok(Self { _directory: directory }),
            Err((_, Errno::EWOULDBLOCK)) => {
                let file = (major(metadata.dev()), minor(metadata.dev()), metadata.ino());
                let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
                Err(LockError::Held { path: bpf_dir.to_owned(), holder: holder(&locks, file) })
            }
            Err((_, error)) => Err(failed(error.into())),
        }
    }
}

/// The process that has locked the file (major and minor number of its device, inode),
/// by `/proc/locks` (proc(5)). Processes of other PID namespaces are
/// not listed.
fn holder(locks: &str, (major, minor, inode): (u64, u64, u64)) -> Option<u32> {
    let file = format!("{major:02x}:{minor:02x}:{inode}");
    locks.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let is_flock = fields.next() == Some("FLOCK");
        let process = fields.nth(2)?.parse().ok()?;
        (is_flock && fields.next() == Some(&file)).then_some(process)
    })
}

/// Describes the process that holds the lock.
fn holder_text(holder: Option<u32>) -> String {
    match holder {
        Some(process) => format!("process {process}"),
        None => "a process of another container".to_owned(),
    }
}

/// A `--bpf-dir` could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent holds the lock.
    #[error(
        "another lb-agent ({}) runs with --bpf-dir {}: end it first, or name another --bpf-dir",
        holder_text(*holder),
        path.display()
    )]
    Held {
        /// The directory.
        path: PathBuf,
        /// The other process; `None` if it is in another PID namespace.
        holder: Option<u32>,
    },
    /// The directory could not be opened or locked.
    #[error("cannot lock the directory {}", path.display())]
    Open {
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
    fn the_holder_is_found_by_the_file() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 00:1a:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 12 00:1b:77 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 13 00:1a:77 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 14 00:1a:77 0 EOF\n";
        assert_eq!(holder(locks, (0, 0x1a, 77)), Some(13));
        assert_eq!(holder(locks, (0, 0x1a, 7)), None);
        assert_eq!(holder("", (0, 0x1a, 77)), None);
    }

    #[test]
    fn a_directory_is_locked_once_and_until_it_is_dropped() {
        let directory = tempfile::tempdir().expect("a directory");
        let lock = Lock::take(directory.path()).expect("a lock");
        let held = Lock::take(directory.path()).expect_err("a second lock");
        assert!(matches!(held, LockError::Held { .. }), "{held}");
        drop(lock);
        Lock::take(directory.path()).expect("a lock after the first one");
    }
}
