//! Datagrams of this node that are no Service's, but whose answers would look like requests: their
//! source is the address and port of a frontend. A process bound that port, or the kernel chose it
//! for a connection that it masquerades.

use crate::{
    abi::{
        address::Family,
        flow::{ANSWERED, Action, NextHop},
        frontend::FrontendKey,
        traffic::NO_SERVICE,
    },
    flow_table::PROTECTED,
    packet::PacketKind,
};

use super::{
    tables::{Note, Search, Tables},
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

/// Inserts a flow of no Service, whose replies stay unchanged, so that the answer to this packet opens
/// no flow.
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
    let scratch = &mut work.scratch;
    scratch.new.reply_key.set_reverse(tuple, packet.key.protocol);
    // A Service's answer to its client, which a program has translated.
    if tables.flow(&scratch.new.reply_key, Search::Requests, &mut scratch.known) {
        return;
    }
    if tables.flow(&packet.key, Search::Requests, &mut scratch.known) {
        if scratch.known.flow.service == NO_SERVICE {
            let note = Note { clear: 0, set: 0, time: context.time() };
            tables.note_flow(&packet.key, &scratch.known, note);
        }
        return;
    }
    let flow = &mut scratch.new.flow;
    flow.rewrite.set(tuple);
    flow.action = Action::REQUEST;
    flow.state = ANSWERED;
    flow.backend = NO_SERVICE;
    flow.generation = 0;
    flow.service = NO_SERVICE;
    flow.last_seen = context.time();
    flow.device = 0;
    flow.next_hop = NextHop::UNKNOWN;
    // If the table is full, the answer counts as a request.
    scratch.new.reply_action = Action::REPLY;
    scratch.new.protected = context.settings.times(PROTECTED);
    let _ = tables.insert_flow(&packet.key, &mut scratch.new, context.settings);
}
