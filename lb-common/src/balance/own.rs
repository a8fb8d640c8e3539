//! Datagrams of this node that are no Service's, but whose answers would look like requests: their
//! source is the address and port of a frontend. A process bound that port, or the kernel chose it
//! for a connection that it masquerades.

use crate::{
    abi::{
        address::Family,
        flow::{ANSWERED, Action, Generation, NextHop},
        frontend::FrontendKey,
        traffic::NO_SERVICE,
    },
    packet::PacketKind,
};

use super::{
    tables::{Entry, FlowTable, Tables},
    types::{Context, Work},
};

/// Whether an answer to this packet may look like a request. Most packets are judged by their
/// source port alone.
#[inline(always)]
pub(super) fn may_get_answer<F: Family>(context: &Context<F>) -> bool {
    let packet = context.packet;
    let tuple = packet.tuple();
    // An answer of TCP is no SYN, so it opens no flow.
    matches!(packet.kind, PacketKind::Udp)
        && (context.settings.node_ports.contains(tuple.source_port.get())
            || context.family().may_be_service(tuple.source))
        && context.may_be_sent_by_node()
}

/// Inserts the answer to this packet into FLOWS, as a reply that stays unchanged, so that it opens no
/// flow.
#[inline(never)]
pub(super) fn expect_answer<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) {
    let packet = context.packet;
    let tuple = packet.tuple();
    let source = FrontendKey::new(tuple.source, tuple.source_port, packet.protocol());
    if tables.frontend(&source).is_none() {
        return;
    }
    work.scratch.reverse_key.set_reverse(tuple, packet.key.protocol);
    let known = tables.flow(FlowTable::Flows, &work.scratch.reverse_key);
    if known.is_some_and(|entry| entry.get().service != NO_SERVICE) {
        return;
    }
    let flow = &mut work.scratch.flow;
    flow.rewrite.set_reverse(tuple);
    flow.action = Action::REPLY;
    flow.state = ANSWERED;
    flow.backend = NO_SERVICE;
    flow.generation = 0 as Generation;
    flow.service = NO_SERVICE;
    flow.last_seen = context.now;
    flow.device = 0;
    flow.next_hop = NextHop::UNKNOWN;
    // A table that is full takes no reservation: the answer then counts as a request.
    let (key, flow) = (&work.scratch.reverse_key, &work.scratch.flow);
    let _ = tables.insert_flow(FlowTable::Flows, key, flow, true);
}
