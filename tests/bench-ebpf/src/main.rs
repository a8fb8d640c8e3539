//! The programs that measure lb's programs: wrappers, which restore a packet and then tail-call
//! a target, and targets that perform a single step.
//!
//! A wrapper returns by itself only if something is wrong. Then the counted verdicts do not add
//! up, and the measurement is void.
#![no_std]
#![no_main]
// Compare-and-swap has no intrinsic on this target.
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod abi;
/// The table of flows of lb's programs, over the maps of this object.
#[path = "../../../lb-ebpf/src/tables/flows.rs"]
#[expect(dead_code, unexpected_cfgs, reason = "it is lb's, which has more uses for it")]
mod flows;
mod maps;
mod steps;
mod wrap;

use aya_ebpf::{
    bindings::{
        BPF_ANY, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, TC_ACT_SHOT,
        TC_ACT_UNSPEC, xdp_action,
    },
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns, generated::bpf_jiffies64},
    macros::{cgroup_sock, cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, SockContext, TcContext, XdpContext},
};
use lb_common::{
    abi::{
        address::{Ipv4, Ipv6},
        flow::Flow,
    },
    packet::IP_OFFSET,
};

use crate::{
    maps::{HASH4, LRU4, LRU6, RUNS, SMALL_LRU4, SMALL_LRU6},
    steps::{enroll, is_known, is_routed, keep, make_room, make_room_xdp, open, read, with_key},
    wrap::wrap,
};

const ANY: u64 = BPF_ANY as u64;
const CHECKSUM_OF_TCP4: usize = IP_OFFSET + 20 + 16;
const IP_HEADER4: i32 = 20;
const IP_HEADER6: i32 = 40;
const WORDS4: usize = 10;
const WORDS6: usize = abi::MAX_WORDS;

/// The source of an IPv4 packet is rotated.
#[classifier]
pub fn request4(context: TcContext) -> i32 {
    wrap::<_, WORDS4, 3, 5, true>(&context);
    TC_ACT_SHOT
}

/// The destination of an IPv4 packet is rotated.
#[classifier]
pub fn reply4(context: TcContext) -> i32 {
    wrap::<_, WORDS4, 4, 5, false>(&context);
    TC_ACT_SHOT
}

/// The source of an IPv6 packet is rotated.
#[classifier]
pub fn request6(context: TcContext) -> i32 {
    wrap::<_, WORDS6, 5, 10, true>(&context);
    TC_ACT_SHOT
}

/// The destination of an IPv6 packet is rotated.
#[classifier]
pub fn reply6(context: TcContext) -> i32 {
    wrap::<_, WORDS6, 9, 10, false>(&context);
    TC_ACT_SHOT
}

/// As `request4`, at XDP.
#[xdp]
pub fn xdp_request4(context: XdpContext) -> u32 {
    wrap::<_, WORDS4, 3, 5, true>(&context);
    xdp_action::XDP_ABORTED
}

/// As `reply4`, at XDP.
#[xdp]
pub fn xdp_reply4(context: XdpContext) -> u32 {
    wrap::<_, WORDS4, 4, 5, false>(&context);
    xdp_action::XDP_ABORTED
}

/// As `request6`, at XDP.
#[xdp]
pub fn xdp_request6(context: XdpContext) -> u32 {
    wrap::<_, WORDS6, 5, 10, true>(&context);
    xdp_action::XDP_ABORTED
}

/// As `reply6`, at XDP.
#[xdp]
pub fn xdp_reply6(context: XdpContext) -> u32 {
    wrap::<_, WORDS6, 9, 10, false>(&context);
    xdp_action::XDP_ABORTED
}

/// The cost of this program is subtracted from that of every tc program.
#[classifier]
pub fn empty(_context: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// Room for the outer header of an IPv4 packet. The wrapper takes it back.
#[xdp]
pub fn xdp_room4(context: XdpContext) -> u32 {
    make_room_xdp(&context, IP_HEADER4)
}

/// The same for IPv6.
#[xdp]
pub fn xdp_room6(context: XdpContext) -> u32 {
    make_room_xdp(&context, IP_HEADER6)
}

/// The cost of this program is subtracted from that of every XDP program.
#[xdp]
pub fn xdp_empty(_context: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// Reads the flow of an IPv4 packet, as every step below does that needs a key.
#[classifier]
pub fn key4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |_| true)
}

/// Reads the flow of an IPv6 packet.
#[classifier]
pub fn key6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |_| true)
}

/// A look-up in an array.
#[classifier]
pub fn array(_context: TcContext) -> i32 {
    let Some(runs) = RUNS.get_ptr(0) else { return TC_ACT_SHOT };
    // SAFETY: this CPU's entry.
    keep(&unsafe { *runs });
    TC_ACT_UNSPEC
}

/// A hit in a hash.
#[classifier]
pub fn hash4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| HASH4.get_ptr(key).is_some())
}

/// A hit in an LRU.
#[classifier]
pub fn hit4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| LRU4.get_ptr(key).is_some())
}

/// A hit in an LRU.
#[classifier]
pub fn hit6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |key| LRU6.get_ptr(key).is_some())
}

/// A hit in an LRU, and a load of what was found.
#[classifier]
pub fn read4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| read(LRU4.get_ptr(key)))
}

/// A hit in an LRU, and a load of what was found.
#[classifier]
pub fn read6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |key| read(LRU6.get_ptr(key)))
}

/// A miss in an LRU.
#[classifier]
pub fn miss4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| LRU4.get_ptr(key).is_none())
}

/// A miss in an LRU.
#[classifier]
pub fn miss6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |key| LRU6.get_ptr(key).is_none())
}

/// An insertion into an LRU, which is full once this has run for a while.
#[classifier]
pub fn insert4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| LRU4.insert(key, &Flow::default(), ANY).is_ok())
}

/// An insertion into an LRU, which is full once this has run for a while.
#[classifier]
pub fn insert6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |key| LRU6.insert(key, &Flow::default(), ANY).is_ok())
}

/// An insertion into a small LRU that is full.
#[classifier]
pub fn insert_small4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| SMALL_LRU4.insert(key, &Flow::default(), ANY).is_ok())
}

/// An insertion into a small LRU that is full.
#[classifier]
pub fn insert_small6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |key| SMALL_LRU6.insert(key, &Flow::default(), ANY).is_ok())
}

/// The least that a new flow takes: a miss, and both directions into a large LRU.
#[classifier]
pub fn open4(context: TcContext) -> i32 {
    open::<Ipv4>(
        &context,
        |key| LRU4.get_ptr(key).is_none(),
        |key| LRU4.insert(key, &Flow::default(), ANY).is_ok(),
    )
}

/// The same of IPv6.
#[classifier]
pub fn open6(context: TcContext) -> i32 {
    open::<Ipv6>(
        &context,
        |key| LRU6.get_ptr(key).is_none(),
        |key| LRU6.insert(key, &Flow::default(), ANY).is_ok(),
    )
}

/// The least that a new TCP flow takes: both directions go into a small LRU.
#[classifier]
pub fn open_small4(context: TcContext) -> i32 {
    open::<Ipv4>(
        &context,
        |key| LRU4.get_ptr(key).is_none(),
        |key| SMALL_LRU4.insert(key, &Flow::default(), ANY).is_ok(),
    )
}

/// The same of IPv6.
#[classifier]
pub fn open_small6(context: TcContext) -> i32 {
    open::<Ipv6>(
        &context,
        |key| LRU6.get_ptr(key).is_none(),
        |key| SMALL_LRU6.insert(key, &Flow::default(), ANY).is_ok(),
    )
}

/// The least that a new flow in one direction takes: a miss, and an insertion.
#[classifier]
pub fn enter4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| {
        LRU4.get_ptr(key).is_none() && LRU4.insert(key, &Flow::default(), ANY).is_ok()
    })
}

/// The same of IPv6.
#[classifier]
pub fn enter6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |key| {
        LRU6.get_ptr(key).is_none() && LRU6.insert(key, &Flow::default(), ANY).is_ok()
    })
}

/// The same into a small LRU, as for a new TCP flow.
#[classifier]
pub fn enter_small4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| {
        LRU4.get_ptr(key).is_none() && SMALL_LRU4.insert(key, &Flow::default(), ANY).is_ok()
    })
}

/// The same of IPv6.
#[classifier]
pub fn enter_small6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |key| {
        LRU6.get_ptr(key).is_none() && SMALL_LRU6.insert(key, &Flow::default(), ANY).is_ok()
    })
}

/// A hit in lb's table of flows, which copies the flow.
#[classifier]
pub fn table_hit4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, is_known::<Ipv4>)
}

/// The same of IPv6.
#[classifier]
pub fn table_hit6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, is_known::<Ipv6>)
}

/// A miss in lb's table of flows.
#[classifier]
pub fn table_miss4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| !is_known::<Ipv4>(key))
}

/// The same of IPv6.
#[classifier]
pub fn table_miss6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |key| !is_known::<Ipv6>(key))
}

/// The insertion of a new flow, with both directions, into lb's table, which is full once this has
/// run for a while.
#[classifier]
pub fn table_insert4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, enroll::<Ipv4>)
}

/// The same of IPv6.
#[classifier]
pub fn table_insert6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, enroll::<Ipv6>)
}

/// A miss and that insertion.
#[classifier]
pub fn table_open4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| !is_known::<Ipv4>(key) && enroll::<Ipv4>(key))
}

/// The same of IPv6.
#[classifier]
pub fn table_open6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |key| !is_known::<Ipv6>(key) && enroll::<Ipv6>(key))
}

/// A clock of nanoseconds.
#[classifier]
pub fn ktime(_context: TcContext) -> i32 {
    // SAFETY: no preconditions.
    keep(&unsafe { bpf_ktime_get_ns() });
    TC_ACT_UNSPEC
}

/// The clock of ticks.
#[classifier]
pub fn jiffies(_context: TcContext) -> i32 {
    // SAFETY: no preconditions.
    keep(&unsafe { bpf_jiffies64() });
    TC_ACT_UNSPEC
}

/// A random number.
#[classifier]
pub fn random(_context: TcContext) -> i32 {
    // SAFETY: no preconditions.
    keep(&unsafe { bpf_get_prandom_u32() });
    TC_ACT_UNSPEC
}

/// A change of a TCP checksum.
#[classifier]
pub fn checksum(context: TcContext) -> i32 {
    match context.l4_csum_replace(CHECKSUM_OF_TCP4, 0, 0x1234_5678, 0) {
        Ok(()) => TC_ACT_UNSPEC,
        Err(_) => TC_ACT_SHOT,
    }
}

/// A route look-up that finds a neighbour, for an IPv4 packet.
#[classifier]
pub fn fib4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| is_routed::<Ipv4>(&context, key))
}

/// The same of IPv6.
#[classifier]
pub fn fib6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |key| is_routed::<Ipv6>(&context, key))
}

/// Room for the outer header of an IPv4 packet.
#[classifier]
pub fn room4(context: TcContext) -> i32 {
    make_room(&context, IP_HEADER4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 as u64)
}

/// The same for IPv6.
#[classifier]
pub fn room6(context: TcContext) -> i32 {
    make_room(&context, IP_HEADER6, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 as u64)
}

/// connect(): the kernel's cost before and after any program.
#[cgroup_sock_addr(connect4)]
pub fn empty_connect4(_context: SockAddrContext) -> i32 {
    1
}

/// The same of an IPv6 socket.
#[cgroup_sock_addr(connect6)]
pub fn empty_connect6(_context: SockAddrContext) -> i32 {
    1
}

/// close(): the kernel's cost before and after any program.
#[cgroup_sock(sock_release)]
pub fn empty_release(_context: SockContext) -> i32 {
    1
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // SAFETY: the verifier refuses any program in which this can be reached.
    unsafe { core::hint::unreachable_unchecked() }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
