//! FRAGMENTS4, FRAGMENTS6: the ports of datagrams that come in pieces. Only the first piece
//! has them; the programs enter it, the others are found by it.

use bytemuck::{Pod, Zeroable};

use super::ip::{Be16, pod};

/// What all pieces of a datagram have in common, as they arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct FragmentKey<A> {
    /// Source address, network byte order.
    pub source: A,
    /// Destination address, network byte order.
    pub destination: A,
    /// The datagram's identification, as it stands in the packet; IPv4's has 16 bits.
    pub identification: u32,
    /// [`TCP`](super::frontend::TCP) or [`UDP`](super::frontend::UDP).
    pub protocol: u32,
}

/// What the first piece told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Fragment {
    /// Source port, network byte order.
    pub source_port: Be16,
    /// Destination port, network byte order.
    pub destination_port: Be16,
    /// The low 32 bits of the kernel's jiffies when the first piece came.
    pub last_seen: u32,
}

/// How long pieces are found after the first one: what receivers wait for them
/// (RFC 8200 section 4.5 says 60, Linux keeps 30 for IPv4).
pub const FRAGMENT_SECONDS: u32 = 30;

pod! {
    FragmentKey<A> { A, A, u32, u32 }
}
