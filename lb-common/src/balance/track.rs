//! The life of a flow: the state that its packets show, and when it is closed or expired.

use crate::{
    abi::{
        address::Family,
        flow::{ANSWERED, CLIENT_FIN, Flow, LASTING, ONE_WAY, RESET, SERVER_FIN, STREAM},
        settings::{Lifetimes, STATES, Settings, Timeouts},
    },
    packet::{ACK, FIN, PacketKind, RST, SYN},
};

use super::{
    tables::{Entry, FlowEntry, FlowTable, Tables},
    types::{Context, Work},
};

/// The idle timeout of a flow in `state`, in the unit of `timeouts`.
pub const fn timeout(is_tcp: bool, state: u8, timeouts: &Timeouts) -> u32 {
    match is_tcp {
        true if state & RESET != 0 => timeouts.tcp_reset,
        true if is_closed(state) => timeouts.tcp_closing,
        true if is_closing(state) && state & ONE_WAY != 0 => timeouts.tcp_fin_one_way,
        true if is_closing(state) => timeouts.tcp_half_closed,
        true if state & ANSWERED != 0 => timeouts.tcp_established,
        true => timeouts.tcp_syn,
        false if state & STREAM != 0 => timeouts.udp_stream,
        false => timeouts.udp,
    }
}

/// The idle timeouts of all states.
pub const fn lifetimes(timeouts: &Timeouts) -> Lifetimes {
    let mut ticks = [0; 2 * STATES];
    let mut state = 0;
    while state < STATES {
        ticks[state] = timeout(true, state as u8, timeouts);
        ticks[STATES + state] = timeout(false, state as u8, timeouts);
        state += 1;
    }
    Lifetimes { ticks }
}

/// The idle timeout of a TCP or UDP flow in `state`, in ticks.
#[inline(always)]
pub fn lifetime(kind: PacketKind, state: u8, settings: &Settings) -> u32 {
    const { assert!(PacketKind::Tcp as usize == 0 && PacketKind::Udp as usize == 1) };
    // In two steps: verifiers before 6.10 do not bound the result of an OR of two numbers, and the
    // compiler would add these by an OR.
    let (tables, _) = settings.lifetimes.ticks.as_chunks::<STATES>();
    tables[kind as usize & 1][state as usize & (STATES - 1)]
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
pub fn is_expired<A>(flow: &Flow<A>, kind: PacketKind, now: u32, settings: &Settings) -> bool {
    is_past(flow.last_seen, now, lifetime(kind, flow.state, settings))
}

/// Whether more than `lifetime` has passed since `last_seen`, all in ticks.
#[inline(always)]
pub(crate) fn is_past(last_seen: u32, now: u32, lifetime: u32) -> bool {
    let age = now.wrapping_sub(last_seen);
    // The age is negative if another CPU read its clock a tick later.
    (age as i32) >= 0 && age > lifetime
}

/// Notes a packet of a known flow in its entry. A change of state, and once in each period the
/// time, is written to the reverse entry too: only then is there a second look-up.
#[inline(always)]
pub(crate) fn note<F: Family, T: Tables<F>>(
    context: &Context<F>,
    table: FlowTable,
    entry: &T::FlowEntry,
    flow: &Flow<F::Address>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) {
    let seen = observed(context.packet.kind, context.packet.detail, flow.action.is_reply());
    let mut state = flow.state | seen;
    // In the kernel `flow` is the entry itself, which changes below.
    let last_seen = flow.last_seen;
    let idle = context.now.wrapping_sub(last_seen);
    let ticks = context.settings.ticks_per_second;
    if state == flow.state && idle < ticks {
        return;
    }
    entry.set_last_seen(context.now);
    if idle >= ticks {
        state = aged(context.packet.kind, state, seen);
    }
    if state != flow.state {
        entry.set_state(state);
    } else {
        let period = ticks.wrapping_mul(REVERSE_REFRESH_SECONDS);
        if context.now.checked_div(period) == last_seen.checked_div(period) {
            return;
        }
    }
    work.scratch.reverse_key.set_reverse(&flow.rewrite, context.packet.key.protocol);
    note_reverse(context, table, state, work, tables);
}

/// The state of a flow whose last packet but this one, which has shown `seen`, is more than a second
/// old.
#[inline(always)]
fn aged(kind: PacketKind, state: u8, seen: u8) -> u8 {
    if matches!(kind, PacketKind::Tcp) {
        // A real RST silences the side that gets it, and the side that sent it says nothing else.
        // Whoever goes on does not believe it: it was forged, or its numbers were wrong.
        return if seen & RESET == 0 { state & !RESET } else { state };
    }
    // As `nf_conntrack_udp_packet` tells a stream from a question and its answer.
    match state & (ANSWERED | LASTING) {
        ANSWERED => state | LASTING,
        0 | LASTING => state,
        _ => state | STREAM,
    }
}

/// Updates the reverse entry, whose key is `work.scratch.reverse_key`.
#[inline(never)]
fn note_reverse<F: Family, T: Tables<F>>(
    context: &Context<F>,
    table: FlowTable,
    state: u8,
    work: &mut Work<F::Address>,
    tables: &mut T,
) {
    if let Some(reverse) = tables.flow(table, &work.scratch.reverse_key) {
        let other = reverse.get();
        if other.rewrite.is_reverse_of(context.packet.tuple()) {
            reverse.set_last_seen(context.now);
            reverse.set_state((other.state | state) & (state | !RESET));
        }
    }
}

/// A direction without packets of its own is kept alive by the other one, which updates its entry
/// once in each period of this many seconds. Shorter than every timeout.
const REVERSE_REFRESH_SECONDS: u32 = 5;

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
