//! cargo-deny, which `cargo xtask check` checks dependencies with.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::cached;
use crate::progress::Progress;
use crate::run;
use crate::workspace::Workspace;

const VERSION: &str = "0.20.2";
const PROGRAM: &str = "bin/cargo-deny";
/// A run takes a second, so optimising does not pay: with these settings the build takes two
/// minutes of one core.
const PROFILE: [(&str, &str); 3] = [
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"),
    ("CARGO_PROFILE_RELEASE_LTO", "off"),
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16"),
];

/// The path of the program in the cache.
pub(crate) fn path(workspace: &Workspace) -> PathBuf {
    dir(workspace).join(PROGRAM)
}

pub(super) fn ensure(workspace: &Workspace) -> Result<bool> {
    cached(workspace, &dir(workspace), &[PROGRAM], |root, _| install(workspace, root))
}

fn install(workspace: &Workspace, root: &Path) -> Result<()> {
    let progress = Progress::start(format!("building cargo-deny {VERSION}"));
    let mut install = workspace.cargo("install");
    install
        .args(["cargo-deny", "--version", VERSION, "--locked", "--root"])
        .arg(root)
        .envs(PROFILE)
        // cargo then uses a temporary directory and removes it.
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("RUSTFLAGS");
    run::logged(&mut install, &workspace.log("cargo-deny"))
        .context("cargo-deny could not be built")?;
    progress.done();
    Ok(())
}

fn dir(workspace: &Workspace) -> PathBuf {
    workspace.cache().join(format!("cargo-deny-{VERSION}"))
}
