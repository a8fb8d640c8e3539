//! The rows on the host.

use super::{bench, family::TestFamily, host::Host, rows};
use crate::abi::address::{Ipv4, Ipv6};

/// Runs every row with clocks that start at ordinary times and just before the 32 bits
/// of ticks wrap around.
fn check<F: TestFamily>() {
    const STARTS: [u32; 4] = [1_000_000, 0, u32::MAX - 10, u32::MAX - 20_000];
    let failed: Vec<String> = STARTS
        .into_iter()
        .flat_map(|start| {
            let failed = bench::run(&mut Host::<F>::new(start), &rows::all());
            failed.into_iter().map(move |row| format!("{row} with a clock from {start}"))
        })
        .collect();
    assert!(failed.is_empty(), "rows that failed:\n{}", failed.join("\n"));
}

#[test]
fn every_row_holds_for_ipv4() {
    check::<Ipv4>();
}

#[test]
fn every_row_holds_for_ipv6() {
    check::<Ipv6>();
}
