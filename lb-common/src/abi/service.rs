//! SERVICES, SLOTS and NAMES: service ports, with one entry for each of their families.

use bytemuck::{Pod, Zeroable};

/// A range of SLOTS in one word, so that one aligned 8-byte store replaces it and no packet sees
/// half of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct SlotRange {
    /// Low 32 bits: first slot; high 32 bits: number of slots.
    pub start_and_length: u64,
}

impl SlotRange {
    /// No slots.
    pub const EMPTY: Self = Self { start_and_length: 0 };

    /// The `length` slots from `start` on.
    #[inline(always)]
    pub const fn new(start: u32, length: u32) -> Self {
        Self { start_and_length: start as u64 | (length as u64) << 32 }
    }

    /// The first slot.
    #[inline(always)]
    pub const fn start(self) -> u32 {
        self.start_and_length as u32
    }

    /// The number of slots.
    #[inline(always)]
    pub const fn length(self) -> u32 {
        (self.start_and_length >> 32) as u32
    }
}

/// A service port in one family, or (see [`Service::ADDRESS`]) a ClusterIP as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Service {
    /// The slots of the cluster set: every backend in the cluster that serves.
    #[cfg(not(feature = "next-layout"))]
    pub cluster: SlotRange,
    /// The slots of the local set: every backend on this node that serves.
    pub local: SlotRange,
    /// The slots of the cluster set: every backend in the cluster that serves.
    #[cfg(feature = "next-layout")]
    pub cluster: SlotRange,
    /// Timeout of session affinity in seconds since the client's last new flow; 0 = no affinity.
    pub affinity_seconds: u32,
    /// A set of [`Service::INTERNAL_LOCAL`], [`Service::ADDRESS`],
    /// [`Service::EXTERNAL_LOCAL`], [`Service::DSR`].
    pub flags: u32,
}

impl Service {
    /// `internalTrafficPolicy: Local`: clients inside the cluster get the local set.
    pub const INTERNAL_LOCAL: u32 = 1;
    /// The entry is a ClusterIP as a whole. The length of `cluster` is then 1 if any port of the
    /// Service has a backend, else 0; it points to no slot.
    pub const ADDRESS: u32 = 2;
    /// `externalTrafficPolicy: Local`: clients outside the cluster get the local set.
    pub const EXTERNAL_LOCAL: u32 = 4;
    /// Direct server return: packets of clients outside the cluster are encapsulated, untranslated,
    /// for the backend's node, which answers the client itself.
    pub const DSR: u32 = 8;
}

/// A slot: refers to a backend of the same family as the service port that has the slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Slot {
    /// Index into BACKENDS4 or BACKENDS6.
    pub backend: u32,
}

/// The name of the service port at the same index of SERVICES. No program reads it: it says to the
/// tools, and to the next agent, what an index means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Name {
    /// `namespace/service:port`, UTF-8; without `:port` for an unnamed port.
    pub text: [u8; Name::CAPACITY],
    /// The number of bytes in `text`; 0 = the index is free.
    #[cfg(not(feature = "next-layout"))]
    pub length: u8,
    /// 4 or 6.
    pub family: u8,
    /// The number of bytes in `text`; 0 = the index is free.
    #[cfg(feature = "next-layout")]
    pub length: u8,
    /// Protocol number; 0 for a ClusterIP as a whole.
    pub protocol: u8,
    /// Always 0.
    pub zero: u8,
}

impl Name {
    /// The length of the longest name in bytes: namespace, service and port name have at most 63
    /// bytes each (DNS labels), with a separator after the first two and a byte of padding.
    pub const CAPACITY: usize = 63 + 1 + 63 + 1 + 63 + 1;
}

const _: () = assert!(size_of::<Service>() == 24 && size_of::<Name>() == 196);
