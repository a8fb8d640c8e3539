//! A frame: its linear bytes, stores into it, and redirects of it.

use aya_ebpf::{
    helpers::{
        bpf_redirect, bpf_xdp_adjust_head,
        generated::{bpf_skb_change_head, bpf_skb_pull_data},
    },
    programs::{TcContext, XdpContext},
};
use bytemuck::Pod;
use lb_common::{
    abi::address::Ipv4,
    packet::{IP_OFFSET, Parse, Window, tunnel::Tunnel},
};

/// BPF_F_INGRESS: the device receives a redirected packet instead of sending it.
pub const INGRESS: u64 = 1;
/// The kernel's index of the loopback device, the first one of every network namespace.
pub const LOOPBACK: u32 = 1;

/// The linear part of a frame. Frames of L3 devices (tun, WireGuard, ipip) have no `ETHERNET` header;
/// offsets into them count it all the same.
pub struct Linear<const ETHERNET: bool> {
    /// Address of the first byte.
    pub start: usize,
    /// Address after the last byte.
    pub end: usize,
}

impl<const ETHERNET: bool> Linear<ETHERNET> {
    /// The number of bytes that offsets count and the frame does not have.
    const MISSING: usize = if ETHERNET { 0 } else { IP_OFFSET };

    /// The linear part as it is.
    #[inline(always)]
    pub fn of(frame: &impl Frame) -> Self {
        Self { start: frame.start(), end: frame.end() }
    }
}

impl<const ETHERNET: bool> Window for Linear<ETHERNET> {
    #[inline(always)]
    fn load<T: Pod>(&self, offset: usize) -> Option<T> {
        // The verifier accepts no offset beyond 64 KiB.
        let at = self.start + (offset.wrapping_sub(Self::MISSING) & 0x3fff);
        if at + size_of::<T>() > self.end {
            return None;
        }
        // SAFETY: in bounds, as just checked. The kernel aligns the IP header to four bytes, except
        // on machines where unaligned loads are as fast (NET_IP_ALIGN).
        Some(unsafe { *(at as *const T) })
    }
}

/// The frame's linear part. The headers are pulled into it if they are not there.
#[inline(always)]
pub fn window<F: Parse, const ETHERNET: bool>(context: &TcContext) -> Linear<ETHERNET> {
    let linear = Linear::of(context);
    let length = context.len();
    let usual = F::USUAL_HEADERS - Linear::<ETHERNET>::MISSING;
    // Short frames, like those of most datagrams, are usually linear.
    if linear.start + usual <= linear.end || linear.end - linear.start >= length as usize {
        return linear;
    }
    pull(context)
}

/// The frame's linear part, with [`MOST_HEADERS`] bytes pulled into it.
#[inline(always)]
pub fn pull<const ETHERNET: bool>(context: &TcContext) -> Linear<ETHERNET> {
    let length = context.len();
    let wanted = if length < MOST_HEADERS { length } else { MOST_HEADERS };
    // SAFETY: the context is the kernel's. On failure the frame does not change, and is parsed as
    // far as its linear part goes.
    unsafe { bpf_skb_pull_data(context.skb.skb, wanted) };
    Linear::of(context)
}

const MOST_HEADERS: u32 = 256;

/// Puts an Ethernet header with zero addresses in front of a packet of an L3 device, so that it can
/// be changed and redirected as every other frame. The kernel removes the header again from a packet
/// that an L3 device received and the stack gets, or that is redirected to an L3 device; an L3 device
/// must not be left to send such a packet.
#[inline(always)]
pub fn prepend_ethernet(context: &TcContext) -> Option<()> {
    const ETHERTYPE: usize = IP_OFFSET - size_of::<u16>();
    // SAFETY: the context is the kernel's. Values that were loaded from the packet before are not
    // used afterwards.
    if unsafe { bpf_skb_change_head(context.skb.skb, IP_OFFSET as u32, 0) } != 0 {
        return None;
    }
    // SAFETY: the context is the kernel's.
    let protocol = unsafe { (*context.skb.skb).protocol } as u16;
    store(context, ETHERTYPE, &protocol)
}

/// Sends the packet out of the device that it was about to leave by.
#[inline(always)]
pub fn send_on(context: &TcContext) -> i32 {
    // SAFETY: the context is the kernel's; no other preconditions.
    unsafe { bpf_redirect((*context.skb.skb).ifindex, 0) as i32 }
}

/// A packet that can be changed: a socket buffer (tc) or a frame (XDP).
pub trait Frame {
    /// Address of the first byte of the linear part.
    fn start(&self) -> usize;
    /// Address after the last byte of the linear part.
    fn end(&self) -> usize;
    /// Makes the space between Ethernet header and IP header larger by `difference` bytes, or
    /// smaller. New bytes are uninitialised. Values that were loaded from the packet before are not
    /// valid afterwards.
    fn resize<F: Tunnel>(&self, difference: i32) -> Option<()>;
}

impl Frame for TcContext {
    #[inline(always)]
    fn start(&self) -> usize {
        self.data()
    }

    #[inline(always)]
    fn end(&self) -> usize {
        self.data_end()
    }

    #[inline(always)]
    fn resize<F: Tunnel>(&self, difference: i32) -> Option<()> {
        /// BPF_ADJ_ROOM_MAC.
        const BEHIND_ETHERNET: u32 = 1;
        /// BPF_F_ADJ_ROOM_FIXED_GSO: the segment size of a GSO packet does not change.
        const FIXED_SEGMENTS: u64 = 1;
        /// BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 and _IPV6: GSO segments the inner packet.
        const IN_IPV4: u64 = 2;
        const IN_IPV6: u64 = 4;
        let mut flags = FIXED_SEGMENTS;
        if difference > 0 {
            flags |= if F::PROTOCOL == Ipv4::PROTOCOL { IN_IPV4 } else { IN_IPV6 };
        }
        self.adjust_room(difference, BEHIND_ETHERNET, flags).ok()
    }
}

impl Frame for XdpContext {
    #[inline(always)]
    fn start(&self) -> usize {
        self.data()
    }

    #[inline(always)]
    fn end(&self) -> usize {
        self.data_end()
    }

    #[inline(always)]
    fn resize<F: Tunnel>(&self, difference: i32) -> Option<()> {
        let ethernet: *mut [u16; IP_OFFSET / 2] = place(self, 0)?;
        // SAFETY: in bounds, as `place` checked.
        let ethernet = unsafe { *ethernet };
        // SAFETY: the context is the kernel's.
        if unsafe { bpf_xdp_adjust_head(self.ctx, -difference) } != 0 {
            return None;
        }
        store(self, 0, &ethernet)
    }
}

/// A pointer to the bytes at `offset` as a `T`, if they are in the linear part.
#[inline(always)]
pub fn place<T>(frame: &impl Frame, offset: usize) -> Option<*mut T> {
    let at = frame.start() + (offset & 0x3fff);
    if at + size_of::<T>() > frame.end() {
        return None;
    }
    Some(at as *mut T)
}

/// Stores into the frame.
#[inline(always)]
pub fn store<T: Copy>(frame: &impl Frame, offset: usize, value: &T) -> Option<()> {
    let place = place::<T>(frame, offset)?;
    // SAFETY: in bounds, as `place` checked; unaligned stores are as for loads.
    unsafe { *place = *value };
    Some(())
}

/// Sends the packet back out of the device that received it, with swapped MAC addresses.
#[inline(always)]
pub fn send_back(context: &TcContext) -> Option<i32> {
    let macs: [[u16; 3]; 2] = load_macs(context)?;
    store_macs(context, &[macs[1], macs[0]])?;
    // SAFETY: no preconditions.
    Some(unsafe { bpf_redirect((*context.skb.skb).ifindex, 0) } as i32)
}

/// Redirects the packet to the ingress of a device of this node with this MAC address.
#[inline(always)]
pub fn receive_on(context: &TcContext, ifindex: u32, mac: [u8; 6]) -> Option<i32> {
    let macs = load_macs(context)?;
    store_macs(context, &[bytemuck::cast(mac), macs[1]])?;
    // SAFETY: no preconditions.
    Some(unsafe { bpf_redirect(ifindex, INGRESS) } as i32)
}

#[inline(always)]
fn load_macs(context: &TcContext) -> Option<[[u16; 3]; 2]> {
    Linear::<true>::of(context).load(0)
}

#[inline(always)]
fn store_macs(context: &TcContext, macs: &[[u16; 3]; 2]) -> Option<()> {
    store(context, 0, macs)
}
