//! SETTINGS and DEVICES: the configuration of this node for the programs.

use bytemuck::{Pod, Zeroable};

use super::{
    flow::STATES,
    flow_table::TIMES,
    ip::{Address, Address4, Address6, Prefix, pod},
};

/// The one entry of SETTINGS: two copies and the number of the one in use. The agent writes the
/// other copy, then changes the number.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct SettingsPair {
    /// The copy in use: 0 or 1.
    pub active: u32,
    /// Always 0.
    pub zero: u32,
    /// Both copies.
    pub copies: [Settings; 2],
}

/// The configuration of this node for the programs. Times are in ticks of the kernel's jiffies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Settings {
    /// Addresses and prefixes of IPv4.
    pub ipv4: FamilySettings<Address4>,
    /// Addresses and prefixes of IPv6.
    pub ipv6: FamilySettings<Address6>,
    /// For agents up to 0.1.0, which may take over again.
    pub lifetimes: FormerLifetimes,
    /// Jiffies per second (CONFIG_HZ).
    #[cfg(not(feature = "next-layout"))]
    pub ticks_per_second: u32,
    /// A set of [`Settings::EXTERNAL`], [`Settings::MASQUERADE_ALL`], [`Settings::DRAINING`],
    /// [`Settings::SOURCE_BY_ROUTE`], [`Settings::DSR`] and [`Settings::ONLY_NODE_SOCKETS`].
    pub flags: u32,
    /// Jiffies per second (CONFIG_HZ).
    #[cfg(feature = "next-layout")]
    pub ticks_per_second: u32,
    /// The range that every node port is in.
    pub node_ports: PortRange,
    /// The source ports for flows that get an address of this node as their source.
    pub source_ports: PortRange,
    /// The idle timeouts of flows.
    pub flow_lifetimes: Lifetimes,
    /// The unit of the times of flows: two to this power jiffies.
    pub time_shift: u32,
    /// Always 0.
    pub zero: u32,
}

impl Settings {
    /// [`Settings::time_shift`] where the kernel counts so many jiffies per second: for each usual
    /// number of them, the unit of times is between 50 and 80 ms.
    pub const fn time_shift_of(ticks_per_second: u32) -> u32 {
        let times = ticks_per_second / 12;
        if times < 2 { 0 } else { times.ilog2() }
    }

    /// The time of a flow that is seen at `jiffies`.
    #[inline(always)]
    pub const fn time(&self, jiffies: u32) -> u32 {
        (jiffies >> (self.time_shift & 31)) & (TIMES - 1)
    }

    /// So many seconds in the unit of times.
    #[inline(always)]
    pub const fn times(&self, seconds: u32) -> u32 {
        seconds.wrapping_mul(self.ticks_per_second) >> (self.time_shift & 31)
    }

    /// The node has, or had, frontends. Clients outside the cluster reach all of them, ClusterIPs
    /// too: packets that leave may be replies to such clients.
    pub const EXTERNAL: u32 = 1;
    /// Every client of a ClusterIP gets an address of this node as its source.
    pub const MASQUERADE_ALL: u32 = 2;

    /// Whether every client of a ClusterIP gets an address of this node as its source.
    #[inline(always)]
    pub const fn masquerades_all(&self) -> bool {
        self.flags & Self::MASQUERADE_ALL != 0
    }

    /// Known flows go on, and packets that would open new ones are left to the kernel.
    pub const DRAINING: u32 = 4;

    /// Whether new flows are left to the kernel.
    #[inline(always)]
    pub const fn is_draining(&self) -> bool {
        self.flags & Self::DRAINING != 0
    }

    /// The source address of a flow that cannot keep its client's depends on the route to its
    /// backend, as SOURCES4 and SOURCES6 have it. Otherwise it is
    /// [`FamilySettings::node_source`] on every route.
    pub const SOURCE_BY_ROUTE: u32 = 8;

    /// Whether source addresses depend on the route to the backend.
    #[inline(always)]
    pub const fn has_source_by_route(&self) -> bool {
        self.flags & Self::SOURCE_BY_ROUTE != 0
    }

    /// A Service uses direct server return: nodes encapsulate packets for this one.
    pub const DSR: u32 = 16;

    /// Whether encapsulated packets of other nodes are accepted.
    #[inline(always)]
    pub const fn accepts_tunnels(&self) -> bool {
        self.flags & Self::DSR != 0
    }

    /// Connect-time hooks translate only sockets of the node's network namespace. No program reads
    /// this flag: it is for the tools.
    pub const ONLY_NODE_SOCKETS: u32 = 1 << 16;
}

/// A range of ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PortRange {
    /// The first port, host byte order.
    pub first: u16,
    /// The number of ports; 0 = none.
    pub count: u16,
}

impl PortRange {
    /// Whether the port, host byte order, is in the range.
    #[inline(always)]
    pub const fn contains(self, port: u16) -> bool {
        port.wrapping_sub(self.first) < self.count
    }
}

/// The idle timeouts of flows in ticks of jiffies as releases up to 0.1.0 have them: those of TCP by
/// state, then those of UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct FormerLifetimes {
    /// The timeouts.
    pub ticks: [u32; 2 * FORMER_STATES],
}

/// [`Settings`] as 0.1.0 had them. Nothing is read by this type: it describes their layout.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct FormerSettings {
    /// See [`Settings::ipv4`].
    pub ipv4: FamilySettings<Address4>,
    /// See [`Settings::ipv6`].
    pub ipv6: FamilySettings<Address6>,
    /// See [`Settings::lifetimes`].
    pub lifetimes: FormerLifetimes,
    /// See [`Settings::ticks_per_second`].
    pub ticks_per_second: u32,
    /// See [`Settings::flags`].
    pub flags: u32,
    /// See [`Settings::node_ports`].
    pub node_ports: PortRange,
    /// See [`Settings::source_ports`].
    pub source_ports: PortRange,
}

/// [`SettingsPair`] as 0.1.0 had it.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct FormerSettingsPair {
    /// See [`SettingsPair::active`].
    pub active: u32,
    /// Always 0.
    pub zero: u32,
    /// See [`SettingsPair::copies`].
    pub copies: [FormerSettings; 2],
}

/// The number of states that a flow of one protocol may be in, in releases up to 0.1.0.
pub const FORMER_STATES: usize = 32;

impl Default for FormerLifetimes {
    fn default() -> Self {
        Self::zeroed()
    }
}

/// The idle timeouts of flows, one for every state, so that programs look them up without a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Lifetimes {
    /// By the lowest byte of a [`RequestWord`](super::flow_table::RequestWord): first those of places
    /// without a live flow, then those of TCP by state, then those of UDP. The lower 24 bits are the
    /// timeout in the unit of [`Settings::time_shift`], the upper 8 the number of the state's
    /// [`Class`](crate::flow_table::Class).
    pub words: [u32; 4 * STATES],
}

impl Lifetimes {
    /// The timeout in a word.
    #[inline(always)]
    pub const fn ticks(word: u32) -> u32 {
        word & 0xff_ffff
    }
}

impl Default for Lifetimes {
    fn default() -> Self {
        Self::zeroed()
    }
}

/// The idle times after which a flow counts as absent, in the unit of [`Settings::time_shift`];
/// [`Lifetimes`] are made from them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Timeouts {
    /// TCP before the handshake is complete.
    pub tcp_syn: u32,
    /// TCP, established.
    pub tcp_established: u32,
    /// TCP, one side has sent FIN: it may still be receiving.
    pub tcp_half_closed: u32,
    /// TCP whose replies do not pass this node, once the client has sent FIN. Whether the backend
    /// still sends is not known.
    pub tcp_fin_one_way: u32,
    /// TCP, both sides have sent FIN: as long as the side that closed first keeps the ports
    /// (TIME_WAIT).
    pub tcp_closing: u32,
    /// TCP, one side has sent RST, or somebody has in its name: whoever does not believe it goes on
    /// within this time.
    pub tcp_reset: u32,
    /// UDP that was not answered, or not for long.
    pub udp: u32,
    /// UDP with traffic both ways over more than two seconds.
    pub udp_stream: u32,
}

/// The number of prefixes of each kind, and of node addresses, that the settings hold for each
/// family.
pub const MAX_PREFIXES: usize = 8;

/// The configuration of this node in one family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct FamilySettings<A> {
    /// Every ClusterIP, load balancer's address and external IP is in one of the first
    /// `service_prefix_count` of these. A packet to another address, and not to a node port, is not
    /// Service traffic: it leaves the program after these comparisons.
    pub service_prefixes: [Prefix<A>; MAX_PREFIXES],
    /// The first `node_address_count` of these are addresses of this node.
    pub node_addresses: [A; MAX_PREFIXES],
    /// The first `pod_prefix_count` of these contain the addresses of the cluster's pods.
    pub pod_prefixes: [Prefix<A>; MAX_PREFIXES],
    /// The source address of a flow that cannot keep its client's: a pod that reaches itself, or a
    /// backend on another node whose route has no entry in SOURCES. Unspecified if the node has no
    /// address of this family.
    pub node_source: A,
    /// The number of `service_prefixes` in use.
    pub service_prefix_count: u32,
    /// The number of ServiceCIDRs, which come first in `service_prefixes`. An address in them that
    /// no Service has never leaves the node. The other prefixes contain the Service addresses
    /// outside of them.
    pub service_cidr_count: u32,
    /// The number of `node_addresses` in use. Above [`MAX_PREFIXES`]: the node has more addresses
    /// than fit, and any address may be one of them.
    pub node_address_count: u32,
    /// The number of `pod_prefixes` in use.
    pub pod_prefix_count: u32,
}

impl<A: Address> FamilySettings<A> {
    /// Whether `address` may be a Service's: a ClusterIP, a load balancer's address or an external
    /// IP.
    #[inline(always)]
    pub fn may_be_service(&self, address: A) -> bool {
        Self::any(&self.service_prefixes, self.service_prefix_count, address)
    }

    /// Whether `address` is in a ServiceCIDR.
    #[inline(always)]
    pub fn is_in_service_cidr(&self, address: A) -> bool {
        Self::any(&self.service_prefixes, self.service_cidr_count, address)
    }

    /// Whether `address` is in a known prefix of pod addresses.
    #[inline(always)]
    pub fn is_pod(&self, address: A) -> bool {
        Self::any(&self.pod_prefixes, self.pod_prefix_count, address)
    }

    /// Whether `address` is known to be an address of this node.
    #[inline(always)]
    pub fn is_node(&self, address: A) -> bool {
        let mut index = 0;
        // Two bounds, of which the compiler would make one: verifiers before 6.3 forget the range of
        // a number that is spilled to the stack, and the constant bound is never spilled.
        while index < MAX_PREFIXES && index < self.node_address_count as usize {
            if self.node_addresses[index] == address {
                return true;
            }
            index += 1;
        }
        false
    }

    /// Whether `address` may be an address of this node.
    #[inline(always)]
    pub fn may_be_node(&self, address: A) -> bool {
        self.node_address_count as usize > MAX_PREFIXES || self.is_node(address)
    }

    #[inline(always)]
    fn any(prefixes: &[Prefix<A>; MAX_PREFIXES], count: u32, address: A) -> bool {
        let mut index = 0;
        while index < MAX_PREFIXES && index < count as usize {
            if prefixes[index].contains(address) {
                return true;
            }
            index += 1;
        }
        false
    }
}

/// An external device: packets of clients and backends outside this node enter and leave by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Device {
    /// The kernel's index of the device; 0 = the entry is free.
    pub ifindex: u32,
    /// Its link-layer address.
    pub mac: [u8; 6],
    /// A set of [`Device::XDP_REDIRECT`].
    pub flags: u16,
    /// The device's MTU: bytes without Ethernet header.
    #[cfg(not(feature = "next-layout"))]
    pub mtu: u32,
    /// Changes whenever routes or neighbours may have changed; 1 to 255. Next hops that flows
    /// remember from another epoch are not valid.
    pub epoch: u32,
    /// The device's MTU: bytes without Ethernet header.
    #[cfg(feature = "next-layout")]
    pub mtu: u32,
}

impl Device {
    /// XDP sends frames by redirecting them to the device. A veth's peer is not woken for frames
    /// that XDP_TX leaves there, unless it runs XDP itself (`veth_xdp_flush`).
    pub const XDP_REDIRECT: u16 = 1;
}

/// The number of entries of DEVICES.
pub const MAX_DEVICES: u32 = 16;

pod! {
    FamilySettings<A> {
        [Prefix<A>; MAX_PREFIXES], [A; MAX_PREFIXES], [Prefix<A>; MAX_PREFIXES],
        A, u32, u32, u32, u32,
    }
}
