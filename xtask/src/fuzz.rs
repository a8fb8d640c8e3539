//! `cargo xtask fuzz`: looks for inputs that break what lb promises about all inputs, with
//! libFuzzer.
//!
//! Only the crates of this workspace count which edges are taken, so dependencies are those that
//! the tests are built with. No sanitizer is used and no nightly is needed: the code under test is
//! safe Rust, and overflows panic.

use std::fs;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::builder::PossibleValuesParser;

use crate::workspace::Workspace;
use crate::{build_ebpf, run, setup};

/// The targets of lb-fuzz, which are the directories of `fuzz/corpus`.
const TARGETS: [&str; 4] = ["manifests", "configuration", "netlink", "packets"];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The target; all of them by default
    #[arg(value_name = "TARGET", value_parser = PossibleValuesParser::new(TARGETS))]
    target: Option<String>,
    /// How long each target is run, in seconds
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    setup::ensure(workspace, setup::Scope::Build)?;
    build_ebpf::object(workspace, false)?;
    build(workspace)?;
    for target in TARGETS {
        if args.target.as_deref().is_none_or(|chosen| chosen == target) {
            fuzz(workspace, target, args.seconds)?;
        }
    }
    println!("fuzz: ok");
    Ok(ExitCode::SUCCESS)
}

fn build(workspace: &Workspace) -> Result<()> {
    let mut build = workspace.cargo("build");
    build
        .args(["-p", "lb-fuzz", "--features", "libfuzzer", "--bin", "lb-fuzz"])
        .env("RUSTC_WORKSPACE_WRAPPER", workspace.root().join("fuzz/rustc"));
    run::shown(&mut build).context("the fuzzer could not be built")
}

/// Runs one target. What it found before is its corpus, beside the inputs of the repository.
fn fuzz(workspace: &Workspace, target: &str, seconds: u32) -> Result<()> {
    let directory = workspace.target().join("fuzz").join(target);
    let corpus = directory.join("corpus");
    fs::create_dir_all(&corpus).with_context(|| format!("cannot create {}", corpus.display()))?;
    println!("\n== {target}, {seconds} s");
    let mut fuzzer: Command = workspace.command(workspace.tool("lb-fuzz"));
    fuzzer
        .env("LB_FUZZ_TARGET", target)
        .env("LB_FUZZ_SEEDS", &corpus)
        .arg(&corpus)
        .arg(format!("-artifact_prefix={}/", directory.display()))
        .arg(format!("-max_total_time={seconds}"))
        .args(["-max_len=4096", "-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1"]);
    if run::shown(&mut fuzzer).is_err() {
        bail!(
            "{target} fails on the input that is named above: `LB_FUZZ_TARGET={target} {} FILE` \
             runs it again; put it into fuzz/corpus/{target}, and correct what fails",
            workspace.tool("lb-fuzz").display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_directory_of_inputs_is_a_target() {
        let workspace = Workspace::find().expect("a clone");
        let directories = fs::read_dir(workspace.root().join("fuzz/corpus")).expect("the corpus");
        let mut found: Vec<_> =
            directories.flatten().map(|entry| entry.file_name().into_string()).collect();
        found.sort();
        let mut targets = TARGETS.map(|target| Ok(target.to_owned()));
        targets.sort();
        assert_eq!(found, targets);
    }
}
