//! RANGES4 and RANGES6: who may reach the load balancer's address of a service port.

use super::ip::pod;

/// Key of the longest-prefix-match trie: a prefix of client addresses of one service port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct RangeKey<A> {
    /// How many bits of what follows count, from the first byte on: 32 for the service
    /// port and those of the prefix.
    pub prefix_length: u32,
    /// What is matched.
    pub range: Range<A>,
}

/// What a key of RANGES matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Range<A> {
    /// Index into SERVICES; all of it counts.
    pub service: u32,
    /// The network address of the prefix, network byte order; bits beyond it are zero.
    pub address: A,
}

impl<A> RangeKey<A> {
    /// The prefix of `length` bits from `address` on, for a service port. With the length
    /// of a whole address it is also what a client is looked up by.
    #[inline(always)]
    pub const fn new(service: u32, address: A, length: u32) -> Self {
        Self { prefix_length: u32::BITS + length, range: Range { service, address } }
    }
}

pod! {
    Range<A> { u32, A }
    RangeKey<A> { u32, Range<A> }
}
