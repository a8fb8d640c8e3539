//! `cargo xtask build`: the eBPF object, then the agent that embeds it.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;
use crate::{build_ebpf, run, setup};

pub(crate) fn run(workspace: &Workspace) -> Result<ExitCode> {
    if setup::can_install() {
        setup::ensure(workspace, setup::Scope::Build)?;
    }
    agent(workspace)?;
    println!("{}", workspace.release("lb-agent").display());
    Ok(ExitCode::SUCCESS)
}

/// Builds the object and `target/release/lb-agent`.
pub(crate) fn agent(workspace: &Workspace) -> Result<()> {
    build_ebpf::object(workspace, false)?;
    // Built alone: together with the tests crate, cargo would enable the features that only the
    // tests require of their dependencies.
    run::shown(workspace.cargo("build").args(["--release", "-p", "lb-agent"]))
        .context("the agent could not be built")
}

/// Builds every program of the tests crate in release mode.
pub(crate) fn tests_bins(workspace: &Workspace) -> Result<()> {
    run::shown(workspace.cargo("build").args(["--release", "-p", "lb-tests", "--bins"]))
        .context("the programs of the tests crate could not be built")
}

/// Builds one program of the tests crate in release mode.
pub(crate) fn tests_bin(workspace: &Workspace, name: &str) -> Result<()> {
    has_tests_bin(workspace, name)?;
    run::shown(workspace.cargo("build").args(["--release", "-p", "lb-tests", "--bin", name]))
        .with_context(|| format!("{name} could not be built"))
}

/// Fails if the tests crate has no program of this name.
pub(crate) fn has_tests_bin(workspace: &Workspace, name: &str) -> Result<()> {
    ensure!(
        workspace.has_tests_bin(name),
        "the tests crate has no program {name}: tests/src/bin/{name}.rs is missing"
    );
    Ok(())
}
