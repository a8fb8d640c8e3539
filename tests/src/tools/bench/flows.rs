//! The flows that packets belong to, numbered as the wrappers number them.

use anyhow::{Context, Result, ensure};
use aya::Ebpf;
use lb_agent::maps::flow_table::{FlowTable, Flows as _};
use lb_common::{
    abi::{
        address::Be16,
        flow::{ANSWERED, Action, CONFIRMED, Flow, FlowKey, NextHop, ONE_WAY, Tuple},
        flow_table::{Direction, FlowEntry, TIMES},
        frontend::UDP,
    },
    flow_table::{InsertError, NewFlow, insert},
};

use super::{
    abi::{address_bits, port_bits},
    namespace::{EPOCH, OTHER_NODE, ROUTER},
    tables::{
        BACKENDS, CLIENTS, DSR_NODE_PORTS, Frontends, NEW_CLIENTS, NEW_PODS, NODE_PORTS, NODES,
        PODS, PORTS, Side, THIS_NODE, backend, cluster_ip, dsr_service_of, service_of, settings,
    },
};
use crate::harness::flows::clear;

/// A direction of a flow in a hash or an LRU.
pub type Entry<A> = (FlowKey<A>, Flow<A>);

/// The tuple of a packet before and after translation.
pub type Translation<A> = (Tuple<A>, Tuple<A>);

/// A client, the frontend that it calls, and how it reaches a backend on another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowKind {
    /// A pod calls a ClusterIP.
    Pod,
    /// A process of the node calls a ClusterIP.
    NodeProcess,
    /// A client outside calls a node port; the backend sees the node.
    Snat,
    /// A client outside calls a node port; the packet is encapsulated to the backend's node,
    /// which answers the client directly.
    Dsr,
}

impl FlowKind {
    /// The node ports that clients call, TCP then UDP.
    fn node_ports(self) -> Option<[u16; 2]> {
        match self {
            Self::Pod | Self::NodeProcess => None,
            Self::Snat => Some(NODE_PORTS),
            Self::Dsr => Some(DSR_NODE_PORTS),
        }
    }

    /// How many directions of a flow this node sees.
    fn directions(self) -> usize {
        if self == Self::Dsr { 1 } else { 2 }
    }

    /// The actions for requests and replies.
    fn actions(self) -> [Action; 2] {
        match self {
            Self::Pod => [Action::REQUEST, Action::REPLY],
            Self::NodeProcess => [Action::REQUEST_ROUTE, Action::REPLY_INTO_DEVICE],
            Self::Snat => [Action::REQUEST_FORWARD, Action::REPLY_FORWARD],
            Self::Dsr => [Action::REQUEST_TUNNEL, Action::default()],
        }
    }

    /// The next hops that known flows remember for requests and replies.
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
    kind: FlowKind,
    protocol: u8,
    client: F::Address,
}

impl<F: Side> Flows<F> {
    /// Flows that the tables know.
    pub fn known(kind: FlowKind, protocol: u8) -> Self {
        Self { kind, protocol, client: kind.clients::<F>()[0] }
    }

    /// Flows that are in no table.
    pub fn fresh(kind: FlowKind, protocol: u8) -> Self {
        Self { kind, protocol, client: kind.clients::<F>()[1] }
    }

    /// Request and reply of flow `number`, each before and after translation. With DSR the
    /// tuple afterwards is that of the outer header.
    pub fn tuples(&self, number: u32) -> [Translation<F::Address>; 2] {
        let port = usize::from(self.protocol == UDP);
        let mut request = Tuple {
            source: F::rotated(self.client, address_bits(number)),
            destination: cluster_ip::<F>(),
            source_port: Be16 { be16: port_bits(number) },
            destination_port: Be16::new(PORTS[port]),
        };
        let this_node = F::address(NODES, THIS_NODE);
        if let Some(node_ports) = self.kind.node_ports() {
            request.destination = this_node;
            request.destination_port = Be16::new(node_ports[port]);
        }
        let backend = backend::<F>(self.service(), self.backend());
        let rewritten = match self.kind {
            FlowKind::Pod | FlowKind::NodeProcess => {
                Tuple { destination: backend.address, destination_port: backend.port, ..request }
            }
            // At most as many flows as there are ports have a source port of their own.
            FlowKind::Snat => Tuple {
                source: this_node,
                destination: backend.address,
                source_port: request.source_port,
                destination_port: backend.port,
            },
            FlowKind::Dsr => {
                Tuple { source: this_node, destination: backend.node, ..Tuple::default() }
            }
        };
        [(request, rewritten), (rewritten.reversed(), request.reversed())]
    }

    fn service(&self) -> u32 {
        match self.kind {
            FlowKind::Dsr => dsr_service_of::<F>(self.protocol),
            _ => service_of::<F>(self.protocol),
        }
    }

    /// The draining backend, which new flows never get.
    fn backend(&self) -> u32 {
        self.service() * BACKENDS
    }

    /// Flow `number`, established and last seen at `now`, and the key of its requests.
    pub fn flow(&self, number: u32, now: u32) -> (FlowKey<F::Address>, NewFlow<F::Address>) {
        let [(request, rewrite), (reply, _)] = self.tuples(number);
        let [action, reply_action] = self.kind.actions();
        let protocol = self.protocol.into();
        let mut new = NewFlow::default();
        new.flow = Flow {
            rewrite,
            action,
            state: self.state(),
            generation: 0,
            backend: self.backend(),
            service: self.service(),
            last_seen: now,
            device: 0,
            next_hop: self.kind.next_hops()[0],
        };
        new.reply_key = FlowKey { tuple: reply, protocol };
        new.reply_action = reply_action;
        // Established flows are never evicted.
        new.protected = TIMES - 1;
        (FlowKey { tuple: request, protocol }, new)
    }

    fn state(&self) -> u8 {
        let one_way = if self.kind == FlowKind::Dsr { ONE_WAY } else { 0 };
        let confirmed = if self.protocol == UDP { 0 } else { CONFIRMED };
        ANSWERED | one_way | confirmed
    }

    /// Puts `count` of them into each of `tables`, all established, and returns their numbers. One
    /// that some table has no room for is left out. If there are no more then, because there are no more
    /// ports, a few others are named twice.
    ///
    /// # Errors
    /// There is no room for so many.
    pub fn establish(
        &self,
        tables: &[&FlowTable<F::Address>],
        count: u32,
        now: u32,
    ) -> Result<Vec<u32>> {
        let mut numbers = Vec::new();
        let most = if self.kind == FlowKind::Snat { u32::from(u16::MAX) + 1 } else { 2 * count };
        for number in 0..most {
            if numbers.len() == count as usize {
                break;
            }
            let mut is_new = Vec::new();
            let has_room = tables.iter().all(|table| {
                let (key, new) = self.flow(number, now);
                let is_known = table.find(&key, Direction::Request).is_some();
                let is_inserted = !is_known && self.insert(table, &key, new).is_ok();
                is_new.extend(is_inserted.then_some((table, key)));
                is_known || is_inserted
            });
            if has_room {
                numbers.push(number);
                continue;
            }
            for (table, key) in is_new {
                let flow = table.find(&key, Direction::Request);
                ensure!(
                    flow.is_some_and(|flow| table.remove_unchanged(&flow)),
                    "a flow that was inserted is gone"
                );
            }
        }
        let missing = count as usize - numbers.len();
        ensure!(missing <= numbers.len() / 20, "there is room for {} flows", numbers.len());
        numbers.extend_from_within(..missing);
        Ok(numbers)
    }

    /// Forgets all flows of a table and puts `count` of these into it, which anybody may evict.
    pub fn crowd(&self, table: &FlowTable<F::Address>, count: u32, now: u32) {
        clear(table);
        for number in 0..count {
            let (key, mut new) = self.flow(number, now);
            new.flow.state &= !CONFIRMED;
            // It may find no room, or evict another: such is a crowd.
            _ = self.insert(table, &key, new);
        }
    }

    fn insert(
        &self,
        table: &FlowTable<F::Address>,
        key: &FlowKey<F::Address>,
        mut new: NewFlow<F::Address>,
    ) -> Result<(), InsertError> {
        let lifetimes = settings(Frontends::ClusterIps).flow_lifetimes;
        insert(table, key, &mut new, &lifetimes, |place, new| {
            let mut entry = FlowEntry::default();
            entry.write(&key.tuple, &new.flow, new.reply_action);
            entry.next_hops = self.kind.next_hops();
            table.write(place, &entry);
        })
    }

    /// The entries of flow `number` in a hash or an LRU.
    pub fn entries(&self, number: u32) -> impl Iterator<Item = Entry<F::Address>> {
        let (key, NewFlow { flow, reply_key, reply_action, .. }) = self.flow(number, 0);
        let rewrite = key.tuple.reversed();
        let reply = (reply_key, Flow { rewrite, action: reply_action, ..flow });
        [(key, flow), reply].into_iter().take(self.kind.directions())
    }

    /// Puts the flows with these numbers into a hash or an LRU.
    ///
    /// # Errors
    /// No such map, or the kernel refuses an entry.
    pub fn add(&self, object: &Ebpf, map: &str, numbers: &[u32]) -> Result<()> {
        const CHUNK: usize = 8192;
        let set = F::fill_flows(object, map)?;
        for numbers in numbers.chunks(CHUNK) {
            let entries = numbers.iter().flat_map(|number| self.entries(*number));
            let (keys, values): (Vec<_>, Vec<_>) = entries.unzip();
            set(&keys, &values).with_context(|| format!("cannot add flows to {map}"))?;
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

    fn keys_differ<F: Side>(kind: FlowKind) {
        const COUNT: u32 = 1 << 16;
        let flows = Flows::<F>::known(kind, TCP);
        let mut keys = HashSet::new();
        for number in 0..COUNT {
            let entries: Vec<_> = flows.entries(number).collect();
            if let [(request, there), (reply, back)] = &entries[..] {
                assert_eq!(there.rewrite, reply.tuple.reversed(), "{kind:?} {number}");
                assert_eq!(back.rewrite, request.tuple.reversed(), "{kind:?} {number}");
            }
            keys.extend(entries.into_iter().map(|(key, _)| key));
        }
        assert_eq!(keys.len(), kind.directions() * COUNT as usize, "{kind:?}: flows share entries");
    }

    #[test]
    fn flows_have_entries_of_their_own() {
        for kind in [FlowKind::Pod, FlowKind::Snat, FlowKind::Dsr] {
            keys_differ::<Ipv4>(kind);
            keys_differ::<Ipv6>(kind);
        }
    }

    #[test]
    fn only_a_client_outside_is_hidden() {
        let sources = |kind| {
            let (comes, goes) = Flows::<Ipv4>::known(kind, TCP).tuples(7)[0];
            (comes.source, goes.source)
        };
        let (client, seen) = sources(FlowKind::Pod);
        assert_eq!(client, seen);
        let (client, seen) = sources(FlowKind::Snat);
        assert_eq!(seen, Ipv4::address(NODES, THIS_NODE));
        assert_ne!(client, seen);
    }
}
