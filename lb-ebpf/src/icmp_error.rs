//! Translates an ICMP error and the packet that it quotes.
//!
//! All stores use helpers that take offsets: errors are rare, and their quotes may be outside the
//! linear part.

use aya_ebpf::{
    helpers::generated::{bpf_csum_diff, bpf_skb_pull_data, bpf_skb_store_bytes},
    programs::TcContext,
};
use lb_common::{
    balance::Work,
    packet::{IP_OFFSET, Packet, quote::ParseQuote},
};

use crate::{frame::Linear, rewrite::Rewrite};

/// The number of bytes that hold the headers of an error and of its quote, at their longest: 14 +
/// 60 + 8 + 60 + 8 with IPv4, or 14 + 40 + 40 + 8 + 40 + 8 and more with encapsulated IPv6.
const MOST_HEADERS: u32 = 200;

/// Parses the quote of the ICMP error `packet` as [`ParseQuote::parse_quote`] does. `behind` is the
/// length of an outer IP header before the packet, in bytes.
#[inline(never)]
pub fn read<F: ParseQuote, const ETHERNET: bool>(
    context: &TcContext,
    packet: &Packet<F>,
    behind: usize,
    work: &mut Work<F::Address>,
) -> Option<()> {
    let length = context.len();
    let wanted = if length < MOST_HEADERS { length } else { MOST_HEADERS };
    // SAFETY: the context is the kernel's. On failure the frame does not change, and is parsed as
    // far as its linear part goes.
    unsafe { bpf_skb_pull_data(context.skb.skb, wanted) };
    let window = Linear::<ETHERNET> { start: context.data() + behind, end: context.data_end() };
    F::parse_quote(&window, packet, &mut work.error.quote)
}

/// Gives the ICMP error `packet` the addresses of `work.out.rewrite`, and its quote the addresses
/// and ports of `work.error.quoted`.
///
/// The transport checksum in the quote is left, because the quote is truncated and the checksum
/// cannot be verified. A change that a checksum inside the frame offsets does not change the
/// device's sum over the whole frame (CHECKSUM_COMPLETE), so no store updates that sum.
#[inline(never)]
pub fn apply<F: Rewrite>(
    context: &TcContext,
    packet: &Packet<F>,
    work: &Work<F::Address>,
) -> Option<()> {
    let quote = &work.error.quote;
    let new = &work.error.quoted;
    let (from, to) = (packet.tuple(), &work.out.rewrite);
    let both = 2 * size_of::<F::Address>() as u32;
    let inner_header = quote.header as usize;
    let outer = difference(&raw const from.source, &raw const to.source, both, 0);
    let quoted = &raw const quote.key.tuple;
    let field = packet.transport as usize + 2;
    if let Some(at) = F::HEADER_CHECKSUM {
        let inner = difference(quoted, new, both, 0);
        context.l3_csum_replace(IP_OFFSET + at, 0, outer, 0).ok()?;
        context.l3_csum_replace(inner_header + at, 0, inner, 0).ok()?;
        // The header checksum of the quote offsets its addresses, but not its ports.
        let ports = &raw const quote.key.tuple.source_port;
        let ports = difference(ports, &raw const new.source_port, PORTS, 0);
        context.l4_csum_replace(field, 0, ports, 0).ok()?;
    } else {
        // The pseudo header (RFC 4443 section 2.3) has the addresses of the error.
        let all = difference(quoted, new, both + PORTS, outer);
        context.l4_csum_replace(field, 0, all, 0).ok()?;
    }
    store(context, F::ADDRESSES, &raw const to.source, both, 0)?;
    store(context, inner_header + F::ADDRESSES - IP_OFFSET, &raw const new.source, both, 0)?;
    store(context, quote.transport as usize, &raw const new.source_port, PORTS, 0)
}

/// Length of both ports in bytes.
const PORTS: u32 = 4;

/// The change of a sum when `length` bytes are replaced, added to `before`. The helper needs no
/// stack for the words.
#[inline(always)]
pub fn difference<T>(old: *const T, new: *const T, length: u32, before: u64) -> u64 {
    // SAFETY: there are `length` bytes at both, a whole number of words.
    unsafe {
        bpf_csum_diff(old.cast_mut().cast(), length, new.cast_mut().cast(), length, before as u32)
            as u32 as u64
    }
}

/// Stores `length` bytes at `offset`, with the flags of `bpf_skb_store_bytes`.
#[inline(always)]
pub fn store<T>(
    context: &TcContext,
    offset: usize,
    from: *const T,
    length: u32,
    flags: u64,
) -> Option<()> {
    // SAFETY: there are `length` bytes at `from`, in this CPU's entry of the scratch map.
    let result =
        unsafe { bpf_skb_store_bytes(context.skb.skb, offset as u32, from.cast(), length, flags) };
    (result == 0).then_some(())
}
