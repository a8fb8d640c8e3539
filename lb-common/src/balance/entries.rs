//! The insertion of a new flow, and of its place a flow that is over.

use crate::{
    abi::{
        address::Family,
        flow::{Action, CONFIRMED, MOVED},
    },
    flow_table::PROTECTED,
    packet::PacketKind,
};

use super::{
    source_port::find_port,
    tables::{Search, Tables},
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

/// Makes the reply of the new flow its own, after another flow had it: one of the two changes. The
/// other makes room if it is over, and else this one gets a source port of this node. Returns
/// whether it worked.
#[inline(never)]
pub(super) fn resolve<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> bool {
    // Of a port that was drawn every flow is another one's. One that is closed rests until it is
    // expired: the backend may keep the ports in TIME_WAIT.
    let is_drawn = work.scratch.needs_port != 0;
    if !is_drawn && remove_stale(context, work, tables) || find_port(context, work, tables) {
        return true;
    }
    // Where nearly all ports are in use, the flow gets a port that rests, or the port of an incomplete
    // handshake: such handshakes could otherwise occupy all ports. It gets no port of a datagram flow,
    // because a late answer would reach the wrong client; TCP rejects a segment of another connection.
    is_drawn && remove_stale(context, work, tables)
}

/// Fills in what belongs to the replies of the new flow.
#[inline(never)]
pub(super) fn prepare<F: Family>(context: &Context<F>, work: &mut Work<F::Address>) {
    let new = &mut work.scratch.new;
    new.reply_key.set_reverse(&new.flow.rewrite, context.packet.key.protocol);
    new.reply_action = reply_action(new.flow.action, context);
    new.protected = context.settings.times(PROTECTED);
}

/// Removes the flow that has the reply of the new one, if it is over. Returns whether
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
    let packet = context.packet;
    let is_drawn = scratch.needs_port != 0;
    let is_left = match packet.kind {
        PacketKind::Tcp => {
            track::is_closed(found.state) || is_drawn && found.state & CONFIRMED == 0
        }
        // By this client itself, when it moved to another backend.
        _ => found.state & MOVED != 0 && found.rewrite.is_reverse_of(packet.tuple()),
    };
    let is_over = is_left || track::is_expired(found, packet.kind, context);
    if is_over {
        tables.remove_flow(&scratch.new.reply_key, &scratch.known);
    }
    is_over
}
