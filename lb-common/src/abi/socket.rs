//! SOCKETS and DATAGRAM_PEERS: the peer that a socket asked for, before a connect-time hook
//! translated it.

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

/// Value of SOCKETS (socket storage): the peer of a connected socket before and after translation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct ConnectedPeer {
    /// The peer that the socket asked for, which getpeername() returns.
    pub requested: Peer,
    /// The backend that the socket is connected to.
    pub actual: Peer,
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
