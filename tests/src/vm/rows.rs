//! The rows of behaviour, through the programs as this kernel runs them.

use anyhow::{Result, ensure};
use lb_common::abi::address::{Ipv4, Ipv6};
use lb_common::testing::bench;
use lb_common::testing::rows;

use super::Report;
use crate::flows::{Kernel, KernelFamily};
use crate::programs::in_private_namespace;

pub(super) fn run(report: &mut Report) {
    // Rows panic where they fail: what they say goes to the console.
    for has_xdp in [false, true] {
        family::<Ipv4>(report, has_xdp);
        family::<Ipv6>(report, has_xdp);
    }
}

fn family<F: KernelFamily>(report: &mut Report, has_xdp: bool) {
    let before = if has_xdp { "with XDP before tc" } else { "at tc" };
    let name = format!("every row holds for IPv{}, {before}", F::NUMBER);
    let mut tried = 0;
    let result = in_private_namespace(|| {
        let kernel = Kernel::<F>::load()?;
        let mut kernel = if has_xdp { kernel.with_xdp() } else { kernel };
        let all = rows::all();
        tried = all.iter().map(|row| row.protocols.len()).sum();
        Ok(bench::run(&mut kernel, &all))
    });
    report.test(name, result.and_then(|failed| judged(&failed, tried)));
}

fn judged(failed: &[String], tried: usize) -> Result<()> {
    ensure!(failed.is_empty(), "{} of {tried} rows failed: {}", failed.len(), failed.join("; "));
    Ok(())
}
