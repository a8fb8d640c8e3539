//! ICMP errors. An error about a packet of a known flow goes to the end that sent the packet, and
//! its quote is translated to the packet as that end had sent it.

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
    lookup::find_live,
    no_flow,
    tables::Tables,
    types::{Candidate, Context, Site, Verdict, Work},
};

/// Decides on an ICMP error at `site`, for which [`candidate()`](super::candidate()) returned
/// `candidate`; if `is_quoted`, `work.error.quote` holds its quote. The flow's state and times do
/// not change, because any host can have sent the error.
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

/// The verdict on the error if it is about a packet of a known flow.
///
/// The quoted packet had been translated before it was sent. So the reverse of the quoted tuple is
/// the key of the flow's other direction. The error is sent where that direction sends packets; its
/// rewrite, reversed, is the original tuple that goes back into the quote.
#[inline(always)]
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
    work.scratch.new.reply_key.set_reverse(&quoted.tuple, quoted.protocol);
    let scratch = &mut work.scratch;
    if !find_live(context, &scratch.new.reply_key, &mut scratch.known, tables) {
        return None;
    }
    let flow = &work.scratch.known.flow;
    if context.is_ttl_exceeded(flow.action) {
        // No ICMP error is sent about an ICMP error (RFC 1122 section 3.2.2).
        return Some(Verdict::Drop(Reason::TtlExceeded));
    }
    work.error.quoted.set_reverse(&flow.rewrite);
    work.out.rewrite.source.set(&flow.rewrite.source);
    work.out.rewrite.destination.set(&flow.rewrite.destination);
    if keeps_source(outer.source, work.error.quote.key.tuple.destination, flow) {
        work.out.rewrite.source.set(&outer.source);
    }
    work.set_delivery();
    Some(Verdict::Translate(Reason::IcmpTranslated))
}

/// Whether the error keeps its source address `reporter`. A router that reports an error about a
/// packet to `end` keeps it, unless the error goes where only the flow's own addresses are
/// accepted.
#[inline(always)]
fn keeps_source<A: Address>(reporter: A, end: A, flow: &Flow<A>) -> bool {
    let is_free = match flow.action {
        Action::REPLY | Action::REPLY_DIRECT | Action::REPLY_INTO_DEVICE => true,
        action => !action.is_reply() && flow.rewrite.source == end,
    };
    is_free && reporter != end
}
