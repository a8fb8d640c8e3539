//! SOCKETS and DATAGRAM_PEERS: what a socket asked for before a connect-time hook
//! translated it.

use bytemuck::{Pod, Zeroable};

use super::ip::Be16;

/// How many cgroups can be left to the packet path.
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

/// Value of SOCKETS (socket storage): a connected socket's peer before and after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct ConnectedPeer {
    /// What the socket asked for: what getpeername says.
    pub requested: Peer,
    /// What it was connected to.
    pub actual: Peer,
}

/// Key of DATAGRAM_PEERS: a socket and a peer that datagrams come back from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct DatagramKey {
    /// The socket's cookie (SO_COOKIE), low word first.
    pub cookie: [u32; 2],
    /// The backend.
    pub actual: Peer,
}
