//! Runs files of flow vectors: `lb_tests::tools::vectors` as a program. Ends with the line
//! `N passed, N failed`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use lb_tests::tools::vectors::{self, report::Report};

/// Compares lb with kube-proxy's answers, flow by flow, and with docs/semantics.md where lb
/// differs on purpose.
#[derive(Parser)]
struct Cli {
    /// Files of vectors; those of the repository by default
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Run only groups whose id contains this
    #[arg(long, value_name = "TEXT")]
    group: Option<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut report = Report::default();
    let files = if cli.files.is_empty() { vectors::own_files() } else { Ok(cli.files) };
    let result = files.and_then(|files| {
        let only = cli.group.as_deref();
        files.iter().try_for_each(|file| vectors::run(file, only, &mut report))
    });
    if let Err(error) = result {
        report.broken(&error);
    }
    report.summary();
    if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
