//! The parameters that `lb-bench` writes for the wrapper programs; both include this file.

use bytemuck::{Pod, Zeroable};

/// The one entry of LANE: what the wrapper does before each run of its target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Lane {
    /// The Ethernet header, in the order of the frame; two bytes of the last word count.
    pub ethernet: [u32; 4],
    /// What follows it: 10 words with IPv4, all with IPv6.
    pub words: [u32; MAX_WORDS],
    /// Length of the frame, bytes.
    pub length: u32,
    /// Index into TARGETS, or XDP_TARGETS.
    pub target: u32,
    /// Number of flows - 1, all ones below the highest.
    pub mask: u32,
    /// The first flow: the flow of run `n` is `(first + n) & mask`.
    pub first: u32,
    /// 1: that is the index into NUMBERS, which has the flow.
    pub is_numbered: u32,
}

/// How many entries NUMBERS has.
pub const MAX_NUMBERS: usize = 1 << 20;

/// Words of an IPv6 header and a TCP header.
pub const MAX_WORDS: usize = 15;

/// How many entries TARGETS has.
pub const MAX_TARGETS: usize = 64;

/// What the client's address is combined with (exclusive or) for a flow.
#[inline(always)]
pub const fn address_bits(flow: u32) -> u32 {
    (flow >> 16).to_be()
}

/// What the client's port, in network byte order, is combined with for a flow.
#[inline(always)]
pub const fn port_bits(flow: u32) -> u16 {
    (flow as u16).to_be()
}
