//! Encapsulation for direct server return: packets to a backend's node, and packets from the node
//! that received them.

use aya_ebpf::programs::TcContext;
use lb_common::{
    abi::{
        address::{Be16, Family},
        flow::Tuple,
        settings::Settings,
    },
    balance,
    packet::{IP_OFFSET, Packet, Window, tunnel::Tunnel},
};

use crate::{
    frame::{self, Frame, Linear},
    rewrite::Rewrite,
    tables::{FamilyMaps, Maps},
};

/// The length of the outer IP header ([`Tunnel::is_tunnel`]) in bytes if another node encapsulated
/// the packet for direct server return, else 0.
#[inline(never)]
pub fn outer_length<F: FamilyMaps + Tunnel, const ETHERNET: bool>(
    window: &Linear<ETHERNET>,
    settings: &Settings,
) -> u32 {
    let inside = Linear::<ETHERNET> { start: window.start + F::LENGTH as usize, end: window.end };
    let (Some(outer), Some(inner)) = (F::ends(window), F::ends(&inside)) else { return 0 };
    let is_ours =
        balance::tunnel::is_encapsulated_by_node::<F, _>(&outer, &inner, settings, &mut Maps);
    if is_ours { F::LENGTH } else { 0 }
}

/// Length of the outer IP header in bytes if the packet is encapsulated, else 0.
#[inline(always)]
pub fn encap_len<F: Family>(packet: &Packet<F>) -> usize {
    // Read from the map, because the verifier would follow the code once for each known length.
    // SAFETY: a reference.
    let length = unsafe { core::ptr::read_volatile(&raw const packet.encap_len) };
    (length & 0x3f) as usize
}

/// Decrements the packet's TTL and encapsulates it, with the addresses of `ends` in the outer
/// header.
#[inline(always)]
pub fn encapsulate<F: Rewrite>(frame: &impl Frame, ends: &Tuple<F::Address>) -> Option<()> {
    let header = F::outer(&Linear::<true>::of(frame), ends)?;
    F::decrement_ttl(frame)?;
    frame.resize::<F>(F::LENGTH as i32)?;
    frame::store(frame, IP_OFFSET, &header)
}

/// Decapsulates a packet.
#[inline(always)]
pub fn decapsulate<F: Tunnel>(frame: &impl Frame) -> Option<()> {
    frame.resize::<F>(-(F::LENGTH as i32))
}

/// Length of an ICMP error's header in bytes, before the quote.
const ICMP: usize = 8;

/// The MTU for the inner packet, in bytes, if `packet` is a router's ICMP error about a packet that
/// this node encapsulated and that is larger than the MTU of the path; 0 for any other, and for one
/// with too short a quote.
#[inline(never)]
pub fn reported_mtu<F: FamilyMaps + Tunnel>(
    context: &TcContext,
    settings: &Settings,
    packet: &Packet<F>,
) -> u16 {
    mtu_inside(context, settings, packet).unwrap_or(0)
}

#[inline(always)]
fn mtu_inside<F: FamilyMaps + Tunnel>(
    context: &TcContext,
    settings: &Settings,
    packet: &Packet<F>,
) -> Option<u16> {
    let header = F::LENGTH as usize;
    if packet.encap_len != 0 || packet.transport as usize != IP_OFFSET + header {
        return None;
    }
    let window = frame::pull::<true>(context);
    let [kind, _, _, mtu] = window.load::<[Be16; 4]>(IP_OFFSET + header)?;
    let quoted = Linear::<true> { start: window.start + header + ICMP, end: window.end };
    let inside = Linear::<true> { start: quoted.start + header, end: quoted.end };
    if kind.get() != u16::from_be_bytes([F::TOO_BIG.0, F::TOO_BIG.1]) || !F::is_tunnel(&quoted) {
        return None;
    }
    let ([own, other], inner) = (F::ends(&quoted)?, F::ends(&inside)?);
    let is_sent = own == packet.tuple().destination
        && balance::tunnel::is_encapsulated_by_node::<F, _>(
            &[other, own],
            &inner,
            settings,
            &mut Maps,
        );
    if is_sent { mtu.get().checked_sub(F::LENGTH as u16) } else { None }
}

/// Replaces an ICMP error by the inner packet that it quotes, so that the packet can be answered.
#[inline(never)]
pub fn decapsulate_quote<F: Tunnel>(context: &TcContext, packet: &mut Packet<F>) -> Option<()> {
    context.resize::<F>(-((2 * F::LENGTH as usize + ICMP) as i32))?;
    F::parse(&frame::pull::<true>(context), packet)
}

/// The number of TCP options that are searched for the segment size, which usually comes first.
const MAX_OPTIONS: u32 = 4;

/// Lowers the maximum segment size in the backend's SYN-ACK by the length of the outer header,
/// because the client's packets will be encapsulated. A SYN-ACK that cannot be changed stays as it
/// is: packets that are then too large are answered with an ICMP error.
#[inline(never)]
pub fn clamp<F: Tunnel>(context: &TcContext, packet: &Packet<F>) -> Option<()> {
    const END: u8 = 0;
    const NOTHING: u8 = 1;
    const SEGMENT_SIZE: u8 = 2;
    /// The segment size that every IPv4 host accepts (RFC 9293 section 3.7.1).
    const LEAST: u16 = 536;
    let window = Linear::<true>::of(context);
    let transport = packet.transport as usize;
    let mut option = transport + 20;
    let mut looked_at = 0;
    while looked_at < MAX_OPTIONS {
        let [kind, length] = window.load::<[u8; 2]>(option)?;
        match kind {
            SEGMENT_SIZE => break,
            END => return None,
            NOTHING => option += 1,
            _ => option += length as usize,
        }
        looked_at += 1;
    }
    let [kind, _, high, low] = window.load::<[u8; 4]>(option)?;
    // The checksum is updated in words, which start at even offsets.
    if kind != SEGMENT_SIZE || (option - transport) & 1 != 0 {
        return None;
    }
    let size = u16::from_be_bytes([high, low]);
    let clamped = size.wrapping_sub(F::LENGTH as u16);
    if size < LEAST || clamped < LEAST {
        return None;
    }
    let (old, new) = (size.to_be(), clamped.to_be());
    frame::store(context, option + 2, &new)?;
    context.l4_csum_replace(transport + 16, old.into(), new.into(), 2).ok()
}
