//! Sending a node's own packet where its new destination is, past the route that the
//! stack chose for the old one.

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
        address::{Address4, Address6, Family, Ipv4, Ipv6},
        counter::Reason,
        flow::Tuple,
    },
    packet::IP_OFFSET,
};

use crate::{memory, rewrite};

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

/// Redirects the packet, already rewritten, to the device and neighbour that its
/// destination is reached by.
#[inline(never)]
pub fn send<F: Route>(context: &TcContext, tuple: &Tuple<F::Address>) -> Result<i32, Reason> {
    let mut room = core::mem::MaybeUninit::<FibLookup>::uninit();
    // SAFETY: the context is the kernel's.
    let ifindex = unsafe { (*context.skb.skb).ifindex };
    let found = look_up::<F>(context.skb.skb.cast(), ifindex, tuple, 0, &mut room);
    if found != SUCCESS && found != NO_NEIGHBOUR {
        return Err(Reason::NoRoute);
    }
    // SAFETY: filled in above.
    Ok(to_neighbour(unsafe { room.assume_init_ref() }.ifindex))
}

/// Redirects the packet to whom its own destination is reached by at this device.
#[inline(always)]
fn to_neighbour(ifindex: u32) -> i32 {
    // SAFETY: without parameters it takes none from memory.
    unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

/// The same for a packet that is on its way through this node.
#[inline(never)]
pub fn forward<F: Route>(context: &TcContext, tuple: &Tuple<F::Address>) -> Result<i32, Reason> {
    let mut room = core::mem::MaybeUninit::<FibLookup>::uninit();
    // SAFETY: the context is the kernel's.
    let skb = unsafe { &*context.skb.skb };
    // What is cut into segments later is measured by the device.
    let length = if skb.gso_size == 0 { skb.len - IP_OFFSET as u32 } else { 0 };
    let context_pointer = context.skb.skb.cast();
    let found = look_up::<F>(context_pointer, skb.ifindex, tuple, length as u16, &mut room);
    // SAFETY: filled in above.
    let lookup = unsafe { room.assume_init_ref() };
    match found {
        SUCCESS => {
            let macs = [lookup.dmac, lookup.smac];
            rewrite::store(context, 0, &macs).ok_or(Reason::RewriteFailed)?;
            // SAFETY: no preconditions.
            Ok(unsafe { bpf_redirect(lookup.ifindex, 0) } as i32)
        }
        NO_NEIGHBOUR => Ok(to_neighbour(lookup.ifindex)),
        TOO_BIG => Err(Reason::TooBig),
        _ => Err(Reason::NoRoute),
    }
}

/// Where XDP sends a frame.
pub struct Hop {
    /// The device.
    pub ifindex: u32,
    /// The MAC of the next hop, and the device's.
    pub macs: [[u8; 6]; 2],
}

/// The way of a packet with these addresses to a neighbour that is known.
#[inline(never)]
pub fn hop<F: Route>(context: &XdpContext, tuple: &Tuple<F::Address>, hop: &mut Hop) -> bool {
    let mut room = core::mem::MaybeUninit::<FibLookup>::uninit();
    // SAFETY: the context is the kernel's.
    let ifindex = unsafe { (*context.ctx).ingress_ifindex };
    let length = context.data_end() - context.data() - IP_OFFSET;
    let found = look_up::<F>(context.ctx.cast(), ifindex, tuple, length as u16, &mut room);
    // SAFETY: filled in above.
    let lookup = unsafe { room.assume_init_ref() };
    hop.ifindex = lookup.ifindex;
    hop.macs = [lookup.dmac, lookup.smac];
    found == SUCCESS
}
