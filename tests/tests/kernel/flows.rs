//! The rows of behaviour, on the loaded programs.

use anyhow::Result;
use lb_common::abi::address::{Ipv4, Ipv6};
use lb_testing::{bench, rows};
use lb_tests::harness::flows::{Kernel, KernelFamily};
use lb_tests::harness::programs::in_private_namespace;

fn check<F: KernelFamily>(kernel: impl FnOnce(Kernel<F>) -> Kernel<F> + Send) -> Result<()> {
    in_private_namespace(|| {
        bench::run(&mut kernel(Kernel::load()?), &rows::all()).expect_all();
        Ok(())
    })
}

#[test]
fn every_row_holds_for_ipv4_with_xdp_before_tc() -> Result<()> {
    check::<Ipv4>(Kernel::with_xdp)
}

#[test]
fn every_row_holds_for_ipv6_with_xdp_before_tc() -> Result<()> {
    check::<Ipv6>(Kernel::with_xdp)
}

#[test]
fn every_row_holds_for_ipv4() -> Result<()> {
    check::<Ipv4>(|kernel| kernel)
}

#[test]
fn every_row_holds_for_ipv6() -> Result<()> {
    check::<Ipv6>(|kernel| kernel)
}
