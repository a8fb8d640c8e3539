//! Packets of known flows, in both directions. A packet that opens a flow is decided on in `open`.

use crate::{
    abi::{
        address::Family,
        backend::{Backend, NOT_SERVING},
        counter::Reason,
        flow::{ANSWERED, Flow, FlowKey, ONE_WAY},
        traffic::NO_SERVICE,
    },
    packet::{PacketKind, RST},
};

use super::{
    entries,
    tables::{Entry, FlowTable, Tables},
    track,
    types::{Answer, Context, Verdict, Work},
};

/// Decides on a packet by the flow that it belongs to. Returns `None` if it belongs to none and
/// opens one, which it may only if `may_open`.
///
/// An established flow costs one look-up. EMBRYONIC is searched only for packets that can belong to
/// a handshake. For a SYN-ACK, EMBRYONIC takes precedence: a match in FLOWS usually belongs to an
/// older connection.
#[inline(always)]
pub(crate) fn decide<F: Family, T: Tables<F>>(
    context: &Context<F>,
    may_open: bool,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Option<Verdict> {
    let packet = context.packet;
    let is_tcp = matches!(packet.kind, PacketKind::Tcp);
    let answers_syn = packet.is_syn_ack();
    if answers_syn && let Some(verdict) = syn_ack(context, work, tables) {
        return Some(verdict);
    }
    if let Some(entry) = tables.flow(FlowTable::Flows, &packet.key) {
        let flow = entry.get();
        if flow.action.is_reply() {
            if let Some(verdict) = reply(context, FlowTable::Flows, &entry, work, tables) {
                return Some(verdict);
            }
        } else if is_valid(context, flow, tables) {
            track::note(context, FlowTable::Flows, &entry, flow, work, tables);
            return Some(translate(context, flow, Reason::Request, work));
        } else if packet.is_syn() {
            work.scratch.flow.set(flow);
            remove_both(FlowTable::Flows, &packet.key, work, tables);
        }
    }
    if is_tcp
        && !answers_syn
        && (may_open || packet.detail & RST != 0)
        && let Some(verdict) = handshake(context, work, tables)
    {
        return Some(verdict);
    }
    if !may_open {
        return Some(Verdict::Pass(Reason::NoFlow));
    }
    if is_tcp && !packet.is_syn() {
        return Some(Verdict::Pass(Reason::UnknownTcpFlow));
    }
    if context.is_draining() {
        return Some(Verdict::Pass(Reason::Draining));
    }
    None
}

/// The verdict on a SYN-ACK of a handshake.
#[inline(never)]
fn syn_ack<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Option<Verdict> {
    let entry = tables.flow(FlowTable::Embryonic, &context.packet.key)?;
    if !entry.get().action.is_reply() {
        return None;
    }
    reply(context, FlowTable::Embryonic, &entry, work, tables)
}

/// The verdict on a TCP packet of no established flow, if it belongs to a handshake.
#[inline(never)]
fn handshake<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Option<Verdict> {
    let packet = context.packet;
    work.scratch.is_reply_tuple_taken = 0;
    let entry = tables.flow(FlowTable::Embryonic, &packet.key)?;
    let flow = entry.get();
    if flow.action.is_reply() {
        return reply(context, FlowTable::Embryonic, &entry, work, tables);
    }
    let is_repeated = packet.is_syn() && flow.state & !ONE_WAY == 0;
    if is_repeated && is_reply_tuple_taken(context, flow, work, tables) {
        work.scratch.is_reply_tuple_taken = 1;
    } else if is_valid(context, flow, tables) {
        // The replies of a one-way flow do not pass this node. That its client goes on shows that
        // the backend has answered.
        let is_answered = flow.state == ANSWERED || flow.state == ONE_WAY;
        if packet.is_syn() || packet.detail & RST != 0 || !is_answered {
            track::note(context, FlowTable::Embryonic, &entry, flow, work, tables);
            return Some(translate(context, flow, Reason::Request, work));
        }
        work.scratch.flow.set(flow);
        // Before the entry is removed, because another flow may reuse its memory at once.
        let verdict = translate(context, flow, Reason::Request, work);
        establish(context, work, tables);
        return Some(verdict);
    }
    work.scratch.flow.set(flow);
    remove_both(FlowTable::Embryonic, &packet.key, work, tables);
    None
}

/// Whether the backend does not answer this SYN because it belongs, from the backend's view, to an
/// established connection: the same client, from the same port, through another frontend. Only a
/// repeated SYN is checked, because the look-up is expensive for every new flow.
#[inline(always)]
fn is_reply_tuple_taken<F: Family, T: Tables<F>>(
    context: &Context<F>,
    flow: &Flow<F::Address>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> bool {
    let packet = context.packet;
    work.scratch.reverse_key.set_reverse(&flow.rewrite, packet.key.protocol);
    let Some(entry) = tables.flow(FlowTable::Flows, &work.scratch.reverse_key) else {
        return false;
    };
    let other = entry.get();
    !track::is_closed(other.state)
        && !track::is_expired(other, packet.kind, context.now, context.settings)
        && !other.rewrite.is_reverse_of(packet.tuple())
}

/// The verdict on a packet from a backend by its entry; `None` if the entry counts as absent.
#[inline(always)]
fn reply<F: Family, T: Tables<F>>(
    context: &Context<F>,
    table: FlowTable,
    entry: &T::FlowEntry,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Option<Verdict> {
    let packet = context.packet;
    let flow = entry.get();
    // Of no Service is an answer to this node, which may look like a request once it is expired.
    if context.is_translated_on_egress(flow.action) && flow.service != NO_SERVICE {
        return Some(Verdict::Pass(Reason::NoFlow));
    }
    if track::is_expired(flow, packet.kind, context.now, context.settings) {
        return None;
    }
    if flow.service == NO_SERVICE {
        return Some(Verdict::Pass(Reason::NoFlow));
    }
    if packet.is_syn_ack() && track::is_closed(flow.state) {
        // A SYN-ACK for another connection: the client has connected to the backend itself, from
        // the same port.
        work.scratch.flow.set(flow);
        remove_both(table, &packet.key, work, tables);
        return None;
    }
    track::note(context, table, entry, flow, work, tables);
    Some(translate(context, flow, Reason::Reply, work))
}

/// The verdict that translates the packet as its flow says.
#[inline(always)]
fn translate<F: Family>(
    context: &Context<F>,
    flow: &Flow<F::Address>,
    reason: Reason,
    work: &mut Work<F::Address>,
) -> Verdict {
    if context.is_ttl_exceeded(flow.action) {
        return Verdict::Answer(Answer::TimeExceeded, Reason::TtlExceeded);
    }
    work.out.rewrite.set(&flow.rewrite);
    work.set_delivery(flow);
    Verdict::Translate(reason)
}

/// Whether a flow is valid for this packet of its client; else it counts as absent.
#[inline(always)]
fn is_valid<F: Family, T: Tables<F>>(
    context: &Context<F>,
    flow: &Flow<F::Address>,
    tables: &mut T,
) -> bool {
    let packet = context.packet;
    if track::is_expired(flow, packet.kind, context.now, context.settings)
        || flow.action.is_one_way() && context.is_encapsulated()
    {
        return false;
    }
    match packet.kind {
        PacketKind::Tcp => {
            !packet.is_syn() || !(track::is_closing(flow.state) || is_backend_gone(flow, tables))
        }
        // docs/semantics.md, section 7: a datagram whose backend does not serve counts as new,
        // whatever the Service has now.
        _ => is_backend_serving(flow, tables),
    }
}

/// Whether the backend of a flow is no longer in any EndpointSlice.
#[inline(always)]
fn is_backend_gone<F: Family, T: Tables<F>>(flow: &Flow<F::Address>, tables: &mut T) -> bool {
    !tables.backend(flow.backend).is_some_and(|backend| is_same_backend(flow, &backend))
}

/// Whether the backend of a flow is ready, or serving while it terminates.
#[inline(always)]
fn is_backend_serving<F: Family, T: Tables<F>>(flow: &Flow<F::Address>, tables: &mut T) -> bool {
    tables
        .backend(flow.backend)
        .is_some_and(|backend| is_same_backend(flow, &backend) && backend.flags & NOT_SERVING == 0)
}

#[inline(always)]
fn is_same_backend<A>(flow: &Flow<A>, backend: &Backend<A>) -> bool {
    backend.generation as u32 == flow.generation as u32
}

/// Removes both entries of the flow `work.scratch.flow`, one of which has the key `key`. The other
/// one may have been evicted and its key reused by another flow: that entry stays.
#[inline(never)]
fn remove_both<F: Family, T: Tables<F>>(
    table: FlowTable,
    key: &FlowKey<F::Address>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) {
    tables.remove_flow(table, key);
    work.scratch.reverse_key.set_reverse(&work.scratch.flow.rewrite, key.protocol);
    if tables
        .flow(table, &work.scratch.reverse_key)
        .is_some_and(|reverse| reverse.get().rewrite.is_reverse_of(&key.tuple))
    {
        tables.remove_flow(table, &work.scratch.reverse_key);
    }
}

/// Moves the flow `work.scratch.flow`, whose handshake is complete, to FLOWS. If that table is
/// full, the flow stays where it is.
#[inline(never)]
fn establish<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) {
    work.scratch.flow.last_seen = context.now;
    // The packet that completes the handshake may also close the connection.
    work.scratch.flow.state |=
        ANSWERED | track::observed(context.packet.kind, context.packet.detail, false);
    entries::prepare_reverse(context, work);
    // The backend has answered the SYN, so a conflicting entry is stale even if its state does not
    // show it.
    entries::evict_stale_reply(context, FlowTable::Flows, work, tables);
    if entries::insert_both(FlowTable::Flows, context, true, work, tables).is_ok() {
        remove_both(FlowTable::Embryonic, &context.packet.key, work, tables);
    }
}
