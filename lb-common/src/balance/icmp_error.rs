//! ICMP errors: about a packet of a known flow they go to the end that sent it, and say what
//! that end had sent.

use crate::{
    abi::{
        address::{Address, Family},
        counter::Reason,
        flow::{Action, Flow},
        settings::Settings,
    },
    packet::Packet,
};

use super::{
    lookup::live_flow,
    no_flow,
    tables::{Entry, Tables},
    types::{Candidate, Context, Site, Verdict, Work},
};

/// Decides on an ICMP error caught at `site`, which is the `candidate` told by
/// [`candidate`](super::candidate) and, if `is_quoted`, quotes `work.error.quote`. The flow's state
/// and times stay as they are: the error may be anybody's.
#[inline(always)]
pub fn decide<F: Family, T: Tables<F>>(
    candidate: Candidate,
    packet: &Packet<F>,
    is_quoted: bool,
    site: Site,
    settings: &Settings,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Verdict {
    let context = Context { packet, settings, site, now: tables.now() };
    if is_quoted && let Some(verdict) = about_flow(&context, work, tables) {
        return verdict;
    }
    no_flow::decide(candidate, &context, work, tables)
}

/// What becomes of the error if it is about a packet of a known flow.
///
/// The packet that it quotes had been translated before it was sent, so its reverse is the
/// key of the flow's other direction: that direction's packets go where the error must go,
/// and their rewrite, reversed, is the packet as its sender knows it.
#[inline(never)]
fn about_flow<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Option<Verdict> {
    let quoted = &work.error.quote.key;
    let outer = context.packet.tuple();
    if outer.destination != quoted.tuple.source {
        return None;
    }
    work.scratch.reverse_key.set_reverse(&quoted.tuple, quoted.protocol);
    let entry = live_flow(context, &work.scratch.reverse_key, tables)?;
    let flow = entry.get();
    if context.is_ttl_exceeded(flow.action) {
        // Nobody is told of an error about an error (RFC 1122 section 3.2.2).
        return Some(Verdict::Drop(Reason::TtlExceeded));
    }
    work.error.quoted.set_reverse(&flow.rewrite);
    work.out.rewrite.source.set(&flow.rewrite.source);
    work.out.rewrite.destination.set(&flow.rewrite.destination);
    if keeps_source(outer.source, work.error.quote.key.tuple.destination, flow) {
        work.out.rewrite.source.set(&outer.source);
    }
    work.set_delivery(flow);
    Some(Verdict::Translate(Reason::IcmpTranslated))
}

/// Whether who reports an error about a packet to `end` stays known as `reporter`: a router
/// does, unless the error has to go where only the flow's own addresses are let through.
#[inline(always)]
fn keeps_source<A: Address>(reporter: A, end: A, flow: &Flow<A>) -> bool {
    let is_free = match flow.action {
        Action::REPLY | Action::REPLY_DIRECT | Action::REPLY_INTO_DEVICE => true,
        action => !action.is_reply() && flow.rewrite.source == end,
    };
    is_free && reporter != end
}
