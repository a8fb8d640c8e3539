//! `lb-agent cleanup`: detaches and unpins everything of lb's, and nothing else.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use tracing::warn;

use crate::{
    maps::{
        lock::{Lock, LockError},
        pins::Pins,
    },
    programs::{cgroup, clsact, hook::Direction, links, tc::AttachError},
};

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// Links to interfaces and cgroups.
    pub links: usize,
    /// Filters of clsact qdiscs.
    pub filters: usize,
    /// Pinned maps and programs.
    pub pins: usize,
}

/// Detaches and unpins everything of lb's: the links and pins of every version below `bpf_dir`,
/// and the tc filters on the interfaces of this network namespace.
///
/// # Errors
/// [`CleanupError`] at the first failure. Everything before it is removed by then, and a second
/// run continues.
pub fn cleanup(bpf_dir: &Path) -> Result<Cleaned, CleanupError> {
    let mut cleaned = Cleaned::default();
    if let Err(error @ LockError::Held { .. }) = Lock::take(bpf_dir) {
        warn!("{error}; cleaning up anyway: that agent handles no traffic until it is restarted");
    }
    cgroup::detach(&Pins::new(bpf_dir))?;
    for version in versions(bpf_dir).map_err(failed("list", bpf_dir))? {
        let directory = version.join("links");
        for link in entries(&directory).map_err(failed("list", &directory))? {
            links::remove(&link).map_err(failed("detach", &link))?;
            cleaned.links += 1;
        }
        for pin in entries(&version).map_err(failed("list", &version))? {
            if !pin.is_dir() {
                fs::remove_file(&pin).map_err(failed("unpin", &pin))?;
                cleaned.pins += 1;
            }
        }
        for directory in [&directory, &version] {
            remove_directory(directory).map_err(failed("remove", directory))?;
        }
    }
    cleaned.filters = remove_filters()?;
    if bpf_dir.is_dir() {
        // Fails, as it should, if the directory has files of others.
        let _ = fs::remove_dir(bpf_dir);
    }
    Ok(cleaned)
}

fn remove_filters() -> Result<usize, CleanupError> {
    let interfaces = nix::net::if_::if_nameindex()
        .map_err(|error| CleanupError::Interfaces { source: error.into() })?;
    let mut removed = 0;
    for interface in &interfaces {
        for direction in [Direction::Ingress, Direction::Egress] {
            let index = interface.index();
            let remove = || {
                let is_attached = clsact::is_attached(index, direction)?;
                clsact::remove(index, direction).map(|()| usize::from(is_attached))
            };
            removed += remove().map_err(|source| CleanupError::Filter {
                interface: interface.name().to_string_lossy().into_owned(),
                source,
            })?;
        }
    }
    Ok(removed)
}

/// `v<number>` directories.
pub(super) fn versions(bpf_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let is_version = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.strip_prefix('v').is_some_and(|number| number.parse::<u32>().is_ok())
    };
    Ok(entries(bpf_dir)?.into_iter().filter(is_version).collect())
}

/// The entries of a directory; none if it does not exist.
fn entries(directory: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        result => result?.map(|entry| Ok(entry?.path())).collect(),
    }
}

fn remove_directory(directory: &Path) -> io::Result<()> {
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn failed<'a>(
    what: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> CleanupError + use<'a> {
    move |source| match source.kind() {
        io::ErrorKind::PermissionDenied => CleanupError::Privileges,
        _ => CleanupError::Path { what, path: path.to_owned(), source },
    }
}

/// Something could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// The caller lacks capabilities.
    #[error("cleaning up needs CAP_BPF and CAP_NET_ADMIN (root)")]
    Privileges,
    /// A path in the bpffs.
    #[error("cannot {what} {}", path.display())]
    Path {
        /// The operation.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A connect-time hook.
    #[error(transparent)]
    Hook(#[from] AttachError),
    /// The interfaces cannot be listed.
    #[error("cannot list the interfaces")]
    Interfaces {
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A tc filter cannot be removed.
    #[error("cannot remove the tc filter of lb from {interface}")]
    Filter {
        /// The interface.
        interface: String,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
}
