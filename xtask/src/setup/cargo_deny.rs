//! cargo-deny, which `cargo xtask check` holds dependencies with.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::cached;
use crate::progress::Progress;
use crate::run;
use crate::workspace::Workspace;

const VERSION: &str = "0.20.2";
const PROGRAM: &str = "bin/cargo-deny";
/// It runs for a second, so that what optimising takes would never come back: with these it is
/// built in two minutes of one core.
const PROFILE: [(&str, &str); 3] = [
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"),
    ("CARGO_PROFILE_RELEASE_LTO", "off"),
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16"),
];

/// Where setup puts it.
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
        // A temporary one, which cargo removes again.
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
