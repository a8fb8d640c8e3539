//! A frame: its bytes in one piece, stores into it, and the devices that it is sent to.

use aya_ebpf::{
    helpers::{bpf_redirect, bpf_xdp_adjust_head, generated::bpf_skb_pull_data},
    programs::{TcContext, XdpContext},
};
use bytemuck::Pod;
use lb_common::{
    abi::address::Ipv4,
    packet::{IP_OFFSET, Parse, Window, tunnel::Tunnel},
};

/// BPF_F_INGRESS: a redirected packet arrives at the device instead of leaving by it.
pub const INGRESS: u64 = 1;
/// The kernel's index of the loopback device: the first of every namespace.
pub const LOOPBACK: u32 = 1;

/// The bytes of a frame that lie in one piece.
pub struct Linear {
    /// The first byte.
    pub start: usize,
    /// Behind the last one.
    pub end: usize,
}

impl Window for Linear {
    #[inline(always)]
    fn load<T: Pod>(&self, offset: usize) -> Option<T> {
        // The verifier follows no offset beyond 64 KiB.
        let at = self.start + (offset & 0x3fff);
        if at + size_of::<T>() > self.end {
            return None;
        }
        // SAFETY: in bounds, as just checked. The kernel lays the IP header on a four
        // byte boundary, or runs where unaligned loads are as good.
        Some(unsafe { *(at as *const T) })
    }
}

/// The frame's headers, pull into one piece if they were not.
#[inline(always)]
pub fn window<F: Parse>(context: &TcContext) -> Linear {
    let linear = Linear { start: context.data(), end: context.data_end() };
    let length = context.len();
    // Short frames, such as those of most datagrams, are in one piece as a rule.
    if linear.start + F::USUAL_HEADERS <= linear.end || linear.end - linear.start >= length as usize
    {
        return linear;
    }
    pull(context)
}

/// The frame, with as many bytes as all headers take in one piece.
#[inline(always)]
pub fn pull(context: &TcContext) -> Linear {
    let length = context.len();
    let wanted = if length < MOST_HEADERS { length } else { MOST_HEADERS };
    // SAFETY: the context is the kernel's. On failure the frame stays as it is and is
    // read as far as it goes.
    unsafe { bpf_skb_pull_data(context.skb.skb, wanted) };
    Linear { start: context.data(), end: context.data_end() }
}

const MOST_HEADERS: u32 = 256;

/// A packet that can be changed: a socket buffer of tc, or the bare frame of XDP.
pub trait Frame {
    /// Where its first piece starts.
    fn start(&self) -> usize;
    /// Where its first piece ends.
    fn end(&self) -> usize;
    /// Makes the space between Ethernet header and IP header larger by so many bytes, or
    /// smaller. What new bytes hold is not said. Nothing read before holds afterwards.
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
        /// BPF_F_ADJ_ROOM_FIXED_GSO: segments that are to be cut stay as long as they are.
        const FIXED_SEGMENTS: u64 = 1;
        /// BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 and _IPV6: what is cut later is cut inside.
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

/// The bytes at `offset` as a `T` that can be written to, if they lie in the frame's
/// first piece.
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

/// Sends the packet back out of the device it came in by.
#[inline(always)]
pub fn send_back(context: &TcContext) -> Option<i32> {
    let macs: [[u16; 3]; 2] = load_macs(context)?;
    store_macs(context, &[macs[1], macs[0]])?;
    // SAFETY: no preconditions.
    Some(unsafe { bpf_redirect((*context.skb.skb).ifindex, 0) } as i32)
}

/// Lets the packet arrive at a device of this node.
#[inline(always)]
pub fn receive_on(context: &TcContext, ifindex: u32, mac: [u8; 6]) -> Option<i32> {
    let macs = load_macs(context)?;
    store_macs(context, &[bytemuck::cast(mac), macs[1]])?;
    // SAFETY: no preconditions.
    Some(unsafe { bpf_redirect(ifindex, INGRESS) } as i32)
}

#[inline(always)]
fn load_macs(context: &TcContext) -> Option<[[u16; 3]; 2]> {
    Linear { start: context.data(), end: context.data_end() }.load(0)
}

#[inline(always)]
fn store_macs(context: &TcContext, macs: &[[u16; 3]; 2]) -> Option<()> {
    store(context, 0, macs)
}
