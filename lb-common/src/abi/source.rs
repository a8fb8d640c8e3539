//! SOURCES4 and SOURCES6: the source address for packets that this node sends to a prefix.

use super::ip::pod;

/// Key of the longest-prefix-match trie: the destination of a route. The value is the source
/// address that the kernel prefers on that route, which is also the one that its masquerade takes
/// (`nf_nat_masquerade_ipv4`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct SourceKey<A> {
    /// The length of the prefix in bits. With the length of a whole address, the key looks up a
    /// destination.
    pub prefix_length: u32,
    /// The network address of the prefix, network byte order; bits beyond it are zero.
    pub address: A,
}

pod! {
    SourceKey<A> { u32, A }
}
