//! The agent of an earlier release, from which tests upgrade to this one: the last one whose pins
//! had one version for all, `v3`. It is built from its commit, so the clone needs its history.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::cached;
use crate::progress::Progress;
use crate::run;
use crate::workspace::Workspace;

/// The last commit with the layout of pins v3.
const COMMIT: &str = "c91d844";
const PROGRAM: &str = "lb-agent";

fn dir(workspace: &Workspace) -> PathBuf {
    workspace.cache().join(format!("agent-v3-{COMMIT}"))
}

pub(super) fn ensure(workspace: &Workspace) -> Result<bool> {
    cached(workspace, &dir(workspace), &[PROGRAM], |root, _| build(workspace, root))
}

fn build(workspace: &Workspace, root: &Path) -> Result<()> {
    let mut git = Command::new("git");
    git.arg("-C").arg(workspace.root());
    let mut known = Command::new("git");
    known.arg("-C").arg(workspace.root());
    known.args(["cat-file", "-e", &format!("{COMMIT}^{{commit}}")]);
    ensure!(
        run::answer(&mut known).is_some(),
        "this clone does not have the commit {COMMIT}, of which the agent that tests upgrade from \
         is built: fetch the whole history (git fetch --unshallow)"
    );
    let progress = Progress::start(format!("building lb-agent of {COMMIT}, to upgrade from"));
    let source = root.join("source");
    std::fs::create_dir_all(&source)
        .with_context(|| format!("cannot create {}", source.display()))?;
    let archive = root.join("source.tar");
    git.args(["archive", "--output"]).arg(&archive).arg(COMMIT);
    run::logged(&mut git, &workspace.log("agent-v3-source"))?;
    let mut unpack = Command::new("tar");
    unpack.arg("-xf").arg(&archive).arg("-C").arg(&source);
    run::logged(&mut unpack, &workspace.log("agent-v3-source"))?;
    let failed = || format!("lb-agent of {COMMIT} could not be built");
    let mut objects = Command::new("cargo");
    objects.args(["run", "--quiet", "--package", "xtask", "--", "build-ebpf"]);
    objects.current_dir(&source).env_remove("CARGO_TARGET_DIR");
    run::logged(&mut objects, &workspace.log("agent-v3-ebpf")).with_context(failed)?;
    // In the target directory of the clone, where tests need most of what it is linked to anyway.
    let mut agent = workspace.cargo("build");
    agent.args(["--package", "lb-agent", "--bin", PROGRAM]).current_dir(&source);
    run::logged(&mut agent, &workspace.log("agent-v3")).with_context(failed)?;
    let built = workspace.tool(PROGRAM);
    std::fs::rename(&built, root.join(PROGRAM))
        .with_context(|| format!("there is no {}", built.display()))?;
    progress.done();
    Ok(())
}
