//! The two entries of a flow: what they hold, which table they are in, and how they are inserted.

use crate::{
    abi::{
        address::Family,
        flow::{Action, NextHop},
    },
    packet::PacketKind,
};

use super::{
    tables::{Entry, FlowTable, InsertError, Tables},
    track,
    types::{Context, Site, Work},
};

/// Fills in the reverse entry of `work.scratch.flow` and its key: those of the reply direction.
#[inline(always)]
pub(super) fn prepare_reverse<F: Family>(context: &Context<F>, work: &mut Work<F::Address>) {
    let key = &context.packet.key;
    work.scratch.reverse_key.set_reverse(&work.scratch.flow.rewrite, key.protocol);
    work.scratch.reverse.set(&work.scratch.flow);
    work.scratch.reverse.rewrite.set_reverse(&key.tuple);
    work.scratch.reverse.next_hop = NextHop::UNKNOWN;
    work.scratch.reverse.action = reply_action(work.scratch.flow.action, context);
}

#[inline(always)]
fn reply_action<F: Family>(request: Action, context: &Context<F>) -> Action {
    match (request, context.site) {
        (Action::REQUEST_ROUTE, _) => Action::REPLY_INTO_DEVICE,
        (Action::REQUEST_HAIRPIN, _) => Action::REPLY_HAIRPIN,
        (Action::REQUEST_FORWARD, _)
        | (Action::REQUEST_LOOPBACK, Site::FromDevice | Site::FromPod) => Action::REPLY_FORWARD,
        (Action::REQUEST, _) if context.is_encapsulated() => Action::REPLY_DIRECT,
        _ => Action::REPLY,
    }
}

/// The table of a new flow: EMBRYONIC for TCP; any other flow is established at once.
#[inline(always)]
pub(super) fn table_of<F: Family>(context: &Context<F>) -> FlowTable {
    match context.packet.kind {
        PacketKind::Tcp => FlowTable::Embryonic,
        _ => FlowTable::Flows,
    }
}

/// Inserts the new flow `work.scratch.flow`, unless another flow has its reply tuple.
#[inline(always)]
pub(super) fn add<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), InsertError> {
    let table = table_of(context);
    // A client rarely uses one source port for two connections to the same backend, so FLOWS is
    // searched only for the flows that may collide (see `known::is_reply_tuple_taken`).
    if matches!(table, FlowTable::Embryonic)
        && work.scratch.needs_port | work.scratch.is_reply_tuple_taken != 0
        && !evict_stale_reply(context, FlowTable::Flows, work, tables)
    {
        return Err(InsertError::Exists);
    }
    match insert_both(table, context, false, work, tables) {
        Err(InsertError::Exists) if evict_stale_reply(context, table, work, tables) => {
            insert_both(table, context, true, work, tables)
        }
        result => result,
    }
}

/// Inserts both entries. The reply's is first, so that no reply finds it missing. A one-way flow
/// has no reply entry.
#[inline(never)]
pub(super) fn insert_both<F: Family, T: Tables<F>>(
    table: FlowTable,
    context: &Context<F>,
    replace: bool,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), InsertError> {
    if !work.scratch.flow.action.is_one_way() {
        tables.insert_flow(table, &work.scratch.reverse_key, &work.scratch.reverse, replace)?;
    }
    tables.insert_flow(table, &context.packet.key, &work.scratch.flow, true)
}

/// Removes a conflicting entry at the reply key if it is closed, expired, or left over from an
/// earlier flow with the same tuple. Returns whether the reply entry can be inserted there, or may
/// overwrite what is there.
#[inline(never)]
pub(super) fn evict_stale_reply<F: Family, T: Tables<F>>(
    context: &Context<F>,
    table: FlowTable,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> bool {
    let Some(entry) = tables.flow(table, &work.scratch.reverse_key) else { return true };
    let found = entry.get();
    let kind = context.packet.kind;
    let is_tcp = matches!(kind, PacketKind::Tcp);
    if found.rewrite.is_reverse_of(context.packet.tuple()) {
        // The new flow's entries go into the other table.
        if is_tcp && matches!(table, FlowTable::Flows) {
            tables.remove_flow(table, &work.scratch.reverse_key);
        }
        return true;
    }
    let is_over = is_tcp && track::is_closed(found.state)
        || track::is_expired(found, kind, context.now, context.settings);
    if is_over {
        let protocol = work.scratch.reverse_key.protocol;
        // The request key of the stale flow, worked out in `reverse`, which is filled in again
        // below. That flow may have moved to another backend since.
        work.scratch.reverse.rewrite.set(&found.rewrite);
        tables.remove_flow(table, &work.scratch.reverse_key);
        work.scratch.reverse_key.set_reverse(&work.scratch.reverse.rewrite, protocol);
        if tables
            .flow(table, &work.scratch.reverse_key)
            .is_some_and(|request| request.get().rewrite == work.scratch.flow.rewrite)
        {
            tables.remove_flow(table, &work.scratch.reverse_key);
        }
        prepare_reverse(context, work);
    }
    is_over
}
