//! FRAGMENTS4 and FRAGMENTS6: the ports of fragmented datagrams. Only the first fragment carries
//! the ports. The programs store them, and look them up for the later fragments.

use bytemuck::{Pod, Zeroable};

use super::ip::{Be16, pod};

/// What all fragments of a datagram have in common as they arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct FragmentKey<A> {
    /// Source address, network byte order.
    pub source: A,
    /// Destination address, network byte order.
    pub destination: A,
    /// The identification of the datagram in network byte order; 16 bits in IPv4.
    #[cfg(not(feature = "next-layout"))]
    pub identification: u32,
    /// [`TCP`](super::frontend::TCP) or [`UDP`](super::frontend::UDP).
    pub protocol: u32,
    /// The identification of the datagram in network byte order; 16 bits in IPv4.
    #[cfg(feature = "next-layout")]
    pub identification: u32,
}

/// What the first fragment carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Fragment {
    /// Source port, network byte order.
    pub source_port: Be16,
    /// Destination port, network byte order.
    pub destination_port: Be16,
    /// When the first fragment arrived: the low 32 bits of the kernel's jiffies.
    pub last_seen: u32,
}

/// How long later fragments find the ports, in seconds. Receivers wait that long for missing
/// fragments: RFC 8200 section 4.5 says 60, Linux waits 30 for IPv4 (`net.ipv4.ipfrag_time`).
pub const FRAGMENT_SECONDS: u32 = 30;

pod! {
    FragmentKey<A> { A, A, u32, u32 }
}
