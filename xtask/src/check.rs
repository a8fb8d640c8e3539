//! `cargo xtask check`: all that can be judged without running a test.
//!
//! One line a step; what a step printed is shown only when it failed, but for
//! the verifier's table, which is there to be read.

mod licence;

use std::fs;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::progress::seconds;
use crate::workspace::{Workspace, is_root};
use crate::{build, build_ebpf, run, setup};

/// Set for the golden tests when they are to rewrite their files.
const BLESS: &str = "LB_BLESS";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Rewrite the layout and verifier goldens with what is there now
    #[arg(long)]
    bless: bool,
}

/// One step: returns what is worth showing, or why it failed.
struct Step<'a> {
    name: &'static str,
    run: Box<dyn Fn() -> Result<String> + 'a>,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    setup::ensure(workspace, setup::Scope::Build)?;
    // lb-agent embeds the object, so nothing below compiles without it.
    build::agent(workspace)?;
    let mut failed = Vec::new();
    for step in steps(workspace, args.bless) {
        let started = Instant::now();
        let result = (step.run)();
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        println!("{word:<6} {:<24} {:>8}", step.name, seconds(started.elapsed()));
        match result {
            Ok(text) if text.is_empty() => {}
            Ok(text) => println!("{}", text.trim_end()),
            Err(error) => {
                println!("{error:#}");
                failed.push(step.name);
            }
        }
    }
    if failed.is_empty() {
        println!("check: ok");
        return Ok(ExitCode::SUCCESS);
    }
    println!("check: failed: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}

fn steps(workspace: &Workspace, bless: bool) -> Vec<Step<'_>> {
    let mut steps = vec![
        Step {
            name: "formatting",
            run: Box::new(|| {
                let mut fmt = workspace.cargo("fmt");
                silent(workspace, "fmt", fmt.args(["--all", "--check"]))
            }),
        },
        Step {
            name: "clippy",
            run: Box::new(|| {
                let mut clippy = workspace.cargo("clippy");
                clippy
                    .args(["--workspace", "--exclude", "lb-ebpf", "--exclude", "lb-bench-ebpf"])
                    .arg("--all-targets")
                    .args(["--all-features", "--", "-Dwarnings"]);
                silent(workspace, "clippy", &mut clippy)
            }),
        },
        Step {
            name: "clippy of the programs",
            run: Box::new(|| {
                let mut clippy = build_ebpf::clippy(workspace);
                silent(workspace, "clippy-ebpf", &mut clippy)
            }),
        },
        Step {
            name: "rustc of the programs",
            run: Box::new(|| {
                let mut check = build_ebpf::deny_warnings(workspace)?;
                silent(workspace, "rustc-ebpf", &mut check)
            }),
        },
        Step { name: "licences", run: Box::new(|| licence::check(workspace)) },
        Step { name: "layout golden", run: Box::new(move || layout(workspace, bless)) },
    ];
    if workspace.has_tests_bin("lb-verify") {
        steps.push(Step {
            name: "verifier golden",
            run: Box::new(move || verifier(workspace, bless)),
        });
    }
    steps
}

fn layout(workspace: &Workspace, bless: bool) -> Result<String> {
    let mut test = workspace.cargo("test");
    test.args(["-p", "lb-testing", "layout"]);
    if bless {
        test.env(BLESS, "1");
    }
    let output = captured(workspace, "layout", &mut test)?;
    ensure!(
        output.lines().any(|line| line.starts_with("test ") && line.ends_with("... ok")),
        "lb-testing has no test whose name holds `layout`"
    );
    Ok(String::new())
}

fn verifier(workspace: &Workspace, bless: bool) -> Result<String> {
    ensure!(is_root(), "loading the programs needs root");
    build::tests_bin(workspace, "lb-verify")?;
    let mut verify = workspace.command(workspace.release("lb-verify"));
    if bless {
        verify.env(BLESS, "1");
    }
    captured(workspace, "lb-verify", &mut verify)
}

fn silent(workspace: &Workspace, name: &str, command: &mut Command) -> Result<String> {
    captured(workspace, name, command).map(|_| String::new())
}

/// What the command printed; as the error when it failed.
fn captured(workspace: &Workspace, name: &str, command: &mut Command) -> Result<String> {
    let log = workspace.log(name);
    let result = run::logged(command, &log);
    let output = fs::read(&log).with_context(|| format!("cannot read {}", log.display()));
    let output = output.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    match result {
        Ok(()) => output,
        Err(error) => match output {
            Ok(text) if !text.trim().is_empty() => Err(anyhow::anyhow!("{}", text.trim_end())),
            _ => Err(error),
        },
    }
}
