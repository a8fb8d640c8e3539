//! Upstream's end-to-end tests: `lb_tests::tools::e2e` as a program. Ends with the line
//! `N passed, N failed`.

use std::process::ExitCode;

use clap::Parser;
use lb_tests::harness::real::cni::Cni;
use lb_tests::tools::e2e::{self, Choice, Outcome};

/// Runs upstream's end-to-end tests of sig-network on a cluster of real nodes.
#[derive(Parser)]
struct Cli {
    /// The network of pods.
    #[arg(long, default_value = "ptp")]
    cni: Cni,
    /// Run only the tests whose name contains TEXT.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Leave the cluster up.
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let choice = Choice { cni: cli.cni, only: cli.only, keep: cli.keep };
    let outcome = e2e::run(&choice)
        .unwrap_or_else(|error| Outcome { passed: 0, failures: vec![format!("{error:#}")] });
    println!();
    for failure in &outcome.failures {
        println!("FAILED {}", failure.replace('\n', " "));
    }
    println!("{} passed, {} failed", outcome.passed, outcome.failures.len());
    if outcome.failures.is_empty() && outcome.passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
