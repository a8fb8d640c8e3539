//! The eBPF programs of lb: entry points only.
//!
//! Each program parses a packet or call, asks [`lb_common::balance`] for the verdict and applies
//! it. Every exit counts exactly one reason. There are no tail calls. Bodies are inlined into the
//! functions that the macros generate, because each call costs a packet some nanoseconds.
#![no_std]
#![no_main]
// Compare-and-swap has no intrinsic on this target.
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod answer;
mod count;
mod fragment;
mod frame;
mod hooks;
mod icmp_error;
mod maps;
mod memory;
mod rewrite;
mod route;
mod scratch;
mod tables;
mod tunnel;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, SockContext, TcContext, XdpContext},
};
use hooks::{sock, tc, xdp};
use lb_common::abi::counter::Hook;

/// tc ingress on the host side of a pod's interface: packets from the pod.
#[classifier]
#[inline(always)]
pub fn from_pod(context: TcContext) -> i32 {
    tc::handle::<{ Hook::FromPod as u32 }, true>(&context)
}

/// tc egress on the host side of a pod's interface: packets to the pod.
#[classifier]
#[inline(always)]
pub fn to_pod(context: TcContext) -> i32 {
    tc::handle::<{ Hook::ToPod as u32 }, true>(&context)
}

/// tc ingress of an external device.
#[classifier]
#[inline(always)]
pub fn from_device(context: TcContext) -> i32 {
    tc::handle::<{ Hook::FromDevice as u32 }, true>(&context)
}

/// tc ingress of an external device whose packets have no Ethernet header.
#[classifier]
#[inline(always)]
pub fn from_l3(context: TcContext) -> i32 {
    tc::handle::<{ Hook::FromDevice as u32 }, false>(&context)
}

/// tc egress of an external device whose packets have no Ethernet header.
#[classifier]
#[inline(always)]
pub fn to_l3(context: TcContext) -> i32 {
    tc::handle::<{ Hook::ToDevice as u32 }, false>(&context)
}

/// XDP of an external device, before tc ingress.
#[xdp]
#[inline(always)]
pub fn xdp_device(context: XdpContext) -> u32 {
    xdp::handle(&context)
}

/// tc egress of an external device.
#[classifier]
#[inline(always)]
pub fn to_device(context: TcContext) -> i32 {
    tc::handle::<{ Hook::ToDevice as u32 }, true>(&context)
}

/// tc egress of the loopback device.
#[classifier]
#[inline(always)]
pub fn loopback(context: TcContext) -> i32 {
    tc::handle::<{ Hook::Loopback as u32 }, true>(&context)
}

/// Returns the low 32 bits of the kernel's jiffies. It is never attached: the agent runs it to read
/// the clock that flow entries use.
#[classifier]
#[inline(always)]
pub fn clock(_context: TcContext) -> i32 {
    tables::jiffies() as i32
}

/// connect() of an IPv4 socket.
#[cgroup_sock_addr(connect4)]
#[inline(always)]
pub fn connect4(context: SockAddrContext) -> i32 {
    sock::connect4(&context)
}

/// connect() of an IPv6 socket.
#[cgroup_sock_addr(connect6)]
#[inline(always)]
pub fn connect6(context: SockAddrContext) -> i32 {
    sock::connect6(&context)
}

/// sendmsg() with an IPv4 address on an unconnected datagram socket.
#[cgroup_sock_addr(sendmsg4)]
#[inline(always)]
pub fn sendmsg4(context: SockAddrContext) -> i32 {
    sock::sendmsg4(&context)
}

/// sendmsg() with an IPv6 address on an unconnected datagram socket.
#[cgroup_sock_addr(sendmsg6)]
#[inline(always)]
pub fn sendmsg6(context: SockAddrContext) -> i32 {
    sock::sendmsg6(&context)
}

/// recvmsg() that returns an IPv4 sender.
#[cgroup_sock_addr(recvmsg4)]
#[inline(always)]
pub fn recvmsg4(context: SockAddrContext) -> i32 {
    sock::recvmsg4(&context)
}

/// recvmsg() that returns an IPv6 sender.
#[cgroup_sock_addr(recvmsg6)]
#[inline(always)]
pub fn recvmsg6(context: SockAddrContext) -> i32 {
    sock::recvmsg6(&context)
}

/// getpeername() of an IPv4 socket.
#[cgroup_sock_addr(getpeername4)]
#[inline(always)]
pub fn getpeername4(context: SockAddrContext) -> i32 {
    sock::getpeername4(&context)
}

/// getpeername() of an IPv6 socket.
#[cgroup_sock_addr(getpeername6)]
#[inline(always)]
pub fn getpeername6(context: SockAddrContext) -> i32 {
    sock::getpeername6(&context)
}

/// close() of a socket of either family, the last of its descriptors. It is the one program that counts
/// nothing, because it decides nothing.
#[cgroup_sock(sock_release)]
#[inline(always)]
pub fn release(context: SockContext) -> i32 {
    sock::release(&context)
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // SAFETY: the verifier refuses any program in which this can be reached.
    unsafe { core::hint::unreachable_unchecked() }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
