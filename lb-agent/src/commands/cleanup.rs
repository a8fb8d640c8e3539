//! `lb-agent cleanup`: detaches and unpins everything of lb's, and nothing else.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use tracing::warn;

use crate::{
    maps::{
        lock::{Holder, Lock, LockError},
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

/// Detaches and unpins everything of lb's: the links and pins below `bpf_dir`, of this release and
/// of those before, and the tc filters on the interfaces of this network namespace. Beside an agent
/// that runs, it does so only with `force`.
///
/// # Errors
/// [`CleanupError`] at the first failure. Everything before it is removed by then, and a second
/// run continues.
pub fn cleanup(bpf_dir: &Path, force: bool) -> Result<Cleaned, CleanupError> {
    let mut cleaned = Cleaned::default();
    // Held to the end, so that no agent starts in the middle.
    let _lock = match Lock::take(bpf_dir) {
        Ok(lock) => Some(lock),
        Err(LockError::Held { path, holder }) if force => {
            let bpf_dir = path.display();
            warn!(
                "lb-agent ({holder}) runs with --bpf-dir {bpf_dir}: cleaning up anyway (--force); \
                 it attaches and pins everything again within seconds"
            );
            None
        }
        Err(LockError::Held { path, holder }) => {
            return Err(CleanupError::Running { path, holder });
        }
        // There may be no directory, but filters.
        Err(LockError::Open { .. }) => None,
    };
    cgroup::detach(&Pins::new(bpf_dir))?;
    let pins = Pins::new(bpf_dir);
    let mut directories = versions(bpf_dir).map_err(failed("list", bpf_dir))?;
    for links in directories.iter().map(|path| path.join("links")).collect::<Vec<_>>() {
        cleaned.links += remove_links(&links)?;
    }
    cleaned.links += remove_links(pins.links())?;
    directories.extend(loading(bpf_dir).map_err(failed("list", bpf_dir))?);
    directories.push(pins.handover());
    directories.push(pins.maps().to_owned());
    for directory in &directories {
        for pin in entries(directory).map_err(failed("list", directory))? {
            fs::remove_file(&pin).map_err(failed("unpin", &pin))?;
            cleaned.pins += 1;
        }
        remove_directory(directory).map_err(failed("remove", directory))?;
    }
    for program in programs(bpf_dir).map_err(failed("list", bpf_dir))? {
        fs::remove_file(&program).map_err(failed("unpin", &program))?;
        cleaned.pins += 1;
    }
    cleaned.filters = remove_filters()?;
    if bpf_dir.is_dir() {
        // Fails, as it should, if the directory has files of others.
        let _ = fs::remove_dir(bpf_dir);
    }
    Ok(cleaned)
}

/// Detaches the links that are pinned in a directory, and removes it.
fn remove_links(directory: &Path) -> Result<usize, CleanupError> {
    let links = entries(directory).map_err(failed("list", directory))?;
    for link in &links {
        links::remove(link).map_err(failed("detach", link))?;
    }
    remove_directory(directory).map_err(failed("remove", directory))?;
    Ok(links.len())
}

/// What agents that ended while they loaded programs have left.
fn loading(bpf_dir: &Path) -> io::Result<Vec<PathBuf>> {
    named(bpf_dir, |name| name.starts_with("loading-"))
}

/// The pinned programs, and the descriptions of maps.
fn programs(bpf_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let is_one = |name: &str| {
        name == "clock" || ["program-", "layouts@"].iter().any(|start| name.starts_with(start))
    };
    named(bpf_dir, is_one)
}

/// The entries of a directory whose name `is_one` accepts.
fn named(directory: &Path, is_one: impl Fn(&str) -> bool) -> io::Result<Vec<PathBuf>> {
    let is_one = |path: &PathBuf| is_one(path.file_name().and_then(OsStr::to_str).unwrap_or(""));
    Ok(entries(directory)?.into_iter().filter(is_one).collect())
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
    let number = |name: &str| name.strip_prefix('v').map(str::parse::<u32>);
    named(bpf_dir, |name| matches!(number(name), Some(Ok(_))))
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
    /// An agent runs, or a drain.
    #[error(
        "lb-agent ({holder}) runs with --bpf-dir {}, and would attach everything again: end it \
         first (delete its DaemonSet, or SIGTERM), or give `lb-agent cleanup --force`",
        path.display()
    )]
    Running {
        /// The directory.
        path: PathBuf,
        /// The agent.
        holder: Holder,
    },
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
