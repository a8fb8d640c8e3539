//! The rows on the host.

mod layout;
mod parser;
mod sockets;

use super::{
    cases,
    family::TestFamily,
    frame::Frame,
    host::Host,
    scene::{self, End, Lab, Outcome, Place},
    world::{Where, World, at},
};
use lb_common::{
    abi::{
        address::{Ipv4, Ipv6},
        counter::Reason,
        frontend::{TCP, UDP},
    },
    packet::SYN,
};

/// Runs every row with clocks that start at ordinary times and just before the 32 bits
/// of ticks wrap around.
fn check<F: TestFamily>() {
    const STARTS: [u32; 4] = [1_000_000, 0, u32::MAX - 10, u32::MAX - 20_000];
    let failed: Vec<String> = STARTS
        .into_iter()
        .flat_map(|start| {
            let mut all = cases::all();
            all.extend(cases::clock::rows());
            let tally = scene::run(&mut Host::<F>::new(start), &all);
            tally.failed.into_iter().map(move |row| format!("{row} with a clock from {start}"))
        })
        .collect();
    assert!(failed.is_empty(), "rows that failed:\n{}", failed.join("\n"));
}

/// What cannot be brought about in the kernel's tables at will.
fn check_full<F: TestFamily>() {
    for protocol in [TCP, UDP] {
        let mut host = Host::<F>::new(0);
        let mut world = World::<F>::default();
        let index = world.add_service(at(F::vip(1), 80), protocol);
        world.add_backend(index, at(F::remote_pod(1), 8080), Where::Elsewhere);
        host.load(&world);
        host.tables.full = true;
        let frame = Frame::<F>::of(protocol, at(F::pod(1), 1000), at(F::vip(1), 80), SYN);
        let outcome = host.send(Place::FromPod, &frame.bytes());
        assert_eq!(outcome, Outcome { reason: Reason::FlowTableFull, end: End::Dropped });
        world.services.truncate(1);
        host.load(&world);
        let outcome = host.send(Place::FromPod, &frame.bytes());
        assert_eq!(outcome, Outcome { reason: Reason::TableInconsistent, end: End::Dropped });
    }
}

#[test]
fn a_table_that_takes_no_entry_drops() {
    check_full::<Ipv4>();
    check_full::<Ipv6>();
}

#[test]
fn every_row_holds_for_ipv4() {
    check::<Ipv4>();
}

#[test]
fn every_row_holds_for_ipv6() {
    check::<Ipv6>();
}
