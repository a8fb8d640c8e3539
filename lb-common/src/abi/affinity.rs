//! AFFINITY: the backend that a client of a service port got last.

use bytemuck::{Pod, Zeroable};

/// A client of a service port. The service port has one family, and with it the client's address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct AffinityKey {
    /// Index into SERVICES.
    #[cfg(not(feature = "next-layout"))]
    pub service: u32,
    /// [`BY_ADDRESS`], [`BY_NETNS`] or [`BY_SOCKET`].
    pub kind: u32,
    /// Index into SERVICES.
    #[cfg(feature = "next-layout")]
    pub service: u32,
    /// The client's address in network byte order, IPv4 in the first word; or the cookie of its
    /// network namespace or socket, low word first.
    pub client: [u32; 4],
}

/// The client is identified by its address (packets).
pub const BY_ADDRESS: u32 = 0;
/// The client is identified by the cookie of its network namespace (connect-time hooks).
pub const BY_NETNS: u32 = 1;
/// The client is a datagram socket, identified by its cookie (connect-time hooks).
pub const BY_SOCKET: u32 = 2;

/// The backend that a client is bound to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Affinity {
    /// Index into BACKENDS4 or BACKENDS6.
    pub backend: u32,
    /// The backend's generation when it was chosen.
    pub generation: u32,
    /// When the client last opened a flow: the low 32 bits of the kernel's jiffies.
    pub last_seen: u32,
}
