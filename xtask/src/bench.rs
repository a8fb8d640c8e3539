//! `cargo xtask bench`: sets up, builds, and becomes `lb-bench` of the tests crate.

use std::process::ExitCode;

use anyhow::{Result, ensure};

use crate::workspace::{Workspace, is_root};
use crate::{build, build_ebpf, run, setup};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Part of the report to measure, and flags of lb-bench
    #[arg(value_name = "NAME", trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    ensure!(
        is_root(),
        "benchmarks load eBPF programs and make network namespaces: run them as root"
    );
    build::has_tests_bin(workspace, "lb-bench")?;
    let is_named = |names: &[&str]| args.args.iter().any(|arg| names.contains(&arg.as_str()));
    if is_named(&["traffic"]) {
        // kube-proxy, the control plane that it needs, and known tools.
        setup::ensure_traffic(workspace)?;
    } else if is_named(&["faults", "--real", "--fleet"]) {
        setup::ensure(workspace, setup::Scope::ControlPlane)?;
    } else {
        setup::ensure(workspace, setup::Scope::Build)?;
    }
    build::agent(workspace)?;
    build_ebpf::bench_object(workspace)?;
    build::bench(workspace)?;
    run::become_it(workspace.command(workspace.release("lb-bench")).args(&args.args))
}
