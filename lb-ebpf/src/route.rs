//! Routes of translated packets. A packet is redirected to its new destination, past the route that
//! the stack chose for the old one, or past the stack.

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
        flow::{NextHop, Tuple},
        frontend::TCP,
        settings::MAX_DEVICES,
    },
    balance::{Search, Work},
    packet::{IP_OFFSET, Packet, tunnel::Tunnel},
};

use crate::{
    frame::{self, Linear},
    maps, memory,
    scratch::Route,
    tables::{FamilyMaps, flow},
};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// BPF_FIB_LKUP_RET_SUCCESS.
const SUCCESS: i64 = 0;
/// BPF_FIB_LKUP_RET_NO_NEIGH: there is a route, but no neighbour entry yet.
const NO_NEIGHBOUR: i64 = 7;

/// BPF_FIB_LKUP_RET_FRAG_NEEDED: the packet is larger than the route's MTU.
const TOO_BIG: i64 = 8;

/// A family's part of a route look-up.
pub trait RouteLookup: Family {
    /// Fills in addresses and family.
    fn fill(lookup: &mut FibLookup, source: Self::Address, destination: Self::Address);
}

impl RouteLookup for Ipv4 {
    #[inline(always)]
    fn fill(lookup: &mut FibLookup, source: Address4, destination: Address4) {
        lookup.family = AF_INET;
        lookup.__bindgen_anon_3.ipv4_src = source.be32;
        lookup.__bindgen_anon_4.ipv4_dst = destination.be32;
    }
}

impl RouteLookup for Ipv6 {
    #[inline(always)]
    fn fill(lookup: &mut FibLookup, source: Address6, destination: Address6) {
        lookup.family = AF_INET6;
        lookup.__bindgen_anon_3.ipv6_src = source.be32;
        lookup.__bindgen_anon_4.ipv6_dst = destination.be32;
    }
}

/// Looks up the route of a packet of `length` bytes (0 = no check against the MTU) with these
/// addresses, which the device `ifindex` received.
#[inline(always)]
fn look_up<F: RouteLookup>(
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

/// The start of a frame: the MACs of the next hop and of the device.
#[inline(always)]
fn words(next_hop: [u8; 6], device: [u8; 6]) -> [u32; 3] {
    let [a, b, c]: [u16; 3] = bytemuck::cast(next_hop);
    let [d, e, f]: [u16; 3] = bytemuck::cast(device);
    [[a, b], [c, d], [e, f]].map(bytemuck::cast)
}

/// A packet whose route is looked up.
pub trait Received {
    /// The kernel's context.
    fn context(&self) -> *mut core::ffi::c_void;
    /// The kernel's index of the device that the program runs on.
    fn ifindex(&self) -> u32;
    /// The length of the IP packet in bytes; of a GSO packet, that of its largest segment.
    fn ip_length<F: Tunnel>(&self, packet: &Packet<F>) -> Option<u16>;
}

impl Received for TcContext {
    #[inline(always)]
    fn context(&self) -> *mut core::ffi::c_void {
        self.skb.skb.cast()
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the context is the kernel's.
        unsafe { (*self.skb.skb).ifindex }
    }

    #[inline(always)]
    fn ip_length<F: Tunnel>(&self, packet: &Packet<F>) -> Option<u16> {
        // SAFETY: the context is the kernel's.
        let skb = unsafe { &*self.skb.skb };
        if skb.gso_size == 0 {
            return Some((skb.len - IP_OFFSET as u32) as u16);
        }
        const DATA_OFFSET: usize = 12;
        let header = if packet.protocol() == TCP {
            let data_offset: u8 = self.load(packet.transport as usize + DATA_OFFSET).ok()?;
            (data_offset >> 4) as u32 * 4
        } else {
            size_of::<[Be16; 4]>() as u32
        };
        Some((packet.transport as u32 - IP_OFFSET as u32 + header + skb.gso_size) as u16)
    }
}

impl Received for XdpContext {
    #[inline(always)]
    fn context(&self) -> *mut core::ffi::c_void {
        self.ctx.cast()
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the context is the kernel's.
        unsafe { (*self.ctx).ingress_ifindex }
    }

    #[inline(always)]
    fn ip_length<F: Tunnel>(&self, _packet: &Packet<F>) -> Option<u16> {
        F::length(&Linear::<true>::of(self))
    }
}

/// Looks up the route of a packet that will have the addresses of `to` and `added` more bytes. This
/// is done before the packet changes, so that its sender can get an ICMP error.
#[inline(never)]
pub fn find<F: RouteLookup + Tunnel>(
    frame: &impl Received,
    packet: &Packet<F>,
    to: &Tuple<F::Address>,
    added: u32,
    route: &mut Route,
) -> Result<(), Reason> {
    let length = frame.ip_length(packet).ok_or(Reason::RewriteFailed)?.saturating_add(added as u16);
    let mut room = core::mem::MaybeUninit::<FibLookup>::uninit();
    let found = look_up::<F>(frame.context(), frame.ifindex(), to, length, &mut room);
    // SAFETY: filled in above.
    let lookup = unsafe { room.assume_init_ref() };
    route.ifindex = lookup.ifindex;
    route.is_remembered = 0;
    route.has_neighbour = u16::from(found == SUCCESS);
    route.macs = words(lookup.dmac, lookup.smac);
    // SAFETY: the field is a number under either name.
    route.mtu = unsafe { lookup.__bindgen_anon_1.mtu_result };
    match found {
        SUCCESS | NO_NEIGHBOUR => Ok(()),
        TOO_BIG => {
            // Kernels before 5.12 do not return the MTU.
            route.mtu = if route.mtu < length { route.mtu.saturating_sub(added as u16) } else { 0 };
            Err(Reason::TooBig)
        }
        _ => Err(Reason::NoRoute),
    }
}

/// Fills in the route that the packet's flow remembers. Returns false if there is none, if it is no
/// longer valid, or if the packet with `added` more bytes is larger than the device's MTU.
#[inline(always)]
pub fn remembered<F: Tunnel>(
    frame: &impl Received,
    packet: &Packet<F>,
    work: &Work<F::Address>,
    added: u32,
    route: &mut Route,
) -> bool {
    let next_hop = work.out.next_hop;
    if next_hop.epoch() == 0 {
        return false;
    }
    let Some(length) = frame.ip_length(packet) else { return false };
    let Some(device) = maps::DEVICES.get(next_hop.device() as u32 & (MAX_DEVICES - 1)) else {
        return false;
    };
    if device.epoch != next_hop.epoch() as u32 || length as u32 + added > device.mtu {
        return false;
    }
    route.ifindex = device.ifindex;
    route.is_remembered = 1;
    route.macs = words(next_hop.mac(), device.mac);
    route.flags = device.flags;
    true
}

/// Remembers a route in the packet's flow, if the flow is established. A route with a smaller MTU
/// than its device is not remembered: it is looked up for each packet.
#[inline(never)]
fn remember<F: FamilyMaps>(packet: &Packet<F>, work: &mut Work<F::Address>, route: &Route) {
    if packet.is_syn() || route.has_neighbour == 0 {
        return;
    }
    let mut index = 0;
    while index < MAX_DEVICES {
        let Some(device) = maps::DEVICES.get(index) else { return };
        if device.ifindex == route.ifindex {
            if device.mtu == route.mtu as u32 {
                let [mac, _]: [[u8; 6]; 2] = bytemuck::cast(route.macs);
                let next_hop = NextHop::new(mac, index as u8, device.epoch as u8);
                let search = match work.out.action.is_reply() {
                    true => Search::Replies,
                    false => Search::Requests,
                };
                if flow::find::<F>(&packet.key, search, work.known()) {
                    flow::remember::<F>(work.known(), next_hop);
                }
            }
            return;
        }
        index += 1;
    }
}

/// Redirects a translated packet to the device of its route. The kernel finds the neighbour.
#[inline(always)]
pub fn send(route: &Route) -> i32 {
    // SAFETY: no preconditions. Without parameters the kernel finds the neighbour by the
    // packet's own destination.
    unsafe { bpf_redirect_neigh(route.ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Redirects a packet that this node forwards. If its flow remembers the neighbour, the kernel does
/// not look it up; about once a second it does, so that the neighbour entry stays alive. The route
/// is then remembered in the flow if the hook `remembers`.
#[inline(always)]
pub fn forward<F: FamilyMaps>(
    context: &TcContext,
    packet: &Packet<F>,
    work: &mut Work<F::Address>,
    route: &Route,
    remembers: bool,
) -> Option<i32> {
    if route.is_remembered == 0 {
        if remembers {
            remember(packet, work, route);
        }
        return Some(send(route));
    }
    frame::store(context, 0, &route.macs)?;
    // SAFETY: no preconditions.
    Some(unsafe { bpf_redirect(route.ifindex, 0) } as i32)
}
