//! Packets of known flows, in both directions.

use crate::{
    abi::{
        address::Family,
        counter::Reason,
        flow::{ANSWERED, Flow, FlowKey, ONE_WAY},
        frontend::Frontend,
    },
    packet::{PacketKind, RST},
};

use super::{
    entries, lookup, select,
    tables::{Entry, FlowTable, Tables},
    track,
    types::{Answer, Context, Verdict, Work},
};

/// Decides on a packet by the flow that it belongs to. Where it belongs to none: `None` if
/// it opens one, which it can only if `may_open`.
///
/// One look-up for an established flow; the table of handshakes is asked only for what
/// can belong to one. It has the word on the answer to a SYN: what stands for that among
/// the established flows is another connection's as a rule.
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
        } else if is_valid(context, flow, work, tables) {
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

/// The answer to the SYN of a handshake.
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

/// A TCP packet of no established flow, if it belongs to a handshake.
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
    } else if is_valid(context, flow, work, tables) {
        // Nothing tells of the answer that goes another way, but that the client goes on.
        let is_answered = flow.state == ANSWERED || flow.state == ONE_WAY;
        if packet.is_syn() || packet.detail & RST != 0 || !is_answered {
            track::note(context, FlowTable::Embryonic, &entry, flow, work, tables);
            return Some(translate(context, flow, Reason::Request, work));
        }
        work.scratch.flow.set(flow);
        // Before the entry is removed, whose place another flow may take at once.
        let verdict = translate(context, flow, Reason::Request, work);
        establish(context, work, tables);
        return Some(verdict);
    }
    work.scratch.flow.set(flow);
    remove_both(FlowTable::Embryonic, &packet.key, work, tables);
    None
}

/// Whether nobody answers the SYN of this flow because its backend takes it for one of an
/// established connection: the same client, from the same port, through another front end.
/// It is asked when the SYN is repeated, as the look-up would cost every new flow dearly.
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

/// A packet from a backend, whose entry was found; `None` if that counts as absent.
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
    if context.is_translated_on_egress(flow.action) {
        return Some(Verdict::Pass(Reason::NoFlow));
    }
    if track::is_expired(flow, packet.kind, context.now, context.settings) {
        return None;
    }
    if packet.is_syn_ack() && track::is_closed(flow.state) {
        // The answer to another connection: the client has gone to the backend itself,
        // from the same port.
        work.scratch.flow.set(flow);
        remove_both(table, &packet.key, work, tables);
        return None;
    }
    track::note(context, table, entry, flow, work, tables);
    Some(translate(context, flow, Reason::Reply, work))
}

/// The packet goes on with what its flow says.
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

/// Whether a flow still decides for this packet of its client; else it counts as absent.
#[inline(always)]
fn is_valid<F: Family, T: Tables<F>>(
    context: &Context<F>,
    flow: &Flow<F::Address>,
    work: &mut Work<F::Address>,
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
        // A datagram leaves a backend that is gone as soon as there is another one.
        _ => !is_backend_gone(flow, tables) || !has_backend(context, work, tables),
    }
}

/// Whether the backend that a flow chose is in no slice any more.
#[inline(always)]
fn is_backend_gone<F: Family, T: Tables<F>>(flow: &Flow<F::Address>, tables: &mut T) -> bool {
    /// No backend's.
    const NONE: u32 = u32::MAX;
    let generation = tables.backend(flow.backend).map_or(NONE, |backend| backend.generation.into());
    generation != flow.generation.into()
}

#[inline(always)]
fn has_backend<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> bool {
    if !lookup::find_frontend(context, work, tables) {
        return false;
    }
    let Frontend { service, kind, .. } = work.chosen.frontend;
    tables
        .service(service)
        .is_some_and(|service| select::eligible(&service, kind, context.origin()).is_ok())
}

/// Removes both directions of the flow `work.scratch.flow`, one of which is `key`. The other may
/// have been lost and its place taken by another flow's: that one stays.
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

/// Moves the flow `work.scratch.flow`, whose handshake is complete, to the table of established
/// flows. If that takes no entry, the flow stays where it is.
#[inline(never)]
fn establish<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) {
    work.scratch.flow.last_seen = context.now;
    // The packet that completes the handshake may be the last one already.
    work.scratch.flow.state |=
        ANSWERED | track::observed(context.packet.kind, context.packet.detail, false);
    entries::prepare_reverse(context, work);
    // The backend has answered: what stands there is over, even if nothing here tells.
    entries::evict_stale_reply(context, FlowTable::Flows, work, tables);
    if entries::insert_both(FlowTable::Flows, context, true, work, tables).is_ok() {
        remove_both(FlowTable::Embryonic, &context.packet.key, work, tables);
    }
}
