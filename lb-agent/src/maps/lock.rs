//! The lock of a `--bpf-dir`: two agents would overwrite each other's maps.
//!
//! The directory itself is locked with flock(2), so the lock holds across network and mount
//! namespaces, and the kernel releases it when the process ends.

use std::{
    fmt,
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

use crate::report::{self, Report};

/// The lock of a `--bpf-dir`, held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    directory: Flock<File>,
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
            Ok(directory) => Ok(Self { directory }),
            Err((_, Errno::EWOULDBLOCK)) => {
                let file = (major(metadata.dev()), minor(metadata.dev()), metadata.ino());
                let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
                let holder = Holder {
                    process: process(&locks, file),
                    report: report::report(bpf_dir).ok().map(Box::new),
                };
                Err(LockError::Held { path: bpf_dir.to_owned(), holder })
            }
            Err((_, error)) => Err(failed(error.into())),
        }
    }

    /// Takes the lock of `bpf_dir` as soon as no other process holds it. A thread waits for it, so
    /// that it is taken at once; it waits on if the future is dropped, until the process ends.
    ///
    /// # Errors
    /// [`LockError::Open`].
    pub async fn wait(bpf_dir: &Path) -> Result<Self, LockError> {
        let path = bpf_dir.to_owned();
        let failed = |source| LockError::Open { path: bpf_dir.to_owned(), source };
        let taken = tokio::task::spawn_blocking(move || take_when_free(&path)).await;
        taken.map_err(|error| failed(io::Error::other(error)))?
    }

    /// Whether the directory is still the one that is locked: it may have been removed and made
    /// again, or another bpffs may have been mounted over it.
    pub fn is_of(&self, bpf_dir: &Path) -> bool {
        let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
        match (self.directory.metadata(), fs::metadata(bpf_dir)) {
            (Ok(locked), Ok(present)) => same(&locked, &present),
            _ => false,
        }
    }
}

/// Waits, however long it takes, until no other process holds the lock of `bpf_dir`, and takes it.
///
/// # Errors
/// [`LockError::Open`]. The directory is made again if it is removed in the meantime.
fn take_when_free(bpf_dir: &Path) -> Result<Lock, LockError> {
    let failed = |source| LockError::Open { path: bpf_dir.to_owned(), source };
    loop {
        fs::create_dir_all(bpf_dir).map_err(failed)?;
        let directory = File::open(bpf_dir).map_err(failed)?;
        let lock = match Flock::lock(directory, FlockArg::LockExclusive) {
            Ok(directory) => Lock { directory },
            Err((_, Errno::EINTR)) => continue,
            Err((_, error)) => return Err(failed(error.into())),
        };
        if lock.is_of(bpf_dir) {
            return Ok(lock);
        }
    }
}

/// The process that has locked the file (major and minor number of its device, inode),
/// by `/proc/locks` (proc(5)). Processes of other PID namespaces are
/// not listed.
fn process(locks: &str, (major, minor, inode): (u64, u64, u64)) -> Option<u32> {
    let file = format!("{major:02x}:{minor:02x}:{inode}");
    locks.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let is_flock = fields.next() == Some("FLOCK");
        let process = fields.nth(2)?.parse().ok()?;
        (is_flock && fields.next() == Some(&file)).then_some(process)
    })
}

/// The agent that holds a lock.
#[derive(Clone, Debug, PartialEq)]
pub struct Holder {
    /// Its process; `None` if it is in another PID namespace.
    pub process: Option<u32>,
    /// What it says of itself, if it answers.
    pub report: Option<Box<Report>>,
}

impl fmt::Display for Holder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.process {
            Some(process) => write!(formatter, "process {process}")?,
            None => formatter.write_str("a process of another container")?,
        }
        match &self.report {
            Some(report) => {
                write!(formatter, ", version {}, started {:.0}", report.version, report.started)
            }
            None => Ok(()),
        }
    }
}

/// A `--bpf-dir` could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent holds the lock.
    #[error(
        "another lb-agent ({holder}) runs with --bpf-dir {}: end it first; a node needs one \
         lb-agent, so of two DaemonSets or Helm releases remove one",
        path.display()
    )]
    Held {
        /// The directory.
        path: PathBuf,
        /// The other agent.
        holder: Holder,
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
        assert_eq!(process(locks, (0, 0x1a, 77)), Some(13));
        assert_eq!(process(locks, (0, 0x1a, 7)), None);
        assert_eq!(process("", (0, 0x1a, 77)), None);
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
