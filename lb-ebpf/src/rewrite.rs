//! Changing addresses and ports of a packet, checksums included.

use aya_ebpf::{
    bindings::BPF_F_PSEUDO_HDR,
    helpers::bpf_csum_update,
    programs::{TcContext, XdpContext},
};
use lb_common::{
    abi::{
        address::{Family, Ipv4, Ipv6},
        flow::Tuple,
        frontend::TCP,
    },
    packet::{
        IP_OFFSET, Packet, checksum,
        header::{Header4, Header6},
        tunnel::Tunnel,
    },
};

use crate::{
    frame::{Frame, Linear, place, store},
    maps,
};

/// A packet whose TCP or UDP checksum can be changed.
pub trait L4Checksum: Frame {
    /// Brings the TCP or UDP checksum up to date with `changes`; `packet` is as it was before
    /// them. Nothing read before holds afterwards.
    fn update_l4_checksum<F: Rewrite>(&self, packet: &Packet<F>, changes: &Changes) -> Option<()>;
}

/// What the checksums of a packet are told of its new addresses and ports: running sums.
pub struct Changes {
    /// The sum of the addresses that it had.
    old: u64,
    /// How that changes.
    addresses: u64,
    /// How the sum of the ports changes.
    ports: u64,
}

/// Where the checksum stands.
#[inline(always)]
const fn checksum_field<F: Family>(packet: &Packet<F>) -> usize {
    packet.transport as usize + if packet.key.protocol == TCP as u32 { 16 } else { 6 }
}

/// A checksum over all of the packet, after `changes`.
#[inline(always)]
fn updated_checksum<F: Family>(packet: &Packet<F>, old: u16, changes: &Changes) -> u16 {
    let new = checksum::updated(old, changes.addresses + changes.ports);
    // A UDP checksum of zero means none.
    if packet.protocol() != TCP && new == 0 { !0 } else { new }
}

/// Has the kernel bring a checksum up to date, whatever stands in its place.
#[inline(never)]
fn update_by_kernel<F: Rewrite>(
    context: &TcContext,
    packet: &Packet<F>,
    changes: &Changes,
) -> Option<()> {
    let field = checksum_field(packet);
    let flags = if packet.protocol() == TCP { 0 } else { MARK_MANGLED_0 };
    let pseudo = flags | BPF_F_PSEUDO_HDR as u64 | F::checksum_flags();
    let addresses = checksum::fold32(changes.addresses);
    context.l4_csum_replace(field, 0, addresses as u64, pseudo).ok()?;
    if changes.ports != 0 {
        let ports = checksum::fold32(changes.ports);
        context.l4_csum_replace(field, 0, ports as u64, flags).ok()?;
    }
    Some(())
}

impl L4Checksum for TcContext {
    /// The checksum of a packet that this host made is often left to the device. Then the sum
    /// of the pseudo header stands in its place, which no change of a port concerns
    /// (CHECKSUM_PARTIAL). Anything else is a checksum over all of the packet, and changed
    /// without help, as each call of the kernel costs more than the rest.
    #[inline(always)]
    fn update_l4_checksum<F: Rewrite>(&self, packet: &Packet<F>, changes: &Changes) -> Option<()> {
        let window = Linear { start: self.start(), end: self.end() };
        let before = packet.transport.wrapping_sub(IP_OFFSET as u16);
        let length = F::length(&window)?.wrapping_sub(before);
        let seed = checksum::pseudo(changes.old, packet.protocol(), length);
        let field: *mut u16 = place(self, checksum_field(packet))?;
        // SAFETY: in bounds, as `place` checked.
        let old = unsafe { *field };
        // SAFETY: the context is the kernel's.
        let segment = unsafe { (*self.skb.skb).gso_size };
        // Zero: none, or the other way to write a sum of 0xffff.
        if old == 0 || old == checksum::fold16(seed) || segment != 0 {
            return update_by_kernel(self, packet, changes);
        }
        // SAFETY: as above.
        unsafe { *field = updated_checksum(packet, old, changes) };
        if F::HEADER_CHECKSUM.is_some() {
            // The device's sum over the packet (CHECKSUM_COMPLETE), if there is one: the changes
            // of the IP header even out in its own checksum, those of the checksum do not.
            // An IPv6 header evens out with the checksum.
            // SAFETY: the context is the kernel's. Without such a sum it does nothing.
            unsafe { bpf_csum_update(self.skb.skb, !checksum::fold32(changes.addresses)) };
        }
        Some(())
    }
}

impl L4Checksum for XdpContext {
    #[inline(always)]
    fn update_l4_checksum<F: Rewrite>(&self, packet: &Packet<F>, changes: &Changes) -> Option<()> {
        let field: *mut u16 = place(self, checksum_field(packet))?;
        // SAFETY: in bounds, as `place` checked.
        let old = unsafe { *field };
        if packet.protocol() == TCP || old != 0 {
            // SAFETY: as above.
            unsafe { *field = updated_checksum(packet, old, changes) };
        }
        Some(())
    }
}

/// What the IP header needs beyond the addresses.
pub trait Rewrite: Tunnel {
    /// Offset of the source address from the start of the frame; the destination follows.
    const ADDRESSES: usize;
    /// Offset of the header's own checksum from its start, where it has one.
    const HEADER_CHECKSUM: Option<usize>;
    /// Extra flags of `bpf_l4_csum_replace` when addresses change.
    fn checksum_flags() -> u64;
    /// Takes one from the TTL or hop limit, which is above 1, as a router does.
    fn decrement_ttl(frame: &impl Frame) -> Option<()>;
    /// Mends the IP header's own checksum, where it has one.
    fn update_header_checksum(frame: &impl Frame, difference: u64) -> Option<()>;
}

impl Rewrite for Ipv4 {
    const ADDRESSES: usize = IP_OFFSET + core::mem::offset_of!(Header4, source);
    const HEADER_CHECKSUM: Option<usize> = Some(core::mem::offset_of!(Header4, checksum));

    #[inline(always)]
    fn checksum_flags() -> u64 {
        0
    }

    #[inline(always)]
    fn decrement_ttl(frame: &impl Frame) -> Option<()> {
        let header: *mut Header4 = place(frame, IP_OFFSET)?;
        // SAFETY: in bounds, as `place` checked.
        unsafe {
            (*header).ttl = (*header).ttl.wrapping_sub(1);
            (*header).checksum = checksum::ttl_decremented((*header).checksum);
        }
        Some(())
    }

    #[inline(always)]
    fn update_header_checksum(frame: &impl Frame, difference: u64) -> Option<()> {
        const CHECKSUM: usize = IP_OFFSET + core::mem::offset_of!(Header4, checksum);
        let field: *mut u16 = place(frame, CHECKSUM)?;
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
    fn decrement_ttl(frame: &impl Frame) -> Option<()> {
        const HOP_LIMIT: usize = IP_OFFSET + core::mem::offset_of!(Header6, hop_limit);
        let field: *mut u8 = place(frame, HOP_LIMIT)?;
        // SAFETY: in bounds, as `place` checked.
        unsafe { *field = (*field).wrapping_sub(1) };
        Some(())
    }

    #[inline(always)]
    fn update_header_checksum(_frame: &impl Frame, _difference: u64) -> Option<()> {
        Some(())
    }
}

/// Gives a TCP or UDP packet the addresses and ports of `new`.
#[inline(always)]
pub fn apply<F: Rewrite>(
    frame: &impl L4Checksum,
    packet: &Packet<F>,
    new: &Tuple<F::Address>,
) -> Option<()> {
    let old = packet.tuple();
    let sum = checksum::addresses(old);
    let addresses = checksum::difference(sum, checksum::addresses(new));
    store(frame, F::ADDRESSES, &[new.source, new.destination])?;
    F::update_header_checksum(frame, addresses)?;
    let old_ports = [old.source_port, old.destination_port];
    let new_ports = [new.source_port, new.destination_port];
    let transport = packet.transport as usize;
    let mut ports = 0;
    if old_ports != new_ports {
        store(frame, transport, &new_ports)?;
        let [old, new] = [old_ports, new_ports].map(bytemuck::cast::<_, u32>);
        ports = checksum::difference(old.into(), new.into());
    }
    frame.update_l4_checksum(packet, &Changes { old: sum, addresses, ports })
}

/// BPF_F_MARK_MANGLED_0: a UDP checksum of zero means none, and stays so.
const MARK_MANGLED_0: u64 = 1 << 5;
