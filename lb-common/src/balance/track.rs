//! The life of a flow: the state that its packets show, and when it is closed or expired.

use crate::{
    abi::{
        address::Family,
        flow::{
            ANSWERED, CLIENT_FIN, CONFIRMED, Flow, LASTING, NextHop, ONE_WAY, RESET, SERVER_FIN,
            STATES, STREAM,
        },
        flow_table::TIMES,
        settings::{FORMER_STATES, FormerLifetimes, Lifetimes, Settings, Timeouts},
    },
    flow_table::{FREE, NEVER, age, class},
    packet::{ACK, FIN, PSH, PacketKind, RST, SYN},
};

use super::{
    tables::{Note, Tables},
    types::{Context, Work},
};

/// The idle timeout of a flow in `state`, in the unit of `timeouts`.
pub const fn timeout(is_tcp: bool, state: u8, timeouts: &Timeouts) -> u32 {
    match is_tcp {
        true if state & RESET != 0 => timeouts.tcp_reset,
        true if is_closed(state) => timeouts.tcp_closing,
        true if is_closing(state) && state & ONE_WAY != 0 => timeouts.tcp_fin_one_way,
        true if is_closing(state) => timeouts.tcp_half_closed,
        true if state & CONFIRMED != 0 => timeouts.tcp_established,
        true => timeouts.tcp_syn,
        false if state & STREAM != 0 => timeouts.udp_stream,
        false => timeouts.udp,
    }
}

/// The idle timeouts and classes of all states.
pub const fn lifetimes(timeouts: &Timeouts) -> Lifetimes {
    let mut words = [NEVER; 4 * STATES];
    words[0] = FREE;
    let mut state = 0;
    while state < 2 * STATES {
        let is_tcp = state < STATES;
        let timeout = timeout(is_tcp, (state % STATES) as u8, timeouts);
        // Longer ones would look like the future.
        let timeout = if timeout < TIMES / 2 { timeout } else { TIMES / 2 - 1 };
        words[2 * STATES + state] = ((class(state as u8) as u32) << 24) | timeout;
        state += 1;
    }
    Lifetimes { words }
}

/// The same for releases up to 0.1.0, which know no handshakes that are confirmed, in ticks.
pub const fn former_lifetimes(lifetimes: &Lifetimes, time_shift: u32) -> FormerLifetimes {
    let mut ticks = [0; 2 * FORMER_STATES];
    let mut index = 0;
    while index < 2 * FORMER_STATES {
        let (udp, state) = (index / FORMER_STATES, index % FORMER_STATES);
        let confirmed = if udp == 0 && state & ANSWERED as usize != 0 { CONFIRMED } else { 0 };
        let word = lifetimes.words[(2 + udp) * STATES + (state | confirmed as usize)];
        ticks[index] = Lifetimes::ticks(word) << time_shift;
        index += 1;
    }
    FormerLifetimes { ticks }
}

/// The idle timeout of a TCP or UDP flow in `state`, in the unit of times.
#[inline(always)]
pub fn lifetime(kind: PacketKind, state: u8, settings: &Settings) -> u32 {
    const { assert!(PacketKind::Tcp as usize == 0 && PacketKind::Udp as usize == 1) };
    // In two steps: verifiers before 6.10 do not bound the result of an OR of two numbers, and the
    // compiler would add these by an OR.
    let (tables, _) = settings.flow_lifetimes.words.as_chunks::<STATES>();
    Lifetimes::ticks(tables[2 + (kind as usize & 1)][state as usize & (STATES - 1)])
}

/// Whether either side has begun to close the TCP connection.
#[inline(always)]
pub const fn is_closing(state: u8) -> bool {
    state & (CLIENT_FIN | SERVER_FIN | RESET) != 0
}

/// Whether both sides have closed the TCP connection, or one has reset it.
#[inline(always)]
pub const fn is_closed(state: u8) -> bool {
    state & RESET != 0 || state & (CLIENT_FIN | SERVER_FIN) == CLIENT_FIN | SERVER_FIN
}

/// Whether the flow is past its idle timeout, so that it counts as absent.
#[inline(always)]
pub(crate) fn is_expired<F: Family>(
    flow: &Flow<F::Address>,
    kind: PacketKind,
    context: &Context<F>,
) -> bool {
    is_idle(flow, kind, flow.state, context)
}

/// Whether the flow is past the idle timeout of `state`.
#[inline(always)]
fn is_idle<F: Family>(
    flow: &Flow<F::Address>,
    kind: PacketKind,
    state: u8,
    context: &Context<F>,
) -> bool {
    age(flow.last_seen, context.time()) > lifetime(kind, state, context.settings)
}

/// Whether the flow counts as absent for this packet. The ports of a closed connection rest for its idle
/// timeout, and the sweep removes it later. A packet in between that is neither SYN nor RST shows that the
/// connection was never closed: the packets that closed it were forged, or had wrong sequence numbers.
#[inline(always)]
pub(crate) fn is_over<F: Family>(flow: &Flow<F::Address>, context: &Context<F>) -> bool {
    let packet = context.packet;
    // 0xff or 0, without a branch: each would be a path for the verifier.
    let is_tcp = (packet.kind as u8 & 1).wrapping_sub(1);
    let goes_on = (((packet.detail / SYN) | (packet.detail / RST)) & 1).wrapping_sub(1);
    // As if it was half closed.
    let state = flow.state & !((RESET | SERVER_FIN) & is_tcp & goes_on);
    is_idle(flow, packet.kind, state, context)
}

/// Whether more than `lifetime` has passed since `last_seen`, all in ticks.
#[inline(always)]
pub(crate) fn is_past(last_seen: u32, now: u32, lifetime: u32) -> bool {
    let age = now.wrapping_sub(last_seen);
    // The age is negative if another CPU read its clock a tick later.
    (age as i32) >= 0 && age > lifetime
}

/// Notes a packet of the flow `work.scratch.known`: a change of its state at once, the time about once
/// in a second. `confirms` says that the packet completes a TCP handshake.
#[inline(always)]
pub(crate) fn note<F: Family, T: Tables<F>>(
    context: &Context<F>,
    confirms: bool,
    work: &mut Work<F::Address>,
    tables: &mut T,
) {
    let known = &work.scratch.known;
    let (old, kind) = (known.flow.state, context.packet.kind);
    let (flags, is_reply) = (context.packet.detail, known.flow.action.is_reply());
    let mut seen = observed(kind, flags, is_reply);
    if confirms {
        seen |= ANSWERED | CONFIRMED;
    }
    let mut state = old | seen;
    let time = context.time();
    let is_old = age(known.flow.last_seen, time) >= context.settings.times(1);
    if state == old && !is_old {
        return;
    }
    if is_old {
        state = aged(kind, flags, is_reply, state);
    }
    let note = Note { clear: old & !state, set: state & !old, time };
    tables.note_flow(&context.packet.key, known, note);
    // Of this packet too.
    work.scratch.known.flow.next_hop = NextHop::UNKNOWN;
}

/// The state of a flow whose last packet but this one is more than a second old.
#[inline(always)]
fn aged(kind: PacketKind, flags: u8, is_reply: bool, state: u8) -> u8 {
    if matches!(kind, PacketKind::Tcp) {
        // A real RST silences the side that gets it, and the side that sent it says nothing else. A
        // side that sent a FIN sends no more data, which PSH shows. Whoever goes on does not believe
        // it: it was forged, or its numbers were wrong.
        let fin = if is_reply { SERVER_FIN } else { CLIENT_FIN };
        // 0xff or 0, without a branch, as above.
        let goes_on = ((flags / RST) & 1).wrapping_sub(1);
        let has_data = ((flags / PSH) & !(flags / FIN) & 1).wrapping_neg();
        return state & !((RESET & goes_on) | (fin & has_data));
    }
    // As `nf_conntrack_udp_packet` tells a stream from a question and its answer.
    match state & (ANSWERED | LASTING) {
        ANSWERED => state | LASTING,
        0 | LASTING => state,
        _ => state | STREAM,
    }
}

/// The bits of its flow's state that a packet shows.
#[inline(always)]
pub(crate) fn observed(kind: PacketKind, flags: u8, is_reply: bool) -> u8 {
    let mut state = 0;
    if !matches!(kind, PacketKind::Tcp) {
        return if is_reply { ANSWERED } else { 0 };
    }
    if flags & RST != 0 {
        state |= RESET;
    }
    if flags & FIN != 0 {
        state |= if is_reply { SERVER_FIN } else { CLIENT_FIN };
    }
    if is_reply && flags & (SYN | ACK) == SYN | ACK {
        state |= ANSWERED;
    }
    state
}
