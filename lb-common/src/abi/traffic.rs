//! TRAFFIC and DROPS: what each service port has carried, and what it turned away. Per CPU.

use bytemuck::{Pod, Zeroable};

/// An entry of TRAFFIC, whose index is that of SERVICES.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Traffic {
    /// Packets that were translated, of both directions.
    pub packets: u64,
    /// Their bytes, with Ethernet header.
    pub bytes: u64,
}

/// Key of DROPS; the value counts, in 64 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct DropKey {
    /// Index into SERVICES.
    pub service: u32,
    /// The number of a [`Reason`](super::counter::Reason) that turns away.
    pub reason: u32,
}

/// The index of no service port.
pub const NO_SERVICE: u32 = u32::MAX;
