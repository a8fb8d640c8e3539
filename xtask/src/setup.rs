//! `cargo xtask setup`: installs what is missing, and nothing else.
//!
//! Every piece is looked at first; with all of them there a run only reads a
//! few files. What takes long to build is kept outside the clone, in a
//! directory named after its version, and a file appears there complete or not
//! at all.

mod bpffs;
pub(crate) mod cargo_deny;
mod control_plane;
pub(crate) mod linker;
mod nginx;
mod packages;
mod rustup;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::workspace::{Workspace, is_root, on_path};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave out the Kubernetes programs and nginx, which only `test cluster` needs
    #[arg(long)]
    without_control_plane: bool,
}

/// How much to set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// What building, checking, the demo and most tests need.
    Build,
    /// Also the API server, what runs beside it, and nginx.
    All,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    let scope = if args.without_control_plane { Scope::Build } else { Scope::All };
    if ensure(workspace, scope)? {
        println!("setup: done");
    } else {
        println!("setup: everything is in place, nothing to do");
    }
    Ok(ExitCode::SUCCESS)
}

/// Sets up what is missing; returns whether anything was.
pub(crate) fn ensure(workspace: &Workspace, scope: Scope) -> Result<bool> {
    let mut changed = packages::ensure(workspace)?;
    changed |= rustup::ensure(workspace)?;
    changed |= linker::ensure(workspace)?;
    changed |= cargo_deny::ensure(workspace)?;
    changed |= bpffs::ensure(workspace)?;
    if scope == Scope::All {
        changed |= control_plane::ensure(workspace)?;
        changed |= nginx::ensure(workspace)?;
    }
    Ok(changed)
}

/// Whether this process can install Debian packages at all.
pub(crate) fn can_install() -> bool {
    is_root() && on_path("apt-get").is_some()
}

/// Puts the files that a directory of the cache lacks there: `make` gets a
/// scratch directory and the missing files, which it leaves below it. None takes
/// its place before all are made. Runs at the same time wait for each other;
/// returns whether anything was missing.
pub(crate) fn cached(
    workspace: &Workspace,
    dir: &Path,
    files: &[&str],
    make: impl FnOnce(&Path, &[&str]) -> Result<()>,
) -> Result<bool> {
    let missing = || -> Vec<&str> {
        let is_missing = |file: &&str| !dir.join(file).exists();
        files.iter().copied().filter(is_missing).collect()
    };
    if missing().is_empty() {
        return Ok(false);
    }
    let create = |dir: &Path| {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))
    };
    create(workspace.cache())?;
    let lock = workspace.cache().join("setup.lock");
    let lock = File::create(&lock).with_context(|| format!("cannot write {}", lock.display()))?;
    lock.lock().context("cannot lock the cache")?;
    let missing = missing();
    if missing.is_empty() {
        return Ok(false);
    }
    let mut partial = dir.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    if partial.exists() {
        fs::remove_dir_all(&partial)
            .with_context(|| format!("cannot remove the stale {}", partial.display()))?;
    }
    create(&partial)?;
    if let Err(error) = make(&partial, &missing) {
        // What is left of it is of no use, and the error matters more.
        let _ = fs::remove_dir_all(&partial);
        return Err(error);
    }
    for file in missing {
        let place = dir.join(file);
        place.parent().map_or(Ok(()), create)?;
        fs::rename(partial.join(file), &place)
            .with_context(|| format!("cannot create {}", place.display()))?;
    }
    fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    Ok(true)
}
