//! CONNECTED_PEERS, SOCKETS and DATAGRAM_PEERS: the peer that a socket asked for, before a
//! connect-time hook translated it.

use bytemuck::{Pod, Zeroable};

use super::ip::Be16;

/// The number of cgroups that can be excluded from connect-time translation.
pub const MAX_EXCLUDED_CGROUPS: usize = 8;

/// An address and port of either family; IPv4 in the first word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Peer {
    /// The address, network byte order.
    pub address: [u32; 4],
    /// The port, network byte order.
    pub port: Be16,
    /// 4 or 6.
    pub family: u16,
}

/// Value of SOCKETS (socket storage), and part of CONNECTED_PEERS: the peer of a connected socket
/// before and after translation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct ConnectedPeer {
    /// The peer that the socket asked for, which getpeername() returns.
    pub requested: Peer,
    /// The backend that the socket is connected to.
    pub actual: Peer,
}

/// The sockets of a bucket of CONNECTED_PEERS. With their cookies, they fill three cache lines.
pub const CONNECTED_WAYS: usize = 4;
/// The number of buckets of CONNECTED_PEERS, a power of two.
pub const CONNECTED_BUCKETS: u32 = 1 << 14;

/// An element of CONNECTED_PEERS: sockets whose cookies, modulo [`CONNECTED_BUCKETS`], are its index.
/// The kernel numbers sockets one after the other, so sockets that are open at the same time are
/// spread evenly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct ConnectedBucket {
    /// The cookies (SO_COOKIE); 0 = the place is free. They change by compare-and-swap from 0, and by
    /// a write of 0 when the socket is closed.
    pub cookies: [u64; CONNECTED_WAYS],
    /// The peers of these sockets.
    pub peers: [ConnectedPeer; CONNECTED_WAYS],
}

/// Key of DATAGRAM_PEERS: a socket and a backend that sends datagrams to it. The value is the peer
/// that the socket sent to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct DatagramKey {
    /// The socket's cookie (SO_COOKIE), low word first.
    #[cfg(not(feature = "next-layout"))]
    pub cookie: [u32; 2],
    /// The backend.
    pub actual: Peer,
    /// The socket's cookie (SO_COOKIE), low word first.
    #[cfg(feature = "next-layout")]
    pub cookie: [u32; 2],
}
