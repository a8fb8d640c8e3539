//! `cargo xtask check`: the checks that run no tests of behaviour.
//!
//! Prints one line per step. The output of a step is shown only if it fails, except the
//! verifier's table.

mod columns;
mod dependencies;
mod licence;
mod metadata;
mod order;
mod reasons;
mod references;
mod source;

use std::fs;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::progress::seconds;
use crate::workspace::{Workspace, is_root};
use crate::{build, build_ebpf, run, setup};

/// The variable that tells golden tests to rewrite their files.
const BLESS: &str = "LB_BLESS";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Rewrite the layout and verifier goldens
    #[arg(long)]
    bless: bool,
    /// Run only the steps whose name contains TEXT
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// One step; it returns the text to show, or why it failed.
struct Step<'a> {
    name: &'static str,
    run: Box<dyn Fn() -> Result<String> + 'a>,
}

impl<'a> Step<'a> {
    fn new(name: &'static str, run: impl Fn() -> Result<String> + 'a) -> Self {
        Self { name, run: Box::new(run) }
    }
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    let of_sources = chosen(of_sources(workspace), args.only.as_deref());
    let of_builds = chosen(of_builds(workspace, args.bless), args.only.as_deref());
    ensure!(
        !of_sources.is_empty() || !of_builds.is_empty(),
        "no step has a name that contains `{}`",
        args.only.as_deref().unwrap_or_default()
    );
    setup::ensure(workspace, setup::Scope::Build)?;
    let mut failed = Vec::new();
    all(&of_sources, &mut failed);
    if !of_builds.is_empty() {
        // lb-agent embeds the object, so nothing below compiles without it.
        build::agent(workspace)?;
        all(&of_builds, &mut failed);
    }
    if failed.is_empty() {
        println!("check: ok");
        return Ok(ExitCode::SUCCESS);
    }
    println!("check: failed: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}

fn chosen<'a>(mut steps: Vec<Step<'a>>, only: Option<&str>) -> Vec<Step<'a>> {
    steps.retain(|step| only.is_none_or(|text| step.name.contains(text)));
    steps
}

fn all(steps: &[Step<'_>], failed: &mut Vec<&'static str>) {
    for step in steps {
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
}

/// Steps that only read files.
fn of_sources(workspace: &Workspace) -> Vec<Step<'_>> {
    vec![
        Step::new("formatting", || {
            let mut fmt = workspace.cargo("fmt");
            silent(workspace, "fmt", fmt.args(["--all", "--check"]))
        }),
        Step::new("module order", || order::check(workspace)),
        Step::new("columns of get", || columns::check(workspace)),
        Step::new("reasons", || reasons::check(workspace)),
        Step::new("references", || references::check(workspace)),
        Step::new("licences of lb", || licence::check(workspace)),
        Step::new("dependencies", || dependencies::rules(workspace)),
        Step::new("advisories", || dependencies::advisories(workspace)),
    ]
}

fn of_builds(workspace: &Workspace, bless: bool) -> Vec<Step<'_>> {
    let mut steps = vec![
        Step::new("clippy", || {
            let mut clippy = workspace.cargo("clippy");
            clippy
                .args(["--workspace", "--exclude", "lb-ebpf", "--exclude", "lb-bench-ebpf"])
                .arg("--all-targets")
                // All features but next-layout, which changes types that tests write out in full.
                .args(["--features", "lb-agent/ebpf-log", "--", "-Dwarnings"]);
            silent(workspace, "clippy", &mut clippy)
        }),
        Step::new("clippy of the programs", || {
            let mut clippy = build_ebpf::clippy(workspace, &[]);
            silent(workspace, "clippy-ebpf", &mut clippy)
        }),
        Step::new("clippy of the handover", || {
            let mut clippy = build_ebpf::clippy(workspace, &["--features", "lb-ebpf/handover"]);
            silent(workspace, "clippy-ebpf-handover", &mut clippy)
        }),
        Step::new("rustc of the programs", || {
            let mut check = build_ebpf::deny_warnings(workspace)?;
            silent(workspace, "rustc-ebpf", &mut check)
        }),
        Step::new("layout golden", move || layout(workspace, bless)),
    ];
    if workspace.has_tests_bin("lb-verify") {
        steps.push(Step::new("verifier golden", move || verifier(workspace, bless)));
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
        "lb-testing has no test whose name contains `layout`"
    );
    Ok(String::new())
}

fn verifier(workspace: &Workspace, bless: bool) -> Result<String> {
    ensure!(
        is_root(),
        "the step loads the eBPF programs: run it as root, or choose other steps with --only"
    );
    build::tool(workspace, "lb-verify")?;
    let mut verify = workspace.command(workspace.tool("lb-verify"));
    if bless {
        verify.env(BLESS, "1");
    }
    captured(workspace, "lb-verify", &mut verify)
}

fn silent(workspace: &Workspace, name: &str, command: &mut Command) -> Result<String> {
    captured(workspace, name, command).map(|_| String::new())
}

/// The output of the command; it is the error if the command fails.
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
