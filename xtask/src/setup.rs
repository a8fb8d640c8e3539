//! `cargo xtask setup`: installs missing prerequisites, and nothing else.
//!
//! Each prerequisite is checked first; if all are present, a run only reads a few files. Tools
//! that take long to build are cached outside the clone, in a directory named after their
//! version. A file appears there complete or not at all.

mod addons;
mod bpffs;
pub(crate) mod cargo_deny;
mod control_plane;
pub(crate) mod cross;
mod earlier_agent;
mod go;
mod images;
pub(crate) mod linker;
mod lock;
mod nginx;
mod packages;
mod rustup;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::workspace::{Workspace, is_root, on_path};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Skip the Kubernetes programs and what else only clusters need
    #[arg(long)]
    without_control_plane: bool,
    /// Also build upstream's end-to-end tests, which only `test e2e` needs
    #[arg(long, conflicts_with = "without_control_plane")]
    end_to_end: bool,
}

/// How much to set up; each includes those above it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scope {
    /// The prerequisites of building, checking, the demo and most tests.
    Build,
    /// Also the agent of an earlier release, to upgrade from.
    EarlierAgent,
    /// Also the programs of a Kubernetes control plane, and nginx.
    ControlPlane,
    /// Also what clusters with real nodes need.
    Nodes,
    /// Also what only the tests on such clusters install: MetalLB, an ingress controller.
    Addons,
    /// Also upstream's end-to-end tests.
    EndToEnd,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    let scope = match args {
        Args { without_control_plane: true, .. } => Scope::Build,
        Args { end_to_end: true, .. } => Scope::EndToEnd,
        Args { .. } => Scope::Addons,
    };
    if ensure(workspace, scope)? {
        println!("setup: done");
    } else {
        println!("setup: everything is installed");
    }
    Ok(ExitCode::SUCCESS)
}

/// Installs missing prerequisites; returns whether any was missing.
pub(crate) fn ensure(workspace: &Workspace, scope: Scope) -> Result<bool> {
    let mut changed = packages::ensure(workspace, &packages::BUILD)?;
    changed |= rustup::ensure(workspace)?;
    changed |= linker::ensure(workspace)?;
    changed |= cargo_deny::ensure(workspace)?;
    changed |= bpffs::ensure(workspace)?;
    if scope >= Scope::EarlierAgent {
        changed |= earlier_agent::ensure(workspace)?;
    }
    if scope >= Scope::ControlPlane {
        changed |= control_plane::ensure(workspace)?;
        changed |= nginx::ensure(workspace)?;
    }
    if scope >= Scope::Nodes {
        changed |= packages::ensure(workspace, &packages::NODES)?;
        changed |= control_plane::ensure_nodes(workspace)?;
        changed |= images::ensure(workspace)?;
    }
    if scope >= Scope::Addons {
        changed |= addons::ensure(workspace)?;
    }
    if scope >= Scope::EndToEnd {
        changed |= control_plane::ensure_end_to_end(workspace)?;
    }
    if scope >= Scope::Nodes {
        let mut directories = vec![images::directory(workspace)?];
        if scope >= Scope::Addons {
            directories.extend(addons::image_directories(workspace)?);
        }
        images::write_list(workspace, &directories)?;
    }
    Ok(changed)
}

/// Installs what is missing for `bench traffic`; returns whether anything was.
pub(crate) fn ensure_traffic(workspace: &Workspace) -> Result<bool> {
    let changed = ensure(workspace, Scope::ControlPlane)?;
    Ok(packages::ensure(workspace, &packages::BENCH)? || changed)
}

/// Whether this process can install Debian packages at all.
pub(crate) fn can_install() -> bool {
    is_root() && on_path("apt-get").is_some()
}

/// Creates missing files in a directory of the cache: `make` gets a scratch directory and the
/// names of the missing files, and creates them there. They are moved into the cache after all
/// are made. Concurrent runs wait for each other. Returns whether a file was missing.
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
    let _lock = lock::take(&workspace.cache().join("setup.lock"))?;
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
        // An error of the removal matters less than that of `make`.
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
