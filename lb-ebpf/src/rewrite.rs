//! Changes addresses and ports of a packet, checksums included.

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
    /// Updates the TCP or UDP checksum after `changes`; `packet` is as it was before them. Values
    /// that were loaded from the packet before are not valid afterwards.
    fn update_l4_checksum<F: Rewrite>(&self, packet: &Packet<F>, changes: &Changes) -> Option<()>;
}

/// The changes of addresses and ports that a packet's checksums need, as running sums.
pub struct Changes {
    /// The sum of the old addresses.
    old: u64,
    /// The change of the sum of the addresses.
    addresses: u64,
    /// The change of the sum of the ports.
    ports: u64,
}

/// The offset of the checksum from the start of the frame (after decapsulation).
#[inline(always)]
const fn checksum_field<F: Family>(packet: &Packet<F>) -> usize {
    packet.transport as usize + if packet.key.protocol == TCP as u32 { 16 } else { 6 }
}

/// A complete checksum after `changes`.
#[inline(always)]
fn updated_checksum<F: Family>(packet: &Packet<F>, old: u16, changes: &Changes) -> u16 {
    let new = checksum::updated(old, changes.addresses + changes.ports);
    // A UDP checksum of zero means that there is none (RFC 768).
    if packet.protocol() != TCP && new == 0 { !0 } else { new }
}

/// Updates the checksum by helpers of the kernel, whether it is complete or not.
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
    /// A packet of this host often has no complete checksum yet, because the device will compute it
    /// (CHECKSUM_PARTIAL): its field holds the sum of the pseudo header, which has no ports. Any
    /// other checksum is complete and is updated here, because a helper call costs more than all
    /// the rest.
    #[inline(always)]
    fn update_l4_checksum<F: Rewrite>(&self, packet: &Packet<F>, changes: &Changes) -> Option<()> {
        let window = Linear::<true>::of(self);
        let before = packet.transport.wrapping_sub(IP_OFFSET as u16);
        let length = F::length(&window)?.wrapping_sub(before);
        let seed = checksum::pseudo(changes.old, packet.protocol(), length);
        let field: *mut u16 = place(self, checksum_field(packet))?;
        // SAFETY: in bounds, as `place` checked.
        let old = unsafe { *field };
        // SAFETY: the context is the kernel's.
        let segment = unsafe { (*self.skb.skb).gso_size };
        // Zero is no checksum, or the other representation of 0xffff.
        if old == 0 || old == checksum::fold16(seed) || segment != 0 {
            return update_by_kernel(self, packet, changes);
        }
        // SAFETY: as above.
        unsafe { *field = updated_checksum(packet, old, changes) };
        if F::HEADER_CHECKSUM.is_some() {
            // The device's sum over the packet (CHECKSUM_COMPLETE), if there is one: the header
            // checksum offsets the changes of the IP header, but the update of the L4 checksum is
            // not offset. With IPv6, the L4 checksum offsets the changes of the IP header.
            // SAFETY: the context is the kernel's. Without such a sum the helper does nothing.
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

/// The family's part of a translation, apart from the addresses.
pub trait Rewrite: Tunnel {
    /// Offset of the source address from the start of the frame. The destination follows it.
    const ADDRESSES: usize;
    /// Offset of the IP header's checksum from the start of the header, if it has one.
    const HEADER_CHECKSUM: Option<usize>;
    /// Extra flags of `bpf_l4_csum_replace` when addresses change.
    fn checksum_flags() -> u64;
    /// Decrements the TTL or hop limit, which must be above 1, as a router does.
    fn decrement_ttl(frame: &impl Frame) -> Option<()>;
    /// Updates the IP header's checksum, if it has one, after a change by `difference` (a running
    /// sum).
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
        /// BPF_F_IPV6: an IPv6 header has no checksum that offsets the change of addresses in the
        /// device's sum over the packet (CHECKSUM_COMPLETE), so the kernel must update that sum.
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

/// BPF_F_MARK_MANGLED_0: a UDP checksum of zero means that there is none, and stays zero.
const MARK_MANGLED_0: u64 = 1 << 5;
