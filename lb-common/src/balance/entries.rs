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
    // Of a port that was drawn every flow is another one's. One that is closed rests until it is
    // expired: the backend may keep the ports in TIME_WAIT.
    let is_drawn = work.scratch.needs_port != 0;
    // A client rarely uses one source port for two connections to the same backend, so FLOWS is
    // searched only for the flows that may collide (see `known::is_reply_tuple_taken`).
    if matches!(table, FlowTable::Embryonic) {
        let is_taken = match is_drawn {
            true => tables.flow(FlowTable::Flows, &work.scratch.reverse_key).is_some(),
            false if work.scratch.is_reply_tuple_taken != 0 => {
                evict_stale_reply(context, FlowTable::Flows, work, tables) == Place::Taken
            }
            false => false,
        };
        if is_taken {
            return Err(InsertError::Exists);
        }
    }
    match insert_both(table, context, false, work, tables) {
        Err(InsertError::Exists) if !is_drawn => insert_in_place(table, context, work, tables),
        result => result,
    }
}

/// Inserts the new flow with the port that was drawn last, although another flow had it, if that is
/// closed or expired.
#[inline(never)]
pub(super) fn take_resting_port<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), InsertError> {
    let table = table_of(context);
    if matches!(table, FlowTable::Embryonic)
        && evict_stale_reply(context, FlowTable::Flows, work, tables) == Place::Taken
    {
        return Err(InsertError::Exists);
    }
    insert_in_place(table, context, work, tables)
}

/// Inserts the new flow in the place of a stale one with its reply tuple.
#[inline(always)]
fn insert_in_place<F: Family, T: Tables<F>>(
    table: FlowTable,
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), InsertError> {
    match evict_stale_reply(context, table, work, tables) {
        Place::Taken => Err(InsertError::Exists),
        // Another CPU may have taken a free place since: only an entry of the flow itself is
        // overwritten.
        place => insert_both(table, context, place == Place::Own, work, tables),
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

/// Whether a reply entry can be inserted at its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nothing is there.
    Free,
    /// An entry is there that is left over from an earlier flow with the same tuple.
    Own,
    /// Another flow's entry is there.
    Taken,
}

/// Looks for a conflicting entry at the reply key, and removes it if it is closed or expired.
#[inline(never)]
pub(super) fn evict_stale_reply<F: Family, T: Tables<F>>(
    context: &Context<F>,
    table: FlowTable,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Place {
    let Some(entry) = tables.flow(table, &work.scratch.reverse_key) else { return Place::Free };
    let found = entry.get();
    let kind = context.packet.kind;
    let is_tcp = matches!(kind, PacketKind::Tcp);
    if found.rewrite.is_reverse_of(context.packet.tuple()) {
        // The new flow's entries go into the other table.
        if is_tcp && matches!(table, FlowTable::Flows) {
            tables.remove_flow(table, &work.scratch.reverse_key);
            return Place::Free;
        }
        return Place::Own;
    }
    let is_over = is_tcp && track::is_closed(found.state)
        || track::is_expired(found, kind, context.now, context.settings);
    if !is_over {
        return Place::Taken;
    }
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
    Place::Free
}
