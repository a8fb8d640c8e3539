//! Tests on the host beside the behaviour cases, which `tests/cases.rs` runs.

mod layout;
mod parser;
mod reasons;
mod sockets;

use super::{
    family::TestFamily,
    frame::Frame,
    host::Host,
    interpreter::{Fate, Interpreter, Outcome},
    site::TestSite,
    world::{Location, World, at},
};
use lb_common::{
    abi::{
        address::{Ipv4, Ipv6},
        counter::Reason,
        frontend::{TCP, UDP},
    },
    packet::SYN,
};

/// Full and inconsistent tables: states that a test cannot bring about in the kernel's maps.
fn check_full<F: TestFamily>() {
    for protocol in [TCP, UDP] {
        let mut host = Host::<F>::new(0);
        let mut world = World::<F>::default();
        let index = world.add_service(at(F::vip(1), 80), protocol);
        world.add_backend(index, at(F::remote_pod(1), 8080), Location::OtherNode);
        host.load(&world);
        host.tables.full = true;
        let frame = Frame::<F>::of(protocol, at(F::pod(1), 1000), at(F::vip(1), 80), SYN);
        let outcome = host.send(TestSite::FromPod, &frame.bytes());
        assert_eq!(outcome, Outcome { reason: Reason::FlowTableFull, fate: Fate::Dropped });
        world.services.truncate(1);
        host.load(&world);
        let outcome = host.send(TestSite::FromPod, &frame.bytes());
        assert_eq!(outcome, Outcome { reason: Reason::TableInconsistent, fate: Fate::Dropped });
    }
}

#[test]
fn a_full_or_inconsistent_table_drops() {
    check_full::<Ipv4>();
    check_full::<Ipv6>();
}
