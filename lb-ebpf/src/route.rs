//! Sending a packet where its new destination is, past the route that the stack chose for
//! the old one, or past the stack.

use aya_ebpf::{
    bindings::bpf_fib_lookup as FibLookup,
    helpers::{
        bpf_redirect,
        generated::{bpf_fib_lookup, bpf_redirect_neigh},
    },
    programs::{TcContext, XdpContext},
};
use lb_common::{
    abi::{
        address::{Address4, Address6, Be16, Family, Ipv4, Ipv6},
        counter::Reason,
        flow::Tuple,
        frontend::TCP,
    },
    packet::{IP_OFFSET, Packet, tunnel::Tunnel},
};

use crate::{hooks::tc::Linear, memory, rewrite};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// BPF_FIB_LKUP_RET_SUCCESS.
const SUCCESS: i64 = 0;
/// BPF_FIB_LKUP_RET_NO_NEIGH: the route is known, the neighbour is not yet.
const NO_NEIGHBOUR: i64 = 7;

/// BPF_FIB_LKUP_RET_FRAG_NEEDED: the packet is larger than the route lets through.
const TOO_BIG: i64 = 8;

/// A family's part of a route look-up.
pub trait Route: Family {
    /// Fills in addresses and family.
    fn fill(lookup: &mut FibLookup, source: Self::Address, destination: Self::Address);
}

impl Route for Ipv4 {
    #[inline(always)]
    fn fill(lookup: &mut FibLookup, source: Address4, destination: Address4) {
        lookup.family = AF_INET;
        lookup.__bindgen_anon_3.ipv4_src = source.be32;
        lookup.__bindgen_anon_4.ipv4_dst = destination.be32;
    }
}

impl Route for Ipv6 {
    #[inline(always)]
    fn fill(lookup: &mut FibLookup, source: Address6, destination: Address6) {
        lookup.family = AF_INET6;
        lookup.__bindgen_anon_3.ipv6_src = source.be32;
        lookup.__bindgen_anon_4.ipv6_dst = destination.be32;
    }
}

/// Asks the kernel's routing tables for the way of a packet of `length` bytes (0 = whatever
/// the device takes) with these addresses, which came in by `ifindex`.
#[inline(always)]
fn look_up<F: Route>(
    context: *mut core::ffi::c_void,
    ifindex: u32,
    tuple: &Tuple<F::Address>,
    length: u16,
    lookup: &mut core::mem::MaybeUninit<FibLookup>,
) -> i64 {
    memory::zero(lookup.as_mut_ptr());
    // SAFETY: plain numbers, for which zero is valid; the context is the kernel's, the
    // parameters are of the size given.
    unsafe {
        let lookup = lookup.assume_init_mut();
        F::fill(lookup, tuple.source, tuple.destination);
        lookup.__bindgen_anon_1.tot_len = length;
        lookup.ifindex = ifindex;
        bpf_fib_lookup(context, &raw mut *lookup, size_of::<FibLookup>() as i32, 0)
    }
}

/// Where a route look-up leads.
#[repr(C)]
pub struct Way {
    /// The kernel's index of the device.
    ifindex: u32,
    /// 1: `macs` are the frame's destination and source; else the neighbour is not known yet.
    has_neighbour: u16,
    /// What the way lets through, if the packet is too big for it.
    pub mtu: u16,
    macs: [[u8; 6]; 2],
}

/// Finds the way of a packet that will have the addresses of `to`, and `added` more bytes. It is done while the
/// packet is still as it came, so that its sender can be told why it does not go on.
#[inline(never)]
pub fn find<F: Route>(
    context: &TcContext,
    packet: &Packet<F>,
    to: &Tuple<F::Address>,
    added: u32,
    way: &mut Way,
) -> Result<(), Reason> {
    let length = longest(context, packet).ok_or(Reason::RewriteFailed)? + added as u16;
    let mut room = core::mem::MaybeUninit::<FibLookup>::uninit();
    // SAFETY: the context is the kernel's.
    let ifindex = unsafe { (*context.skb.skb).ifindex };
    let found = look_up::<F>(context.skb.skb.cast(), ifindex, to, length, &mut room);
    // SAFETY: filled in above.
    let lookup = unsafe { room.assume_init_ref() };
    way.ifindex = lookup.ifindex;
    way.has_neighbour = u16::from(found == SUCCESS);
    way.macs = [lookup.dmac, lookup.smac];
    match found {
        SUCCESS | NO_NEIGHBOUR => Ok(()),
        TOO_BIG => {
            // SAFETY: the field is a number under either name.
            let mtu = unsafe { lookup.__bindgen_anon_1.mtu_result };
            // Kernels before 5.12 do not tell it.
            way.mtu = if mtu < length { mtu.saturating_sub(added as u16) } else { 0 };
            Err(Reason::TooBig)
        }
        _ => Err(Reason::NoRoute),
    }
}

/// The length of the IP packet, or of the largest one of those that it is cut into.
#[inline(always)]
fn longest<F: Family>(context: &TcContext, packet: &Packet<F>) -> Option<u16> {
    // SAFETY: the context is the kernel's.
    let skb = unsafe { &*context.skb.skb };
    if skb.gso_size == 0 {
        return Some((skb.len - IP_OFFSET as u32) as u16);
    }
    const DATA_OFFSET: usize = 12;
    let header = if packet.protocol() == TCP {
        let data_offset: u8 = context.load(packet.transport as usize + DATA_OFFSET).ok()?;
        (data_offset >> 4) as u32 * 4
    } else {
        size_of::<[Be16; 4]>() as u32
    };
    Some((packet.transport as u32 - IP_OFFSET as u32 + header + skb.gso_size) as u16)
}

/// Redirects a packet of this node, already rewritten, to the device and neighbour that its
/// destination is reached by.
#[inline(always)]
pub fn send(way: &Way) -> i32 {
    // SAFETY: no preconditions. Without parameters the kernel finds the neighbour by the
    // packet's own destination.
    unsafe { bpf_redirect_neigh(way.ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

/// The same for a packet that is on its way through this node.
#[inline(always)]
pub fn forward(context: &TcContext, way: &Way) -> Option<i32> {
    if way.has_neighbour == 0 {
        return Some(send(way));
    }
    rewrite::store(context, 0, &way.macs)?;
    // SAFETY: no preconditions.
    Some(unsafe { bpf_redirect(way.ifindex, 0) } as i32)
}

/// Where XDP sends a frame.
pub struct Hop {
    /// The device.
    pub ifindex: u32,
    /// The MAC of the next hop, and the device's.
    pub macs: [[u8; 6]; 2],
}

/// The way of a packet with these addresses, and `added` more bytes, to a neighbour that is
/// known.
#[inline(never)]
pub fn hop<F: Route + Tunnel>(
    context: &XdpContext,
    tuple: &Tuple<F::Address>,
    added: u32,
    hop: &mut Hop,
) -> bool {
    let mut room = core::mem::MaybeUninit::<FibLookup>::uninit();
    // SAFETY: the context is the kernel's.
    let ifindex = unsafe { (*context.ctx).ingress_ifindex };
    let window = Linear { start: context.data(), end: context.data_end() };
    let Some(length) = F::length(&window) else { return false };
    let length = length.saturating_add(added as u16);
    let found = look_up::<F>(context.ctx.cast(), ifindex, tuple, length, &mut room);
    // SAFETY: filled in above.
    let lookup = unsafe { room.assume_init_ref() };
    hop.ifindex = lookup.ifindex;
    hop.macs = [lookup.dmac, lookup.smac];
    found == SUCCESS
}
