//! Packets of known flows, in both directions. A packet that opens a flow is decided on in `open`.

use crate::{
    abi::{
        address::Family,
        backend::{Backend, NOT_SERVING},
        counter::Reason,
        flow::{ANSWERED, CONFIRMED, Flow, LASTING, MOVED, ONE_WAY},
        traffic::{DIRECT, NO_SERVICE},
    },
    packet::{PacketKind, RST},
};

use super::{
    select,
    tables::{Note, Search, Tables},
    track,
    types::{Answer, Candidate, Context, Verdict, Work},
};

/// Decides on a packet by the flow that it belongs to. Returns `None` if it belongs to none and
/// opens one, which it may only if `may_open`.
#[inline(always)]
pub(crate) fn decide<F: Family, T: Tables<F>>(
    candidate: Candidate,
    context: &Context<F>,
    may_open: bool,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Option<Verdict> {
    let packet = context.packet;
    if tables.flow(&packet.key, search(candidate, context), &mut work.scratch.known) {
        let verdict = if work.scratch.known.flow.action.is_reply() {
            reply(context, work, tables)
        } else {
            request(context, work, tables)
        };
        if verdict.is_some() {
            return verdict;
        }
    }
    if !may_open {
        return Some(Verdict::Pass(Reason::NoFlow));
    }
    if matches!(packet.kind, PacketKind::Tcp) && !packet.is_syn() {
        return Some(Verdict::Pass(Reason::UnknownTcpFlow));
    }
    if context.is_draining() {
        return Some(Verdict::Pass(Reason::Draining));
    }
    None
}

/// Which directions of flows the packet may belong to, the likely one first. A request is addressed
/// to a Service or to a node port of this node.
#[inline(always)]
fn search<F: Family>(candidate: Candidate, context: &Context<F>) -> Search {
    let port = context.packet.tuple().destination_port.get();
    match candidate {
        Candidate::Service => Search::RequestsFirst,
        Candidate::Node if context.settings.node_ports.contains(port) => Search::RequestsFirst,
        Candidate::Node => Search::RepliesFirst,
        Candidate::Direct | Candidate::Reply | Candidate::NotService => Search::Replies,
    }
}

/// The verdict on a packet from a client by its flow; `None` if the flow counts as absent.
#[inline(always)]
fn request<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Option<Verdict> {
    let flow = &work.scratch.known.flow;
    if flow.service == NO_SERVICE || flow.service == DIRECT {
        return None;
    }
    if !is_valid(context, flow, tables) {
        retire(context, work, tables);
        return None;
    }
    let confirms = confirms(context, flow);
    let binds = confirms || is_second(context, flow);
    track::note(context, confirms, work, tables);
    let verdict = translate(context, Reason::Request, work);
    if binds {
        select::bind(context, work, tables);
    }
    Some(verdict)
}

/// Ends a flow that counts as absent for its client. Late answers of a datagram's backend still get
/// back.
#[inline(never)]
fn retire<F: Family, T: Tables<F>>(context: &Context<F>, work: &Work<F::Address>, tables: &mut T) {
    let (packet, known) = (context.packet, &work.scratch.known);
    let is_tcp = matches!(packet.kind, PacketKind::Tcp);
    let has_answers =
        !known.flow.action.is_one_way() && !track::is_expired(&known.flow, packet.kind, context);
    if is_tcp && !packet.is_syn() {
        return;
    }
    if !is_tcp && has_answers {
        let note = Note { clear: 0, set: MOVED, time: context.time() };
        tables.note_flow(&packet.key, known, note);
    } else {
        tables.remove_flow(&packet.key, known);
    }
}

/// Whether the packet, a client's, completes a TCP handshake. The replies of a one-way flow do not
/// pass this node: that its client goes on shows that the backend has answered.
#[inline(always)]
pub(super) fn confirms<F: Family>(context: &Context<F>, flow: &Flow<F::Address>) -> bool {
    let packet = context.packet;
    matches!(packet.kind, PacketKind::Tcp)
        && flow.state & CONFIRMED == 0
        && flow.state & (ANSWERED | ONE_WAY) != 0
        && !packet.is_syn()
        && packet.detail & RST == 0
}

/// Whether the packet is one more datagram of a young flow whose replies do not pass this node, so
/// that nothing else shows that the backend answers.
#[inline(always)]
fn is_second<F: Family>(context: &Context<F>, flow: &Flow<F::Address>) -> bool {
    !matches!(context.packet.kind, PacketKind::Tcp) && flow.state & (ONE_WAY | LASTING) == ONE_WAY
}

/// The verdict on a packet from a backend by its flow; `None` if the flow counts as absent.
#[inline(always)]
fn reply<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Option<Verdict> {
    let packet = context.packet;
    let flow = &work.scratch.known.flow;
    // Of no Service is an answer to this node, which may look like a request once it is expired.
    if context.is_translated_on_egress(flow.action) && flow.service != NO_SERVICE {
        return Some(Verdict::Pass(Reason::NoFlow));
    }
    if track::is_over(flow, context) {
        return None;
    }
    if flow.service == NO_SERVICE {
        return Some(Verdict::Pass(Reason::NoFlow));
    }
    if packet.is_syn_ack() && track::is_closed(flow.state) {
        // A SYN-ACK for another connection: the client has connected to the backend itself, from
        // the same port.
        tables.remove_flow(&packet.key, &work.scratch.known);
        return None;
    }
    let answers = !matches!(packet.kind, PacketKind::Tcp) && flow.state & ANSWERED == 0;
    track::note(context, false, work, tables);
    let verdict = translate(context, Reason::Reply, work);
    if answers {
        select::bind(context, work, tables);
    }
    Some(verdict)
}

/// The verdict that translates the packet as the flow that was found says.
#[inline(always)]
pub(super) fn translate<F: Family>(
    context: &Context<F>,
    reason: Reason,
    work: &mut Work<F::Address>,
) -> Verdict {
    let flow = &work.scratch.known.flow;
    if context.is_ttl_exceeded(flow.action) {
        return Verdict::Answer(Answer::TimeExceeded, Reason::TtlExceeded);
    }
    work.out.rewrite.set(&flow.rewrite);
    work.set_delivery();
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
    if track::is_over(flow, context) || flow.action.is_one_way() && context.is_encapsulated() {
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
    backend.generation == flow.generation
}
