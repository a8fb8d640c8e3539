//! `cargo xtask vm`: runs the kernel-dependent tests on other kernels, each in a virtual machine.
//!
//! Kernels and qemu are Debian packages that are unpacked into the cache and never installed. A
//! machine has no disk and no network: its initramfs contains `lb-vm` of the tests crate as the
//! first process, which prints its results on the serial console.

mod cpio;
mod debian;
mod image;
mod machine;
mod modules;
mod report;

use std::io::{Write, stdout};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use self::report::Results;
use crate::progress::seconds;
use crate::test::count::Outcome;
use crate::workspace::Workspace;
use crate::{build, setup};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Kernels to boot; all of them by default
    #[arg(value_name = "KERNEL", value_parser = clap::builder::PossibleValuesParser::new(KERNELS.map(|kernel| kernel.name)))]
    names: Vec<String>,
    /// Write the golden file of instruction counts. The table for docs/kernels.md is always printed
    #[arg(long)]
    bless: bool,
    /// Parts to run; all of them by default
    #[arg(long, value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(PARTS))]
    only: Vec<String>,
}

/// The parts, which `lb_tests::tools::vm` has.
const PARTS: [&str; 5] = ["load", "cases", "connections", DEVICES, "ipvs"];
/// The part that needs NICs.
const DEVICES: &str = "devices";
/// The parts that need more modules and tools.
const WITH_MORE: [&str; 2] = [DEVICES, "ipvs"];

/// A kernel to test, and the Debian releases that have it.
struct Kernel {
    /// Its name here, and part of its directory's name in the cache.
    name: &'static str,
    suites: &'static [&'static str],
}

/// Oldest first. The newest version in the named releases is used.
const KERNELS: [Kernel; 3] = [
    Kernel { name: "6.1", suites: &["bookworm"] },
    Kernel { name: "6.12", suites: &["bookworm-backports"] },
    Kernel { name: "newest", suites: &["trixie-backports", "sid"] },
];

/// The time limit of a machine.
const LIMIT: Duration = Duration::from_secs(1200);

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    if setup::can_install() {
        setup::ensure(workspace, setup::Scope::Build)?;
    }
    build::agent(workspace)?;
    build::tools(workspace)?;
    let chosen = KERNELS.iter().filter(|kernel| {
        args.names.is_empty() || args.names.iter().any(|name| name == kernel.name)
    });
    let mut all = Vec::new();
    for kernel in chosen {
        let results = try_kernel(workspace, kernel, &args.only)
            .unwrap_or_else(|error| Results::failure(kernel.name, &error));
        println!("{}", results.line());
        results.failures().for_each(|failure| println!("  FAILED {failure}"));
        all.push(results);
    }
    report::compare(workspace, &mut all, args.bless)?;
    println!("\n{}", report::table(&all));
    let passed: usize = all.iter().map(|results| results.passed).sum();
    let failed: usize = all.iter().map(|results| results.failed).sum();
    println!("{passed} passed, {failed} failed");
    stdout().flush().context("cannot write the result")?;
    Ok(if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The part that `cargo xtask test` runs on the oldest kernel: whether it accepts the programs, which
/// takes a minute or two. The other parts take many times as long.
pub(crate) fn outcome(workspace: &Workspace, name: &str) -> Outcome {
    let only = ["load".to_owned()];
    let tried = KERNELS
        .iter()
        .find(|kernel| kernel.name == name)
        .with_context(|| format!("unknown kernel {name}"))
        .and_then(|kernel| try_kernel(workspace, kernel, &only))
        .and_then(|results| {
            let mut all = [results];
            report::compare(workspace, &mut all, false)?;
            Ok(all.map(Results::outcome))
        });
    match tried {
        Ok([outcome]) => outcome,
        Err(error) => Outcome::failure(format!("{error:#}")),
    }
}

/// Boots one kernel and waits for its results. The programs are built.
fn try_kernel(workspace: &Workspace, kernel: &Kernel, only: &[String]) -> Result<Results> {
    let all = PARTS.map(str::to_owned);
    let only = if only.is_empty() { &all[..] } else { only };
    let has_more = only.iter().any(|part| WITH_MORE.contains(&part.as_str()));
    let qemu = debian::qemu(workspace)?;
    let extra: &[&str] = if has_more { &modules::MORE } else { &[] };
    let release = debian::kernel(workspace, kernel, extra)?;
    let image = image::write(workspace, &release, has_more)?;
    let log = workspace.log(&format!("vm-{}", kernel.name));
    let console = machine::boot(&qemu, &release, &image, only, &log, LIMIT)?;
    let mut results = Results::parse(kernel.name, &console.text);
    results.took = console.took;
    ensure!(
        results.is_whole || results.failed > 0,
        "the machine ended after {}, before all tests had run; see its console in {}",
        seconds(console.took),
        log.display()
    );
    if !results.is_whole {
        results.fail(format!(
            "the machine ended before all tests had run; see its console in {}",
            log.display()
        ));
    }
    Ok(results)
}
