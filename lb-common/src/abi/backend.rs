//! BACKENDS4 and BACKENDS6: the backends of service ports.

use super::ip::{Be16, pod};

/// An endpoint of one service port. Its index is its id. Service ports do not share ids, so that
/// membership in a set is a property of the entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Backend<A> {
    /// Pod (or host) address, network byte order.
    pub address: A,
    /// Target port, network byte order.
    pub port: Be16,
    /// Counts up whenever the id stops meaning what it meant. A flow or an affinity entry with
    /// another generation refers to a backend that is no longer in any EndpointSlice.
    pub generation: u16,
    /// The sets that the backend is in: [`IN_CLUSTER_SET`], [`IN_LOCAL_SET`].
    #[cfg(not(feature = "next-layout"))]
    pub sets: u8,
    /// Any of [`ON_THIS_NODE`], [`THIS_HOST`] and [`NOT_SERVING`]; and, for the tools, [`IN_SLICE`],
    /// [`READY`] and [`TERMINATING`].
    pub flags: u8,
    /// The sets that the backend is in: [`IN_CLUSTER_SET`], [`IN_LOCAL_SET`].
    #[cfg(feature = "next-layout")]
    pub sets: u8,
    /// Always 0.
    pub zero: u16,
    /// Index into SERVICES of the service port that has the id.
    pub service: u32,
    /// The address of the backend's node, to which packets can be encapsulated. Unspecified if the
    /// backend is on this node or its node has no known address.
    pub node: A,
    /// Nothing: a field that other layouts do not have.
    #[cfg(feature = "next-layout")]
    pub spare: u32,
}

/// The backend is in the cluster set of its service port.
pub const IN_CLUSTER_SET: u8 = 1;
/// The backend is in the local set of its service port.
pub const IN_LOCAL_SET: u8 = 2;
/// The backend runs on this node.
pub const ON_THIS_NODE: u8 = 1;
/// The backend is a host-network process: its address is an address of this node.
pub const THIS_HOST: u8 = 2;
/// The endpoint is in an EndpointSlice, serving or not. No program reads this flag, [`READY`] or
/// [`TERMINATING`].
pub const IN_SLICE: u8 = 4;
/// The endpoint is ready.
pub const READY: u8 = 8;
/// The endpoint is terminating.
pub const TERMINATING: u8 = 16;
/// The endpoint is neither ready nor serving: datagrams of its flows count as new.
pub const NOT_SERVING: u8 = 32;

#[cfg(not(feature = "next-layout"))]
pod! {
    Backend<A> { A, Be16, u16, u8, u8, u16, u32, A }
}
#[cfg(feature = "next-layout")]
pod! {
    Backend<A> { A, Be16, u16, u8, u8, u16, u32, A, u32 }
}
