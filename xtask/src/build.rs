//! `cargo xtask build`: the eBPF object, then the agent that embeds it.

use std::fs;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

use crate::architecture::Architecture;
use crate::setup::cross;
use crate::workspace::{FLAG_SEPARATOR, Workspace};
use crate::{build_ebpf, run, setup};

pub(crate) fn run(workspace: &Workspace) -> Result<ExitCode> {
    if setup::can_install() {
        setup::ensure(workspace, setup::Scope::Build)?;
    }
    agent(workspace)?;
    println!("{}", workspace.release("lb-agent").display());
    Ok(ExitCode::SUCCESS)
}

/// Builds the object, `target/release/lb-agent`, and its man pages and completions.
pub(crate) fn agent(workspace: &Workspace) -> Result<()> {
    build_ebpf::object(workspace, false)?;
    // Built alone: together with the tests crate, cargo would enable the features that only the
    // tests require of their dependencies.
    run::shown(release(workspace)?.args(["-p", "lb-agent"]))
        .context("the agent could not be built")?;
    let agent = workspace.command(workspace.agent(Architecture::HOST));
    documents(workspace, Architecture::HOST, agent)
}

/// Builds the object, the agent for arm64 by Debian's compiler, and its man pages and completions,
/// which the agent writes under qemu.
pub(crate) fn agent_for_arm64(workspace: &Workspace) -> Result<()> {
    const ARM64: Architecture = Architecture::Arm64;
    let root = cross::ensure(workspace)?;
    build_ebpf::object(workspace, false)?;
    let mut flags = workspace.remapped_paths()?.to_vec();
    flags.push(format!("--sysroot={}", root.sysroot().display()));
    let tool = |name: &str| format!("{}-{name}", ARM64.triplet());
    let target = ARM64.target().replace('-', "_");
    let mut cargo = workspace.debian_cargo();
    cargo
        .env("CARGO_TARGET_DIR", workspace.target_for(ARM64))
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join(FLAG_SEPARATOR))
        .env(format!("CARGO_TARGET_{}_LINKER", target.to_uppercase()), tool("gcc"))
        .env(format!("CC_{target}"), tool("gcc"))
        .env(format!("AR_{target}"), tool("ar"))
        .args(["build", "--release", "--target", ARM64.target(), "-p", "lb-agent"]);
    run::shown(&mut cargo).context("the agent for arm64 could not be built")?;
    let mut agent = workspace.command(cross::qemu(workspace)?);
    agent.arg("-L").arg(root.path()).arg(workspace.agent(ARM64));
    documents(workspace, ARM64, agent)
}

/// Builds `target/debug/lb-agent-next`, whose maps have other layouts: tests upgrade to it and back.
pub(crate) fn next_agent(workspace: &Workspace) -> Result<()> {
    build_ebpf::next_objects(workspace)?;
    let mut build = workspace.cargo("build");
    // Together with the tests crate, so that both are linked to the same dependencies.
    build.args(["-p", "lb-agent", "-p", "lb-tests"]);
    build.args(["--features", "lb-agent/next-layout", "--bin", "lb-agent-next"]);
    run::shown(&mut build).context("the agent with other layouts could not be built")
}

/// Has the agent write its man pages and the completions of shells. Those of an earlier build are
/// removed first, because the image gets every file that is there.
fn documents(workspace: &Workspace, architecture: Architecture, mut agent: Command) -> Result<()> {
    let directory = workspace.documents(architecture);
    if directory.exists() {
        fs::remove_dir_all(&directory)
            .with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    run::shown(agent.arg("documents").arg(&directory))
        .context("man pages and completions could not be written")
}

/// Builds every program of the tests crate, without optimisation: as the tests do, so that what
/// they are linked to is built once.
pub(crate) fn tools(workspace: &Workspace) -> Result<()> {
    // They are linked to the agent, which embeds the object.
    build_ebpf::object(workspace, false)?;
    run::shown(workspace.cargo("build").args(["-p", "lb-tests", "--bins"]))
        .context("the programs of the tests crate could not be built")
}

/// Builds one program of the tests crate like [`tools`].
pub(crate) fn tool(workspace: &Workspace, name: &str) -> Result<()> {
    has_tests_bin(workspace, name)?;
    build_ebpf::object(workspace, false)?;
    run::shown(workspace.cargo("build").args(["-p", "lb-tests", "--bin", name]))
        .with_context(|| format!("{name} could not be built"))
}

/// Builds `target/release/lb-bench`, and `lb-echo` beside it.
pub(crate) fn bench(workspace: &Workspace) -> Result<()> {
    run::shown(
        release(workspace)?.args(["-p", "lb-tests", "--bin", "lb-bench", "--bin", "lb-echo"]),
    )
    .context("lb-bench could not be built")
}

/// `cargo build --release`, whose result does not depend on where the clone is. All release
/// builds have the same flags, so that dependencies are built once.
fn release(workspace: &Workspace) -> Result<Command> {
    let mut cargo = workspace.cargo("build");
    // The variable wins over the flags of the developer's environment and configuration.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", workspace.remapped_paths()?.join(FLAG_SEPARATOR));
    cargo.arg("--release");
    Ok(cargo)
}

/// Fails if the tests crate has no program of this name.
pub(crate) fn has_tests_bin(workspace: &Workspace, name: &str) -> Result<()> {
    ensure!(
        workspace.has_tests_bin(name),
        "the tests crate has no program {name}: tests/src/bin/{name}.rs is missing"
    );
    Ok(())
}
