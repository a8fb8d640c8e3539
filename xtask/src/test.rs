//! `cargo xtask test`: every test there is, tier by tier.
//!
//! Ends with the plain line `N passed, N failed` whatever happens, so that
//! whoever reads the output need not know what a tier is. A test that cannot
//! run has failed.

mod count;
mod tier;

use std::io::{BufRead, BufReader, Write, stdout};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use self::count::{Counter, Outcome};
use self::tier::{Step, TIERS, Tier};
use crate::progress::seconds;
use crate::workspace::{Workspace, is_root};
use crate::{build, build_ebpf, setup};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Tiers to run; all of them by default
    #[arg(value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::new(TIERS.map(|tier| tier.name)))]
    names: Vec<String>,
}

/// What one tier came to.
struct Row {
    tier: &'static str,
    outcome: Outcome,
    took: Duration,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    let chosen: Vec<&Tier> = TIERS
        .iter()
        .filter(|tier| args.names.is_empty() || args.names.iter().any(|name| name == tier.name))
        .collect();
    let rows = match prepare(workspace, &chosen) {
        Ok(tests) => run_tiers(workspace, &chosen, &tests),
        Err(error) => vec![Row {
            tier: "setup",
            outcome: Outcome::failure(format!("{error:#}")),
            took: Duration::ZERO,
        }],
    };
    let passed: usize = rows.iter().map(|row| row.outcome.passed).sum();
    let failed: usize = rows.iter().map(|row| row.outcome.failed).sum();
    println!("\n{}", summary(&rows));
    if passed + failed == 0 {
        println!("no test ran");
    }
    println!("{passed} passed, {failed} failed");
    stdout().flush().context("cannot write the result")?;
    Ok(if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Sets up and builds what the tiers need; returns the integration tests.
fn prepare(workspace: &Workspace, chosen: &[&Tier]) -> Result<Vec<String>> {
    let tests = workspace.integration_tests()?;
    tier::refuse_strays(&tests)?;
    let used = |tier: &&&Tier| !tier.steps(&tests).is_empty();
    let scope = if chosen.iter().filter(used).any(|tier| tier.control_plane) {
        setup::Scope::All
    } else {
        setup::Scope::Build
    };
    setup::ensure(workspace, scope)?;
    if chosen.iter().filter(used).any(|tier| tier.programs) {
        build::agent(workspace)?;
        build::tests_bins(workspace)?;
    } else {
        build_ebpf::object(workspace, false)?;
    }
    Ok(tests)
}

fn run_tiers(workspace: &Workspace, chosen: &[&'static Tier], tests: &[String]) -> Vec<Row> {
    let mut rows = Vec::new();
    for tier in chosen {
        let started = Instant::now();
        let mut outcome = Outcome::default();
        let steps = tier.steps(tests);
        if tier.root && !steps.is_empty() && !is_root() {
            outcome = Outcome::failure(
                "needs root to load programs and make network namespaces".to_owned(),
            );
        } else {
            for step in steps {
                println!("\n== {}: {}", tier.name, step.label);
                outcome.add(&step.label, run_step(workspace, &step));
            }
        }
        rows.push(Row { tier: tier.name, outcome, took: started.elapsed() });
    }
    rows
}

fn run_step(workspace: &Workspace, step: &Step) -> Outcome {
    let mut command = workspace.cargo("test");
    command.args(&step.arguments);
    stream(&mut command).unwrap_or_else(|error| Outcome::failure(format!("{error:#}")))
}

/// Runs cargo test, shows its output as it comes and counts it.
fn stream(command: &mut Command) -> Result<Outcome> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let output = child.stdout.take().context("cargo has no output")?;
    let mut counter = Counter::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("cannot read cargo's output")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        counter.line(&line);
    }
    let status = child.wait().context("cannot wait for cargo")?;
    Ok(counter.finish(&status.to_string(), status.success()))
}

fn summary(rows: &[Row]) -> String {
    let mut lines = vec![format!(
        "{:<8} {:>7} {:>7} {:>8} {:>8}",
        "tier", "passed", "failed", "ignored", "time"
    )];
    for Row { tier, outcome, took } in rows {
        lines.push(format!(
            "{tier:<8} {:>7} {:>7} {:>8} {:>8}",
            outcome.passed,
            outcome.failed,
            outcome.ignored,
            seconds(*took)
        ));
    }
    for row in rows {
        for failure in &row.outcome.failures {
            lines.push(format!("FAILED {} {failure}", row.tier));
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_repeats_every_failure_with_its_tier() {
        let mut outcome = Outcome::failure("a::b".to_owned());
        outcome.passed = 3;
        let rows = [Row { tier: "kernel", outcome, took: Duration::from_secs(2) }];
        let text = summary(&rows);
        assert!(text.contains("kernel         3       1        0     2.0s"), "{text}");
        assert!(text.ends_with("FAILED kernel a::b"), "{text}");
    }

    #[test]
    fn output_is_counted_while_it_streams() {
        let script = "echo 'test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured'; exit 0";
        let outcome = stream(Command::new("sh").args(["-c", script])).expect("sh starts");
        assert_eq!((outcome.passed, outcome.failed), (2, 0));
        let outcome = stream(Command::new("sh").args(["-c", "exit 101"])).expect("sh starts");
        assert_eq!((outcome.passed, outcome.failed), (0, 1));
    }
}
