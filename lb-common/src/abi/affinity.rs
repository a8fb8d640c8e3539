//! AFFINITY: which backend a client of a service port was sent to last.

use bytemuck::{Pod, Zeroable};

/// A client of a service port. The index of the service port tells the family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct AffinityKey {
    /// Index into SERVICES.
    pub service: u32,
    /// [`BY_ADDRESS`], [`BY_NETNS`] or [`BY_SOCKET`].
    pub kind: u32,
    /// The client's address, network byte order, IPv4 in the first word; or the cookie
    /// of its network namespace or socket, low word first.
    pub client: [u32; 4],
}

/// The client is known by its address (packets).
pub const BY_ADDRESS: u32 = 0;
/// The client is known by the cookie of its network namespace (connect-time hooks).
pub const BY_NETNS: u32 = 1;
/// The client is a datagram socket, known by its cookie (connect-time hooks).
pub const BY_SOCKET: u32 = 2;

/// The backend a client is bound to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Affinity {
    /// Index into BACKENDS4 or BACKENDS6.
    pub backend: u32,
    /// The backend's generation when it was chosen.
    pub generation: u32,
    /// The low 32 bits of jiffies when the client last opened a flow.
    pub last_seen: u32,
}
