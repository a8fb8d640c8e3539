//! The rows of behaviour, on the loaded programs.

use anyhow::Result;
use lb_common::abi::address::{Ipv4, Ipv6};
use lb_common::testing::{bench, rows};
use lb_tests::flows::Kernel;
use lb_tests::programs::in_private_namespace;

#[test]
fn every_row_holds_with_xdp_before_tc() -> Result<()> {
    in_private_namespace(|| {
        let mut failed = bench::run(&mut Kernel::<Ipv4>::load()?.with_xdp(), &rows::all());
        failed.extend(bench::run(&mut Kernel::<Ipv6>::load()?.with_xdp(), &rows::all()));
        assert!(failed.is_empty(), "rows that failed:\n{}", failed.join("\n"));
        Ok(())
    })
}

#[test]
fn every_row_holds_for_ipv4() -> Result<()> {
    in_private_namespace(|| {
        let failed = bench::run(&mut Kernel::<Ipv4>::load()?, &rows::all());
        assert!(failed.is_empty(), "rows that failed:\n{}", failed.join("\n"));
        Ok(())
    })
}

#[test]
fn every_row_holds_for_ipv6() -> Result<()> {
    in_private_namespace(|| {
        let failed = bench::run(&mut Kernel::<Ipv6>::load()?, &rows::all());
        assert!(failed.is_empty(), "rows that failed:\n{}", failed.join("\n"));
        Ok(())
    })
}
