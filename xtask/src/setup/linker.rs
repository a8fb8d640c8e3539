//! bpf-linker, built against the LLVM of the compiler that makes its input.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::cached;
use crate::progress::Progress;
use crate::run;
use crate::workspace::Workspace;

const VERSION: &str = "0.13.0";
/// LLVM's major version: that of Debian's rustc-web.
const LLVM: &str = "22";
const PROGRAM: &str = "bin/bpf-linker";
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// The path of the linker in the cache.
pub(crate) fn path(workspace: &Workspace) -> PathBuf {
    dir(workspace).join(PROGRAM)
}

pub(super) fn ensure(workspace: &Workspace) -> Result<bool> {
    cached(workspace, &dir(workspace), &[PROGRAM], |root, _| install(workspace, root))
}

fn install(workspace: &Workspace, root: &Path) -> Result<()> {
    let progress = Progress::start(format!("building bpf-linker {VERSION} for LLVM {LLVM}"));
    let mut install = workspace.cargo("install");
    install
        .args(["bpf-linker", "--version", VERSION, "--locked"])
        .args(["--no-default-features", "--features"])
        .arg(format!("llvm-{LLVM}"))
        .arg("--root")
        .arg(root)
        // cargo then uses a temporary directory and removes it.
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("RUSTFLAGS")
        .env("LLVM_PREFIX", LLVM_PREFIX)
        .env(format!("LLVM_SYS_{LLVM}0_PREFIX"), LLVM_PREFIX);
    run::logged(&mut install, &workspace.log("bpf-linker"))
        .context("bpf-linker could not be built")?;
    progress.done();
    Ok(())
}

fn dir(workspace: &Workspace) -> PathBuf {
    workspace.cache().join(format!("bpf-linker-{VERSION}-llvm{LLVM}"))
}
