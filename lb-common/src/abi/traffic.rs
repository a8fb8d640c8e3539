//! TRAFFIC and DROPS: the packets that each service port translated, and those that it rejected.
//! Per CPU.

use bytemuck::{Pod, Zeroable};

/// An entry of TRAFFIC, which has the same indices as SERVICES.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Traffic {
    /// The number of packets that were translated, in both directions.
    #[cfg(not(feature = "next-layout"))]
    pub packets: u64,
    /// The bytes of these packets, with Ethernet headers.
    pub bytes: u64,
    /// The number of packets that were translated, in both directions.
    #[cfg(feature = "next-layout")]
    pub packets: u64,
}

/// Key of DROPS. The value is the number of packets and calls, 64 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct DropKey {
    /// Index into SERVICES.
    #[cfg(not(feature = "next-layout"))]
    pub service: u32,
    /// The number of a [`Reason`](super::counter::Reason) in
    /// [`REJECTED`](super::counter::Reason::REJECTED).
    pub reason: u32,
    /// Index into SERVICES.
    #[cfg(feature = "next-layout")]
    pub service: u32,
}

/// The one entry of DIRECT_FLOWS: whether there may be flows of [`DIRECT`], for which packets that are
/// no Service's are looked up. There are none if both fields are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct DirectFlows {
    /// When the last one was inserted, in jiffies. Written by the programs.
    pub begun: u64,
    /// The same time once none is left. Written by the agent's sweep.
    pub ended: u64,
}

/// The index that stands for no service port.
pub const NO_SERVICE: u32 = u32::MAX;

/// The index of the flows of clients that talk to a backend itself, and have a source port of their own
/// because a flow of a Service has the answers to theirs.
pub const DIRECT: u32 = u32::MAX - 1;
