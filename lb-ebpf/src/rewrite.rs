//! Changing addresses and ports of a packet, checksums included.

use aya_ebpf::{bindings::BPF_F_PSEUDO_HDR, programs::TcContext};
use lb_common::{
    abi::{
        address::{Address, Family, Ipv4, Ipv6},
        flow::Tuple,
        frontend::TCP,
    },
    packet::{IP_OFFSET, Packet, checksum, header::Header4, header::Header6},
};

use crate::maps;

/// What the IP header needs beyond the addresses.
pub trait Rewrite: Family {
    /// Offset of the source address from the start of the frame; the destination follows.
    const ADDRESSES: usize;
    /// Offset of the header's own checksum from its start, where it has one.
    const HEADER_CHECKSUM: Option<usize>;
    /// Extra flags of `bpf_l4_csum_replace` when addresses change.
    fn checksum_flags() -> u64;
    /// Takes one from the TTL or hop limit, which is above 1, as a router does.
    fn take_hop(context: &TcContext) -> Option<()>;
    /// Mends the IP header's own checksum, where it has one.
    fn mend_header(context: &TcContext, difference: u64) -> Option<()>;
}

impl Rewrite for Ipv4 {
    const ADDRESSES: usize = IP_OFFSET + core::mem::offset_of!(Header4, source);
    const HEADER_CHECKSUM: Option<usize> = Some(core::mem::offset_of!(Header4, checksum));

    #[inline(always)]
    fn checksum_flags() -> u64 {
        0
    }

    #[inline(always)]
    fn take_hop(context: &TcContext) -> Option<()> {
        const TTL: usize = IP_OFFSET + core::mem::offset_of!(Header4, ttl);
        // TTL and protocol.
        let field = place::<u16>(context, TTL)?;
        // SAFETY: in bounds, as `place` checked.
        let old = unsafe { *field };
        let new = u16::from_be(old).wrapping_sub(0x100).to_be();
        // SAFETY: as above.
        unsafe { *field = new };
        let words = |half: u16| [bytemuck::cast([half, 0u16])];
        let difference = checksum::add(checksum::subtract(0, &words(old)), &words(new));
        Self::mend_header(context, difference)
    }

    #[inline(always)]
    fn mend_header(context: &TcContext, difference: u64) -> Option<()> {
        const CHECKSUM: usize = IP_OFFSET + core::mem::offset_of!(Header4, checksum);
        let field = place::<u16>(context, CHECKSUM)?;
        // SAFETY: in bounds, as `place` checked.
        unsafe { *field = checksum::updated(*field, difference) };
        Some(())
    }
}

impl Rewrite for Ipv6 {
    const ADDRESSES: usize = IP_OFFSET + core::mem::offset_of!(Header6, source);
    const HEADER_CHECKSUM: Option<usize> = None;

    #[inline(always)]
    fn checksum_flags() -> u64 {
        /// An IPv6 header has no checksum that evens out a change of addresses in a sum
        /// over the whole packet (CHECKSUM_COMPLETE); the kernel must be told.
        const BPF_F_IPV6: u64 = 1 << 7;
        if maps::HAS_CSUM_IPV6.load() != 0 { BPF_F_IPV6 } else { 0 }
    }

    #[inline(always)]
    fn take_hop(context: &TcContext) -> Option<()> {
        const HOP_LIMIT: usize = IP_OFFSET + core::mem::offset_of!(Header6, hop_limit);
        let field = place::<u8>(context, HOP_LIMIT)?;
        // SAFETY: in bounds, as `place` checked.
        unsafe { *field = (*field).wrapping_sub(1) };
        Some(())
    }

    #[inline(always)]
    fn mend_header(_context: &TcContext, _difference: u64) -> Option<()> {
        Some(())
    }
}

/// The bytes at `offset` as a `T` that can be written to, if they lie in the frame's
/// first piece.
#[inline(always)]
fn place<T>(context: &TcContext, offset: usize) -> Option<*mut T> {
    let at = context.data() + (offset & 0x3fff);
    if at + size_of::<T>() > context.data_end() {
        return None;
    }
    Some(at as *mut T)
}

/// Stores into the frame.
#[inline(always)]
pub fn store<T: Copy>(context: &TcContext, offset: usize, value: &T) -> Option<()> {
    let place = place::<T>(context, offset)?;
    // SAFETY: in bounds, as `place` checked; unaligned stores are as for loads.
    unsafe { *place = *value };
    Some(())
}

/// Gives a TCP or UDP packet the addresses and ports of `new`.
#[inline(always)]
pub fn apply<F: Rewrite>(
    context: &TcContext,
    packet: &Packet<F>,
    new: &Tuple<F::Address>,
) -> Option<()> {
    let old = packet.tuple();
    let mut addresses = 0;
    if old.source != new.source {
        addresses = change(addresses, old.source, new.source);
    }
    if old.destination != new.destination {
        addresses = change(addresses, old.destination, new.destination);
    }
    store(context, F::ADDRESSES, &[new.source, new.destination])?;
    F::mend_header(context, addresses)?;
    let old_ports = [old.source_port, old.destination_port];
    let new_ports = [new.source_port, new.destination_port];
    let transport = packet.transport as usize;
    let ports_change = old_ports != new_ports;
    if ports_change {
        store(context, transport, &new_ports)?;
    }
    // From here on the kernel may move the packet: only offsets, no pointers.
    let (field, flags) = if packet.protocol() == TCP {
        (transport + 16, 0)
    } else {
        (transport + 6, MARK_MANGLED_0)
    };
    let pseudo = flags | BPF_F_PSEUDO_HDR as u64 | F::checksum_flags();
    context.l4_csum_replace(field, 0, checksum::fold32(addresses) as u64, pseudo).ok()?;
    if ports_change {
        let ports = checksum::add(
            checksum::subtract(0, &[bytemuck::cast(old_ports)]),
            &[bytemuck::cast(new_ports)],
        );
        context.l4_csum_replace(field, 0, checksum::fold32(ports) as u64, flags).ok()?;
    }
    Some(())
}

/// BPF_F_MARK_MANGLED_0: a UDP checksum of zero means none, and stays so.
const MARK_MANGLED_0: u64 = 1 << 5;

#[inline(always)]
fn change<A: Address>(sum: u64, old: A, new: A) -> u64 {
    checksum::add(checksum::subtract(sum, old.words()), new.words())
}
