//! The flows that packets belong to, numbered as the wrappers number them.

use anyhow::{Context, Result};
use aya::Ebpf;
use lb_common::abi::{
    address::Be16,
    flow::{ANSWERED, Action, Flow, FlowKey, NextHop, ONE_WAY, Tuple},
    frontend::UDP,
};

use super::{
    abi::{address_bits, port_bits},
    namespace::{EPOCH, OTHER_NODE, ROUTER},
    tables::{
        BACKENDS, CLIENTS, DSR_NODE_PORTS, NEW_CLIENTS, NEW_PODS, NODE_PORTS, NODES, PODS, PORTS,
        Side, THIS_NODE, backend, cluster_ip, dsr_service_of, service_of,
    },
};

/// An entry of FLOWS.
pub type FlowEntry<A> = (FlowKey<A>, Flow<A>);

/// A packet as it comes and as it goes.
pub type Translation<A> = (Tuple<A>, Tuple<A>);

/// Who asks what, and how it reaches a backend on another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A pod asks a ClusterIP.
    Pod,
    /// A process of the node asks a ClusterIP.
    NodeProcess,
    /// A client outside asks a node port; the backend sees the node.
    Snat,
    /// A client outside asks a node port; the packet goes to the backend's node in a tunnel,
    /// and the answer goes past this node.
    Dsr,
}

impl Way {
    /// The node port that clients ask for, TCP then UDP.
    fn node_ports(self) -> Option<[u16; 2]> {
        match self {
            Self::Pod | Self::NodeProcess => None,
            Self::Snat => Some(NODE_PORTS),
            Self::Dsr => Some(DSR_NODE_PORTS),
        }
    }

    /// How many directions of a flow come by this node.
    fn directions(self) -> usize {
        if self == Self::Dsr { 1 } else { 2 }
    }

    /// What becomes of requests and replies.
    fn actions(self) -> [Action; 2] {
        match self {
            Self::Pod => [Action::REQUEST, Action::REPLY],
            Self::NodeProcess => [Action::REQUEST_ROUTE, Action::REPLY_INTO_DEVICE],
            Self::Snat => [Action::REQUEST_FORWARD, Action::REPLY_FORWARD],
            Self::Dsr => [Action::REQUEST_TUNNEL; 2],
        }
    }

    /// What known flows remember of where requests and replies go.
    fn next_hops(self) -> [NextHop; 2] {
        match self {
            Self::Pod | Self::NodeProcess => [NextHop::UNKNOWN; 2],
            Self::Snat | Self::Dsr => {
                [OTHER_NODE, ROUTER].map(|mac| NextHop::new(mac, 0, EPOCH as u8))
            }
        }
    }

    /// The first client of known flows, and of flows that are always new.
    fn clients<F: Side>(self) -> [F::Address; 2] {
        match self {
            Self::Pod => [F::address(PODS, 0), F::address(NEW_PODS, 0)],
            Self::NodeProcess => [F::address(NODES, THIS_NODE); 2],
            Self::Snat | Self::Dsr => [F::address(CLIENTS, 0), F::address(NEW_CLIENTS, 0)],
        }
    }
}

/// Flows of one kind.
#[derive(Clone, Copy, Debug)]
pub struct Flows<F: Side> {
    way: Way,
    protocol: u8,
    client: F::Address,
}

impl<F: Side> Flows<F> {
    /// Flows that the tables know.
    pub fn known(way: Way, protocol: u8) -> Self {
        Self { way, protocol, client: way.clients::<F>()[0] }
    }

    /// Flows that are in no table.
    pub fn fresh(way: Way, protocol: u8) -> Self {
        Self { way, protocol, client: way.clients::<F>()[1] }
    }

    /// Request and reply of flow `number`: the packet as it comes and as it goes. Of a tunnel,
    /// the ends.
    pub fn tuples(&self, number: u32) -> [Translation<F::Address>; 2] {
        let port = usize::from(self.protocol == UDP);
        let mut request = Tuple {
            source: F::rotated(self.client, address_bits(number)),
            destination: cluster_ip::<F>(),
            source_port: Be16 { be16: port_bits(number) },
            destination_port: Be16::new(PORTS[port]),
        };
        let this_node = F::address(NODES, THIS_NODE);
        if let Some(node_ports) = self.way.node_ports() {
            request.destination = this_node;
            request.destination_port = Be16::new(node_ports[port]);
        }
        let backend = backend::<F>(self.service(), self.backend());
        let rewritten = match self.way {
            Way::Pod | Way::NodeProcess => {
                Tuple { destination: backend.address, destination_port: backend.port, ..request }
            }
            // Only so many flows as there are ports have one of their own here.
            Way::Snat => Tuple {
                source: this_node,
                destination: backend.address,
                source_port: request.source_port,
                destination_port: backend.port,
            },
            Way::Dsr => Tuple { source: this_node, destination: backend.node, ..Tuple::default() },
        };
        [(request, rewritten), (rewritten.reversed(), request.reversed())]
    }

    fn service(&self) -> u32 {
        match self.way {
            Way::Dsr => dsr_service_of::<F>(self.protocol),
            _ => service_of::<F>(self.protocol),
        }
    }

    /// The one that drains, which new flows are not given.
    fn backend(&self) -> u32 {
        self.service() * BACKENDS
    }

    /// The entries of flow `number`, last seen at `now`.
    pub fn entries(&self, number: u32, now: u32) -> impl Iterator<Item = FlowEntry<F::Address>> {
        let (tuples, actions) = (self.tuples(number), self.way.actions());
        let (service, backend, protocol) = (self.service(), self.backend(), self.protocol);
        let next_hops = self.way.next_hops();
        let state = if self.way == Way::Dsr { ANSWERED | ONE_WAY } else { ANSWERED };
        (0..self.way.directions()).map(move |direction| {
            let (tuple, rewrite) = tuples[direction];
            let flow = Flow {
                rewrite,
                action: actions[direction],
                state,
                generation: 0,
                backend,
                service,
                last_seen: now,
                device: 0,
                next_hop: next_hops[direction],
            };
            (FlowKey { tuple, protocol: protocol.into() }, flow)
        })
    }

    /// Puts the first `count` of them into a map, last seen at `now`.
    ///
    /// # Errors
    /// No such map, or the kernel refuses an entry.
    pub fn add(&self, object: &Ebpf, map: &str, count: u32, now: u32) -> Result<()> {
        const CHUNK: u32 = 8192;
        let set = F::fill_flows(object, map)?;
        let mut next = 0;
        while next < count {
            let end = count.min(next + CHUNK);
            let entries = (next..end).flat_map(|number| self.entries(number, now));
            let (keys, values): (Vec<_>, Vec<_>) = entries.unzip();
            set(&keys, &values).with_context(|| format!("cannot add flows to {map}"))?;
            next = end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use lb_common::abi::{
        address::{Ipv4, Ipv6},
        frontend::TCP,
    };

    use super::*;

    fn keys_differ<F: Side>(way: Way) {
        const COUNT: u32 = 1 << 16;
        let flows = Flows::<F>::known(way, TCP);
        let mut keys = HashSet::new();
        for number in 0..COUNT {
            let entries: Vec<_> = flows.entries(number, 0).collect();
            if let [(request, there), (reply, back)] = &entries[..] {
                assert_eq!(there.rewrite, reply.tuple.reversed(), "{way:?} {number}");
                assert_eq!(back.rewrite, request.tuple.reversed(), "{way:?} {number}");
            }
            keys.extend(entries.into_iter().map(|(key, _)| key));
        }
        assert_eq!(keys.len(), way.directions() * COUNT as usize, "{way:?}: flows share entries");
    }

    #[test]
    fn flows_have_entries_of_their_own() {
        for way in [Way::Pod, Way::Snat, Way::Dsr] {
            keys_differ::<Ipv4>(way);
            keys_differ::<Ipv6>(way);
        }
    }

    #[test]
    fn only_a_client_outside_is_hidden() {
        let sources = |way| {
            let (comes, goes) = Flows::<Ipv4>::known(way, TCP).tuples(7)[0];
            (comes.source, goes.source)
        };
        let (client, seen) = sources(Way::Pod);
        assert_eq!(client, seen);
        let (client, seen) = sources(Way::Snat);
        assert_eq!(seen, Ipv4::address(NODES, THIS_NODE));
        assert_ne!(client, seen);
    }
}
