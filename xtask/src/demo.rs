//! `cargo xtask demo`: sets up, builds, and becomes `lb-demo` of the tests crate.

use std::process::ExitCode;

use anyhow::{Result, ensure};

use crate::workspace::{Workspace, is_root};
use crate::{build, run, setup};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Keep everything running and print how to explore it
    #[arg(long)]
    keep: bool,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    ensure!(is_root(), "the demo loads eBPF programs and makes network namespaces: run it as root");
    setup::ensure(workspace, setup::Scope::Build)?;
    build::agent(workspace)?;
    build::tools(workspace)?;
    let mut demo = workspace.command(workspace.tool("lb-demo"));
    if args.keep {
        demo.arg("--keep");
    }
    run::become_it(&mut demo)
}
