//! IP fragments. The first one of a datagram has its ports and is decided on like a whole packet;
//! it stores the ports for the later fragments, which go where the flow's packets go.

use crate::{
    abi::{
        address::{Address, Family},
        counter::Reason,
        fragment::{FRAGMENT_SECONDS, Fragment},
        settings::Settings,
    },
    packet::Packet,
};

use super::{
    lookup::find_live,
    no_flow,
    tables::Tables,
    track,
    types::{Candidate, Context, Site, Verdict, Work},
};

/// Decides on a fragment without ports at `site`, for which [`candidate()`](super::candidate())
/// returned `candidate`. A fragment to a ClusterIP that arrives before the first one is dropped.
#[inline(always)]
pub fn decide<F: Family, T: Tables<F>>(
    candidate: Candidate,
    packet: &Packet<F>,
    site: Site,
    settings: &Settings,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Verdict {
    let context = Context { packet, settings, site, now: tables.now() };
    match of_flow(&context, work, tables) {
        Some(verdict) => verdict,
        None => no_flow::decide(candidate, &context, work, tables),
    }
}

/// Stores the ports of the first fragment of a datagram that is translated.
#[inline(never)]
pub fn remember<F: Family, T: Tables<F>>(
    packet: &Packet<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) {
    set_key(packet, work);
    let tuple = packet.tuple();
    let fragment = Fragment {
        source_port: tuple.source_port,
        destination_port: tuple.destination_port,
        last_seen: tables.now(),
    };
    tables.insert_fragment(&work.scratch.fragment, &fragment);
}

#[inline(always)]
fn set_key<F: Family>(packet: &Packet<F>, work: &mut Work<F::Address>) {
    let tuple = packet.tuple();
    work.scratch.fragment.source.set(&tuple.source);
    work.scratch.fragment.destination.set(&tuple.destination);
    work.scratch.fragment.identification = packet.identification;
    work.scratch.fragment.protocol = packet.key.protocol;
}

/// The verdict on a later fragment, if the first one was translated. The flow's state and times
/// stay as the first fragment left them.
#[inline(always)]
fn of_flow<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Option<Verdict> {
    let packet = context.packet;
    set_key(packet, work);
    let first = tables.fragment(&work.scratch.fragment)?;
    let lifetime = context.settings.ticks_per_second.wrapping_mul(FRAGMENT_SECONDS);
    if track::is_past(first.last_seen, context.now, lifetime) {
        return None;
    }
    let key = &mut work.scratch.new.reply_key;
    key.tuple.set(packet.tuple());
    key.protocol = packet.key.protocol;
    (key.tuple.source_port, key.tuple.destination_port) =
        (first.source_port, first.destination_port);
    let scratch = &mut work.scratch;
    if !find_live(context, &scratch.new.reply_key, &mut scratch.known, tables) {
        return None;
    }
    let flow = &work.scratch.known.flow;
    if context.is_ttl_exceeded(flow.action) {
        // No ICMP error is sent about a later fragment (RFC 1122 section 3.2.2).
        return Some(Verdict::Drop(Reason::TtlExceeded));
    }
    work.out.rewrite.set(&flow.rewrite);
    let reason = if flow.action.is_reply() { Reason::Reply } else { Reason::Request };
    work.set_delivery();
    Some(Verdict::Translate(reason))
}
