//! The behaviour cases, in the programs as this kernel runs them.

use anyhow::ensure;
use lb_common::abi::address::{Ipv4, Ipv6};
use lb_testing::cases;
use serde_json::json;

use super::Report;
use crate::harness::kernel::{Kernel, KernelFamily};
use crate::harness::programs::in_private_namespace;

pub(super) fn run(report: &mut Report) {
    for has_xdp in [false, true] {
        family::<Ipv4>(report, has_xdp);
        family::<Ipv6>(report, has_xdp);
    }
}

/// The results of the cases.
#[derive(Default)]
struct Tally {
    passed: usize,
    /// The names of those that failed; their panics are on the console.
    failed: Vec<String>,
}

fn family<F: KernelFamily>(report: &mut Report, has_xdp: bool) {
    let before = if has_xdp { "with XDP before tc" } else { "at tc" };
    let name = format!("cases for IPv{}, {before}", F::NUMBER);
    let mut tally = Tally::default();
    report.run(&name, || {
        tally = in_private_namespace(|| {
            let kernel = Kernel::<F>::load()?;
            Ok(run_all(if has_xdp { kernel.with_xdp() } else { kernel }))
        })?;
        let failed = &tally.failed;
        ensure!(failed.is_empty(), "{} cases failed: {}", failed.len(), failed.join("; "));
        Ok(())
    });
    let Tally { passed, failed } = tally;
    report.fact(&name, json!([passed, failed.len()]));
}

fn run_all<F: KernelFamily>(mut kernel: Kernel<F>) -> Tally {
    let mut tally = Tally::default();
    for case in cases::all::<F>() {
        match case.run(&mut kernel) {
            Ok(()) => tally.passed += 1,
            Err(_) => tally.failed.push(case.to_string()),
        }
    }
    tally
}
