//! How many of the node's source ports the flows to each backend use.
//!
//! A flow that gets an address of the node as its source, or another port, takes a source port for as
//! long as its entry is in the table, and the same port serves one flow of each backend. So ports run out
//! for one backend alone, while there are plenty for all others. The programs count the flows that they
//! refuse by Service; this says which backend it is, and before flows are refused.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
};

use lb_common::abi::{
    address::{Address, Be16},
    flow::Tuple,
    frontend::TCP,
    settings::PortRange,
    traffic::NO_SERVICE,
};

use super::flow_table::LiveFlow;
use crate::report::PortUse;

/// Backends of which fewer percent of the source ports are in use are not worth a word: then a program
/// that tries 42 ports finds none for one new flow in three million.
pub const CROWDED: u32 = 70;
/// From this percentage on, one new flow in a hundred finds no port.
pub const EXHAUSTED: u32 = 90;
/// How many backends metrics and reports name at most.
pub const NAMED: usize = 5;
/// The most backends that are counted, which bounds the memory. The flows of a backend that has thousands
/// are spread over the table, so the sweep meets one of them early.
const TOLD_APART: usize = 65_536;

/// Counts the flows of a family.
#[derive(Debug)]
pub(super) struct PortCounts<A> {
    range: PortRange,
    counts: HashMap<PortsOf<A>, u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct PortsOf<A> {
    address: A,
    backend: A,
    port: Be16,
    protocol: u8,
}

impl<A: Address> PortCounts<A> {
    /// None yet, of ports in this range.
    pub(super) fn new(range: PortRange) -> Self {
        Self { range, counts: HashMap::new() }
    }

    /// Counts a flow if it has one of the ports.
    pub(super) fn add(&mut self, flow: &LiveFlow<A>) {
        let Tuple { source, destination, source_port, destination_port } = flow.entry.translated;
        let client = &flow.entry.request;
        let is_kept = client.source == source && client.source_port == source_port;
        // One of no Service holds a port that the kernel gave.
        let is_taken = !is_kept || flow.entry.service == NO_SERVICE;
        if !is_taken || !self.range.contains(source_port.get()) {
            return;
        }
        let key = PortsOf {
            address: source,
            backend: destination,
            port: destination_port,
            protocol: flow.protocol(),
        };
        if let Some(count) = self.counts.get_mut(&key) {
            *count += 1;
        } else if self.counts.len() < TOLD_APART {
            self.counts.insert(key, 1);
        }
    }

    /// Those that are [`CROWDED`].
    pub(super) fn crowded<I: Into<IpAddr>>(self, ip: impl Fn(A) -> I) -> Vec<PortUse> {
        let ports = u32::from(self.range.count);
        let uses = self.counts.into_iter().map(|(key, used)| PortUse {
            address: ip(key.address).into(),
            backend: SocketAddr::new(ip(key.backend).into(), key.port.get()),
            protocol: if key.protocol == TCP { "tcp" } else { "udp" }.to_owned(),
            used,
            ports,
        });
        uses.filter(|of_backend| of_backend.percent() >= CROWDED).collect()
    }
}

/// Sorts them, the worst one first.
pub(super) fn sort(uses: &mut [PortUse]) {
    uses.sort_unstable_by_key(|of_backend| {
        (u32::MAX - of_backend.used, of_backend.backend, of_backend.address)
    });
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use lb_common::{
        abi::{
            address::Address4,
            flow_table::{FlowEntry, RequestWord},
            frontend::UDP,
        },
        flow_table::IS_UDP,
    };

    use super::*;

    const RANGE: PortRange = PortRange { first: 1024, count: 10 };

    /// A flow from 192.0.2.9:5000 to the backend, as which source it arrives there.
    fn flow(source: &str, backend: &str, protocol: u8) -> LiveFlow<Address4> {
        let end = |text: &str| -> (Address4, Be16) {
            let end: std::net::SocketAddrV4 = text.parse().unwrap();
            ((*end.ip()).into(), Be16::new(end.port()))
        };
        let (client, client_port) = end("192.0.2.9:5000");
        let ((source, source_port), (destination, destination_port)) = (end(source), end(backend));
        let translated = Tuple { source, destination, source_port, destination_port };
        let request = Tuple { source: client, source_port: client_port, ..translated };
        let state = if protocol == UDP { IS_UDP } else { 0 };
        let word = RequestWord::default().claimed(1).live(state, 100);
        let entry = FlowEntry { request, translated, service: 3, ..FlowEntry::default() };
        LiveFlow { place: 0, word, entry }
    }

    fn crowded(flows: &[LiveFlow<Address4>]) -> Vec<PortUse> {
        let mut counts = PortCounts::new(RANGE);
        flows.iter().for_each(|flow| counts.add(flow));
        let mut found = counts.crowded(Ipv4Addr::from);
        sort(&mut found);
        found
    }

    /// Flows from these source ports of the node.
    fn flows(ports: std::ops::Range<u16>, backend: &str, protocol: u8) -> Vec<LiveFlow<Address4>> {
        ports.map(|port| flow(&format!("10.0.0.1:{port}"), backend, protocol)).collect()
    }

    #[test]
    fn ports_run_out_for_one_backend_and_protocol() {
        let mut all = flows(1024..1031, "10.1.0.1:53", UDP);
        all.extend(flows(1024..1034, "10.1.0.2:53", UDP));
        all.extend(flows(1024..1030, "10.1.0.1:53", TCP));
        let found = crowded(&all);
        let texts: Vec<_> = found.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "backend 10.1.0.2:53/udp: 10 of 10 source ports of 10.0.0.1 are in use",
                "backend 10.1.0.1:53/udp: 7 of 10 source ports of 10.0.0.1 are in use",
            ]
        );
        assert_eq!(found.iter().map(PortUse::percent).collect::<Vec<_>>(), [100, 70]);
        assert!(
            !found[0].is_same(&found[1])
                && found[0].is_same(&PortUse { used: 1, ..found[0].clone() })
        );
    }

    #[test]
    fn a_client_s_own_port_and_one_outside_of_the_range_are_not_taken() {
        let range = PortRange { first: 5000, count: 1 };
        let count = |flow: &LiveFlow<Address4>, range| {
            let mut counts = PortCounts::new(range);
            counts.add(flow);
            counts.crowded(Ipv4Addr::from).len()
        };
        let own = flow("192.0.2.9:5000", "10.1.0.1:53", UDP);
        assert_eq!(count(&own, range), 0);
        let mut reserved = own;
        reserved.entry.service = NO_SERVICE;
        assert_eq!(count(&reserved, range), 1, "a connection of the kernel has it");
        let of_node = flow("10.0.0.1:5000", "10.1.0.1:53", UDP);
        assert_eq!([count(&of_node, range), count(&of_node, RANGE)], [1, 0]);
        assert_eq!(count(&of_node, PortRange::default()), 0, "there are none");
    }

    #[test]
    fn the_worst_backends_come_first() {
        let mut all = Vec::new();
        for backend in 1..=5 {
            all.extend(flows(1024..1024 + 6 + backend % 3, &format!("10.1.0.{backend}:80"), TCP));
        }
        let of = |found: &PortUse| (found.used, found.backend.to_string());
        let expected = [(8, 2), (8, 5), (7, 1), (7, 4)];
        let expected = expected.map(|(used, number)| (used, format!("10.1.0.{number}:80")));
        assert_eq!(crowded(&all).iter().map(of).collect::<Vec<_>>(), expected);
    }
}
