//! SERVICES, SLOTS and NAMES: one entry per (service port, family).

use bytemuck::{Pod, Zeroable};

/// A range of SLOTS in one word, so that it is replaced by one aligned 8-byte
/// store: no packet sees half of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct SlotRange {
    /// Low 32 bits: first slot; high 32 bits: number of slots.
    pub start_and_length: u64,
}

impl SlotRange {
    /// No slot at all.
    pub const EMPTY: Self = Self { start_and_length: 0 };

    /// `length` slots from `start` on.
    #[inline(always)]
    pub const fn new(start: u32, length: u32) -> Self {
        Self { start_and_length: start as u64 | (length as u64) << 32 }
    }

    /// The first slot.
    #[inline(always)]
    pub const fn start(self) -> u32 {
        self.start_and_length as u32
    }

    /// How many slots.
    #[inline(always)]
    pub const fn length(self) -> u32 {
        (self.start_and_length >> 32) as u32
    }
}

/// A service port in one family, or (see [`Service::ADDRESS`]) a ClusterIP as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Service {
    /// Slots of the cluster set: every backend that serves, cluster wide.
    pub cluster: SlotRange,
    /// Slots of the local set: the backends of this node that serve.
    pub local: SlotRange,
    /// Session affinity by client for so many seconds after its last new flow; 0 = none.
    pub affinity_seconds: u32,
    /// A set of [`Service::INTERNAL_LOCAL`], [`Service::ADDRESS`],
    /// [`Service::EXTERNAL_LOCAL`], [`Service::DSR`].
    pub flags: u32,
}

impl Service {
    /// `internalTrafficPolicy: Local`: clients inside the cluster get the local set.
    pub const INTERNAL_LOCAL: u32 = 1;
    /// The entry of a ClusterIP as a whole. The length of `cluster` is then 1 if any
    /// port of the Service has a backend, else 0; it points to no slot.
    pub const ADDRESS: u32 = 2;
    /// `externalTrafficPolicy: Local`: clients outside the cluster get the local set.
    pub const EXTERNAL_LOCAL: u32 = 4;
    /// Packets of clients outside are tunnelled, as they came, to a backend's node, and that
    /// answers the client itself (direct server return).
    pub const DSR: u32 = 8;
}

/// A slot: the index of a backend in BACKENDS4 or BACKENDS6, by the family of the
/// service that the slot belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Slot {
    /// Index into BACKENDS4 or BACKENDS6.
    pub backend: u32,
}

/// The name of the service port at the same index of SERVICES. Nothing in the
/// datapath reads it: it lets the tools, and the next agent, tell what an index means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Name {
    /// `namespace/service:port`, UTF-8; without `:port` for an unnamed port.
    pub text: [u8; Name::CAPACITY],
    /// How many bytes of `text` are meant; 0 = the index is free.
    pub length: u8,
    /// 4 or 6.
    pub family: u8,
    /// Protocol number; 0 for a ClusterIP as a whole.
    pub protocol: u8,
    /// Always 0.
    pub zero: u8,
}

impl Name {
    /// The longest name: namespace and service are DNS labels of at most 63 bytes,
    /// a port name has at most 63, and two separators.
    pub const CAPACITY: usize = 63 + 1 + 63 + 1 + 63 + 1;
}

const _: () = assert!(size_of::<Service>() == 24 && size_of::<Name>() == 196);
