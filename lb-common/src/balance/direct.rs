//! Conversations of a client with a backend itself. If the client has a flow of a Service to that
//! backend from the same port, the answers of both would look alike. As with conntrack
//! (`nf_nat_setup_info`), the later one gets a source port of its own.

use crate::{
    abi::{
        address::Family,
        counter::Reason,
        flow::{Action, NextHop},
        traffic::{DIRECT, NO_SERVICE},
    },
    packet::PacketKind,
};

use super::{
    entries, known,
    source_port::find_port,
    tables::{InsertError, Search, Tables},
    track,
    types::{Context, Site, Verdict, Work},
};

/// Whether conversations of clients with backends begin at this site.
#[inline(always)]
pub(super) const fn begins_at(site: Site) -> bool {
    matches!(site, Site::FromPod | Site::ToDevice { ingress: 0, .. })
}

/// Decides on a packet that is addressed to no Service; `None` if it stays as it is.
#[inline(always)]
pub(super) fn decide<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Option<Verdict> {
    if tables.has_direct()
        && tables.may_have_client(&context.packet.key)
        && let Some(verdict) = of_flow(context, work, tables)
    {
        return Some(verdict);
    }
    let is_first = !matches!(context.packet.kind, PacketKind::Tcp) || context.packet.is_syn();
    if is_first && !context.is_draining() { open(context, work, tables) } else { None }
}

/// The verdict on a packet of a conversation that has a source port of its own.
#[inline(never)]
fn of_flow<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Option<Verdict> {
    let packet = context.packet;
    if !tables.flow(&packet.key, Search::Requests, &mut work.scratch.known) {
        return None;
    }
    let flow = &work.scratch.known.flow;
    if flow.service != DIRECT {
        return None;
    }
    if track::is_expired(flow, packet.kind, context)
        || packet.is_syn() && track::is_closing(flow.state)
    {
        tables.remove_flow(&packet.key, &work.scratch.known);
        return None;
    }
    let confirms = known::confirms(context, flow);
    track::note(context, confirms, work, tables);
    Some(known::translate(context, Reason::Request, work))
}

/// Gives a new conversation a source port of its own, if a flow of a Service has its answers.
#[inline(never)]
fn open<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Option<Verdict> {
    let packet = context.packet;
    let tuple = packet.tuple();
    let scratch = &mut work.scratch;
    scratch.new.reply_key.set_reverse(tuple, packet.key.protocol);
    if !tables.may_have_reply(&scratch.new.reply_key)
        || !tables.flow(&scratch.new.reply_key, Search::Replies, &mut scratch.known)
    {
        return None;
    }
    // A pod that sends in the name of its node would take ports of the node.
    if matches!(context.site, Site::FromPod) && context.may_be_sent_by_node() {
        return None;
    }
    let other = &scratch.known.flow;
    // The port of another client rests when its connection is closed: the backend may still wait for the
    // end of that one, and would refuse a SYN whose timestamps are another host's (RFC 7323).
    let is_free = packet.is_syn()
        && track::is_closed(other.state)
        && other.rewrite.destination == tuple.source;
    if other.service == NO_SERVICE || track::is_expired(other, packet.kind, context) || is_free {
        return None;
    }
    // An answer to a client that is a backend of this one: it is translated where it enters the client.
    if tables.flow(&packet.key, Search::Replies, &mut scratch.known) {
        return None;
    }
    let (device, reply_action) = match context.site {
        Site::ToDevice { ifindex, .. } => (tables.device(ifindex)?, Action::REPLY_INTO_DEVICE),
        _ => (0, Action::REPLY),
    };
    let flow = &mut scratch.new.flow;
    flow.rewrite.set(tuple);
    flow.action = Action::REQUEST;
    flow.state = 0;
    flow.backend = NO_SERVICE;
    flow.generation = 0;
    flow.service = DIRECT;
    flow.last_seen = context.time();
    flow.device = device;
    flow.next_hop = NextHop::UNKNOWN;
    entries::prepare(context, work);
    work.scratch.new.reply_action = reply_action;
    if !find_port(context, work, tables) {
        return Some(Verdict::Drop(Reason::NoSourcePort));
    }
    // Before the flow can be found: from now on packets like this one are looked up.
    tables.begin_direct();
    match tables.insert_flow(&packet.key, &mut work.scratch.new, context.settings) {
        Ok(()) => {}
        // By another CPU, for a packet like this one.
        Err(InsertError::Exists) => {
            if !tables.flow(&packet.key, Search::Requests, &mut work.scratch.known) {
                return Some(Verdict::Drop(Reason::NoSourcePort));
            }
            let (new, known) = (&mut work.scratch.new.flow, &work.scratch.known.flow);
            new.set(known);
        }
        Err(InsertError::Full) => return Some(Verdict::Drop(Reason::FlowTableFull)),
    }
    let flow = &work.scratch.new.flow;
    work.out.rewrite.set(&flow.rewrite);
    (work.out.action, work.out.device, work.out.index) = (flow.action, flow.device, DIRECT);
    work.out.next_hop = NextHop::UNKNOWN;
    Some(Verdict::Translate(Reason::FlowCreated))
}
