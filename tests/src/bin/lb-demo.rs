//! Shows every kind of access to a Service on two nodes made of network namespaces:
//! `lb_tests::tools::demo` as a program.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use lb_tests::tools::demo::stop::Stop;
use lb_tests::tools::demo::{Report, keep, run};

/// Shows every kind of access to a Service on two nodes; exit status 0 if all is as promised.
#[derive(Parser)]
struct Cli {
    /// Leave nodes, pods and agents running and print how to look around
    #[arg(long)]
    keep: bool,
    /// The background process of --keep
    #[arg(long, hide = true)]
    hold: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = if cli.keep { keep::in_background() } else { show(cli.hold) };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn show(hold: bool) -> Result<ExitCode> {
    let stop = Stop::listen()?;
    let mut report = Report::default();
    let world = match run(&mut report, stop) {
        Ok(world) => world,
        Err(_) if stop.signal().is_some() => {
            eprintln!("interrupted, and cleaned up");
            return Ok(ExitCode::from(130));
        }
        Err(error) => return Err(error),
    };
    report.summary();
    let status = u8::from(!report.is_as_promised());
    if hold {
        keep::explain(&world, &mut report)?;
        keep::detach(status)?;
        stop.wait();
    }
    Ok(ExitCode::from(status))
}
