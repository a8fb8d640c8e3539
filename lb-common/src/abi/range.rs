//! RANGES4 and RANGES6: the clients that may reach the load balancer's addresses of a service port
//! (`loadBalancerSourceRanges`).

use super::ip::pod;

/// Key of the longest-prefix-match trie: a prefix of client addresses of one service port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct RangeKey<A> {
    /// The number of bits that are compared, from the first byte of `range` on: 32 for the service
    /// port, plus the length of the prefix.
    pub prefix_length: u32,
    /// The bits that are compared.
    pub range: Range<A>,
}

/// What a key of RANGES matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Range<A> {
    /// Index into SERVICES. All of its bits are compared.
    pub service: u32,
    /// The network address of the prefix, network byte order; bits beyond it are zero.
    pub address: A,
}

impl<A> RangeKey<A> {
    /// The prefix `address/length` of a service port. With the length of a whole address it is the
    /// key to look up a client.
    #[inline(always)]
    pub const fn new(service: u32, address: A, length: u32) -> Self {
        Self { prefix_length: u32::BITS + length, range: Range { service, address } }
    }
}

pod! {
    Range<A> { u32, A }
    RangeKey<A> { u32, Range<A> }
}
