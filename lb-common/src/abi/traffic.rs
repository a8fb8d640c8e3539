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

/// The index that stands for no service port.
pub const NO_SERVICE: u32 = u32::MAX;
