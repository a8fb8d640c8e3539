//! The rows of behaviour, through the programs as this kernel runs them.

use anyhow::ensure;
use lb_common::abi::address::{Ipv4, Ipv6};
use lb_testing::bench::{self, Tally};
use lb_testing::rows;
use serde_json::json;

use super::Report;
use crate::harness::flows::{Kernel, KernelFamily};
use crate::harness::programs::in_private_namespace;

pub(super) fn run(report: &mut Report) {
    for has_xdp in [false, true] {
        family::<Ipv4>(report, has_xdp);
        family::<Ipv6>(report, has_xdp);
    }
}

fn family<F: KernelFamily>(report: &mut Report, has_xdp: bool) {
    let before = if has_xdp { "with XDP before tc" } else { "at tc" };
    let name = format!("rows for IPv{}, {before}", F::NUMBER);
    let mut tally = Tally::default();
    report.run(&name, || {
        tally = in_private_namespace(|| {
            let kernel = Kernel::<F>::load()?;
            let mut kernel = if has_xdp { kernel.with_xdp() } else { kernel };
            Ok(bench::run(&mut kernel, &rows::all()))
        })?;
        let failed = &tally.failed;
        ensure!(failed.is_empty(), "{} rows failed: {}", failed.len(), failed.join("; "));
        Ok(())
    });
    let Tally { held, failed, untestable } = tally;
    report.fact(&name, json!([held, failed.len(), untestable.len()]));
}
