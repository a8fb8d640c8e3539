//! The layouts as data: the fields of every pinned map's keys and values, by name.
//!
//! An agent writes them into the kernel beside its maps, so that a release with other layouts can
//! convert the entries. Invariant: a description names every byte of its type.

use super::{
    address::{Address, Address4, Address6, Be16, Prefix},
    affinity::{Affinity, AffinityKey},
    backend::Backend,
    flow::{Action, Flow, FlowKey, NextHop, Tuple},
    flow_table::{Bucket, FlowBucket, FlowEntry, FlowFilter, FlowSeed},
    fragment::{Fragment, FragmentKey},
    frontend::{Frontend, FrontendKey, FrontendKind},
    range::{Range, RangeKey},
    service::{Name, Service, Slot, SlotRange},
    settings::{
        Device, FamilySettings, FormerLifetimes, FormerSettings, FormerSettingsPair, Lifetimes,
        PortRange, Settings, SettingsPair,
    },
    socket::{ConnectedBucket, ConnectedPeer, DatagramKey, Peer},
    source::SourceKey,
    traffic::{DirectFlows, DropKey, Traffic},
};

/// A type whose fields are described.
pub trait Described: Sized {
    /// The description.
    const TYPE: &'static Type;
    /// Its fields, if it has any.
    const FIELDS: &'static [Field] = &[];
}

/// The description of a type.
#[derive(Debug)]
pub struct Type {
    /// In bytes.
    pub size: usize,
    /// What the bytes are.
    pub kind: Kind,
}

/// What the bytes of a type are.
#[derive(Debug)]
pub enum Kind {
    /// A number in the byte order of the host, which may get another size.
    Number,
    /// Bytes that belong together, such as a number in network byte order.
    Bytes,
    /// Elements of one type, one after another.
    Array(&'static Type),
    /// Fields.
    Struct(&'static [Field]),
}

/// A field of a type.
#[derive(Debug)]
pub struct Field {
    /// Its name, by which another release finds it.
    pub name: &'static str,
    /// In bytes.
    pub offset: usize,
    /// Whether 0 is a correct value where a release that has no such field wrote the entry. Without
    /// it, such an entry cannot be converted.
    pub defaults_to_zero: bool,
    /// The type of the field.
    pub of: &'static Type,
}

/// A pinned map.
#[derive(Debug)]
pub struct MapLayout {
    /// Its name.
    pub name: &'static str,
    /// The version of its layout, which is in the name of its pin: it goes up when a key or value
    /// changes.
    pub version: u32,
    /// The type of its keys.
    pub key: &'static Type,
    /// The type of its values.
    pub value: &'static Type,
}

impl Type {
    const fn of_fields(size: usize, fields: &'static [Field]) -> Self {
        let (mut index, mut sum) = (0, 0);
        while index < fields.len() {
            sum += fields[index].of.size;
            index += 1;
        }
        assert!(sum == size, "a field is not described");
        Self { size, kind: Kind::Struct(fields) }
    }
}

const fn type_of<S, T: Described>(_field: fn(&S) -> &T) -> &'static Type {
    T::TYPE
}

macro_rules! plain {
    ($kind:ident: $($plain:ty),+) => {$(
        impl Described for $plain {
            const TYPE: &'static Type = &Type { size: size_of::<Self>(), kind: Kind::$kind };
        }
    )+};
}

plain!(Number: u8, u16, u32, u64, i32);
plain!(Bytes: Be16, Address4, Address6);

impl<T: Described, const LENGTH: usize> Described for [T; LENGTH] {
    const TYPE: &'static Type = &Type { size: size_of::<Self>(), kind: Kind::Array(T::TYPE) };
}

/// Describes types by the names of their fields; `= 0` follows a field that defaults to zero.
macro_rules! described {
    (@ ) => { false };
    (@ 0) => { true };
    ($($name:ident $(<$address:ident>)? { $($field:ident $(= $zero:tt)?),+ $(,)? })+) => {$(
        impl $(<$address: Address + Described>)? Described for $name $(<$address>)? {
            const FIELDS: &'static [Field] = &[$(Field {
                name: stringify!($field),
                offset: core::mem::offset_of!(Self, $field),
                defaults_to_zero: described!(@ $($zero)?),
                of: type_of(|this: &Self| &this.$field),
            }),+];
            const TYPE: &'static Type = &Type::of_fields(size_of::<Self>(), Self::FIELDS);
        }
    )+};
}

described! {
    Tuple<A> { source, destination, source_port, destination_port }
    FlowKey<A> { tuple, protocol }
    NextHop { bytes }
    Action { action }
    FragmentKey<A> { source, destination, identification, protocol }
    Fragment { source_port, destination_port, last_seen }
    FrontendKey<A> { address, port, protocol, zero = 0 }
    FrontendKind { kind }
    Frontend { service, kind, flags, zero = 0 }
    SlotRange { start_and_length }
    Service { cluster, local, affinity_seconds, flags }
    Slot { backend }
    Name { text, length, family, protocol, zero = 0 }
    AffinityKey { service, kind, client }
    Affinity { backend, generation, last_seen }
    Peer { address, port, family }
    ConnectedPeer { requested, actual }
    ConnectedBucket { cookies, peers }
    DatagramKey { cookie, actual }
    Prefix<A> { address, mask }
    FamilySettings<A> {
        service_prefixes, node_addresses, pod_prefixes, node_source, service_prefix_count,
        service_cidr_count, node_address_count, pod_prefix_count,
    }
    FormerLifetimes { ticks }
    Lifetimes { words }
    Settings {
        ipv4, ipv6, lifetimes, ticks_per_second, flags, node_ports, source_ports,
        flow_lifetimes = 0, time_shift = 0, zero = 0,
    }
    Bucket { words }
    FlowSeed { factors, buckets, filters }
    FlowFilter { words }
    FlowBucket<A> { words, entries }
    FlowEntry<A> {
        request, translated, backend, service, device, generation, actions, next_hops = 0,
        reply_place, zero = 0,
    }
    Flow<A> {
        rewrite, action, state, generation, backend, service, last_seen, device, next_hop = 0,
    }
    FormerSettings { ipv4, ipv6, lifetimes, ticks_per_second, flags, node_ports, source_ports }
    FormerSettingsPair { active, zero = 0, copies }
    PortRange { first, count }
    Range<A> { service, address }
    RangeKey<A> { prefix_length, range }
    SourceKey<A> { prefix_length, address }
    SettingsPair { active, zero = 0, copies }
    Device { ifindex, mac, flags, mtu, epoch }
    Traffic { packets, bytes }
    DirectFlows { begun, ended }
    DropKey { service, reason }
}

#[cfg(not(feature = "next-layout"))]
described! {
    Backend<A> { address, port, generation, sets, flags, zero = 0, service, node }
}

#[cfg(feature = "next-layout")]
described! {
    Backend<A> { address, port, generation, sets, flags, zero = 0, service, node, spare = 0 }
}

const fn map<K: Described, V: Described>(name: &'static str, version: u32) -> MapLayout {
    MapLayout { name, version, key: K::TYPE, value: V::TYPE }
}

/// Layouts of releases that left no description of them in the kernel, and that this release can take
/// over: those of 0.1.0.
pub const FORMER: &[MapLayout] = &[map::<u32, FormerSettingsPair>("SETTINGS", 1)];

/// The version of the maps that the feature `next-layout` changes.
const CHANGED: u32 = if cfg!(feature = "next-layout") { 2 } else { 1 };

/// Every pinned map.
pub const MAPS: &[MapLayout] = &[
    map::<FrontendKey<Address4>, Frontend>("FRONTENDS4", CHANGED),
    map::<FrontendKey<Address6>, Frontend>("FRONTENDS6", CHANGED),
    map::<RangeKey<Address4>, u32>("RANGES4", 1),
    map::<RangeKey<Address6>, u32>("RANGES6", 1),
    map::<SourceKey<Address4>, Address4>("SOURCES4", 1),
    map::<SourceKey<Address6>, Address6>("SOURCES6", 1),
    map::<Address4, u32>("NODES4", 1),
    map::<Address6, u32>("NODES6", 1),
    map::<u32, Service>("SERVICES", CHANGED),
    map::<u32, Name>("NAMES", CHANGED),
    map::<u32, Slot>("SLOTS", 1),
    map::<u32, Backend<Address4>>("BACKENDS4", CHANGED),
    map::<u32, Backend<Address6>>("BACKENDS6", CHANGED),
    map::<u32, SettingsPair>("SETTINGS", CHANGED + 2),
    map::<u32, Device>("DEVICES", CHANGED),
    map::<u32, FlowSeed>("FLOW_SEED", 3),
    map::<u32, FlowBucket<Address4>>("FLOW_TABLE4", 2),
    map::<u32, FlowBucket<Address6>>("FLOW_TABLE6", 2),
    map::<u32, Bucket>("FLOW_REPLIES4", 2),
    map::<u32, Bucket>("FLOW_REPLIES6", 2),
    map::<u32, FlowFilter>("FLOW_FILTER4", 1),
    map::<u32, FlowFilter>("FLOW_FILTER6", 1),
    map::<FragmentKey<Address4>, Fragment>("FRAGMENTS4", CHANGED),
    map::<FragmentKey<Address6>, Fragment>("FRAGMENTS6", CHANGED),
    map::<AffinityKey, Affinity>("AFFINITY", CHANGED),
    map::<DatagramKey, Peer>("DATAGRAM_PEERS", CHANGED),
    map::<u32, ConnectedBucket>("CONNECTED_PEERS", 1),
    map::<i32, ConnectedPeer>("SOCKETS", 1),
    map::<u32, u64>("FLOW_EVENTS", 1),
    map::<u32, DirectFlows>("DIRECT_FLOWS", 1),
    map::<u32, u64>("COUNTERS", 1),
    map::<u32, Traffic>("TRAFFIC", CHANGED),
    map::<DropKey, u64>("DROPS", CHANGED),
];
