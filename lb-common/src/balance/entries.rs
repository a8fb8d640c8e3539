//! The insertion of a new flow, and of its place a flow that is over.

use crate::{
    abi::{address::Family, flow::Action},
    flow_table::PROTECTED,
    packet::PacketKind,
};

use super::{
    source_port::find_port,
    tables::{InsertError, Search, Tables},
    track,
    types::{Context, Site, Work},
};

/// The action of the replies of a flow with this action of its requests.
#[inline(always)]
fn reply_action<F: Family>(request: Action, context: &Context<F>) -> Action {
    match (request, context.site) {
        (Action::REQUEST_TUNNEL, _) => Action::default(),
        (Action::REQUEST_ROUTE, _) => Action::REPLY_INTO_DEVICE,
        (Action::REQUEST_HAIRPIN, _) => Action::REPLY_HAIRPIN,
        (Action::REQUEST_FORWARD, _)
        | (Action::REQUEST_LOOPBACK, Site::FromDevice | Site::FromPod) => Action::REPLY_FORWARD,
        (Action::REQUEST, _) if context.is_encapsulated() => Action::REPLY_DIRECT,
        _ => Action::REPLY,
    }
}

/// Inserts the new flow `work.scratch.new.flow`. If another flow has its reply, one of the two changes:
/// the other makes room if it is over, and else this one gets a source port of this node.
#[inline(always)]
pub(super) fn add<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), InsertError> {
    let result = insert(context, work, tables);
    if !matches!(result, Err(InsertError::Exists)) {
        return result;
    }
    resolve(context, work, tables)?;
    insert(context, work, tables)
}

/// Makes the reply of the new flow its own.
#[inline(never)]
fn resolve<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), InsertError> {
    // Of a port that was drawn every flow is another one's. One that is closed rests until it is
    // expired: the backend may keep the ports in TIME_WAIT.
    let is_drawn = work.scratch.needs_port != 0;
    if !is_drawn && remove_stale(context, work, tables) || find_port(context, work, tables) {
        return Ok(());
    }
    // Where nearly all ports are in use, those that rest are better than none.
    if is_drawn && remove_stale(context, work, tables) {
        return Ok(());
    }
    Err(InsertError::Exists)
}

#[inline(always)]
fn insert<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), InsertError> {
    let key = &context.packet.key;
    let scratch = &mut work.scratch;
    scratch.new.reply_key.set_reverse(&scratch.new.flow.rewrite, key.protocol);
    scratch.new.reply_action = reply_action(scratch.new.flow.action, context);
    scratch.new.protected = context.settings.times(PROTECTED);
    tables.insert_flow(key, &mut scratch.new, context.settings)
}

/// Removes the flow that has the reply of the new one, if it is closed or expired. Returns whether
/// none is left.
#[inline(always)]
fn remove_stale<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> bool {
    let scratch = &mut work.scratch;
    if !tables.flow(&scratch.new.reply_key, Search::Replies, &mut scratch.known) {
        return true;
    }
    let found = &scratch.known.flow;
    let kind = context.packet.kind;
    let is_over = matches!(kind, PacketKind::Tcp) && track::is_closed(found.state)
        || track::is_expired(found, kind, context);
    if is_over {
        tables.remove_flow(&scratch.new.reply_key, &scratch.known);
    }
    is_over
}
