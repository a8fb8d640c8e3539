//! SETTINGS and DEVICES: what the programs must know of this node.

use bytemuck::{Pod, Zeroable};

use super::ip::{Address, Address4, Address6, Prefix, pod};

/// The one entry of SETTINGS: two copies and the number of the one that holds. The
/// agent writes the other copy, then flips the number.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct SettingsPair {
    /// 0 or 1: the copy that holds.
    pub active: u32,
    /// Always 0.
    pub zero: u32,
    /// The copies.
    pub copies: [Settings; 2],
}

/// What the programs must know of this node. Times are in ticks of the kernel's jiffies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Settings {
    /// IPv4.
    pub ipv4: FamilySettings<Address4>,
    /// IPv6.
    pub ipv6: FamilySettings<Address6>,
    /// How long flows live without a packet.
    pub lifetimes: Lifetimes,
    /// Jiffies per second (CONFIG_HZ).
    pub ticks_per_second: u32,
    /// A set of [`Settings::EXTERNAL`], [`Settings::MASQUERADE_ALL`], [`Settings::DRAINING`] and
    /// [`Settings::ONLY_NODE_SOCKETS`].
    pub flags: u32,
    /// Every node port lies in this range.
    pub node_ports: PortRange,
    /// Where source ports are taken from for flows that need one of this node's.
    pub source_ports: PortRange,
}

impl Settings {
    /// There are, or were, front ends that clients outside the cluster reach: packets
    /// that leave may be replies to them.
    pub const EXTERNAL: u32 = 1;
    /// Backends see this node as the client of a ClusterIP, whoever that is.
    pub const MASQUERADE_ALL: u32 = 2;

    /// Whether every client of a ClusterIP gets an address of this node.
    #[inline(always)]
    pub const fn masquerades_all(&self) -> bool {
        self.flags & Self::MASQUERADE_ALL != 0
    }

    /// Known flows go on and no new ones are opened: they are left to the stack.
    pub const DRAINING: u32 = 4;

    /// Whether no new flows are opened.
    #[inline(always)]
    pub const fn is_draining(&self) -> bool {
        self.flags & Self::DRAINING != 0
    }

    /// For the tools, as no program reads it: connect-time hooks leave the sockets of other
    /// network namespaces than the node's alone.
    pub const ONLY_NODE_SOCKETS: u32 = 1 << 16;
}

/// A range of ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PortRange {
    /// The first port, host byte order.
    pub first: u16,
    /// How many ports; 0 = none.
    pub count: u16,
}

impl PortRange {
    /// Whether the port, host byte order, is in the range.
    #[inline(always)]
    pub const fn contains(self, port: u16) -> bool {
        port.wrapping_sub(self.first) < self.count
    }
}

/// How long flows live without a packet, in ticks: for every protocol and state a number, so
/// that programs look it up without a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Lifetimes {
    /// TCP's first, then those of all else, by [`Flow::state`](super::flow::Flow::state).
    pub ticks: [u32; 2 * STATES],
}

/// How many states a flow may be in.
pub const STATES: usize = 32;

impl Default for Lifetimes {
    fn default() -> Self {
        Self::zeroed()
    }
}

/// Idle time after which a flow is absent, in ticks: what [`Lifetimes`] are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Timeouts {
    /// TCP before the handshake is complete.
    pub tcp_syn: u32,
    /// TCP, established.
    pub tcp_established: u32,
    /// TCP, one side has sent FIN: it may still be receiving.
    pub tcp_half_closed: u32,
    /// TCP whose answers go another way, so that only the client's packets are seen, once
    /// the client has sent FIN: whether it may still be receiving cannot be told.
    pub tcp_fin_one_way: u32,
    /// TCP, both sides have sent FIN or one has sent RST.
    pub tcp_closing: u32,
    /// UDP nobody has answered yet.
    pub udp: u32,
    /// UDP once answered.
    pub udp_answered: u32,
}

/// How many prefixes and node addresses the settings hold for each family.
pub const MAX_PREFIXES: usize = 8;

/// What the programs must know of this node in one family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct FamilySettings<A> {
    /// Every ClusterIP, load balancer's address and external IP lies in one of the first
    /// `service_prefix_count` of these; what is outside them is, but for node ports, no business of
    /// ours and leaves after these compares.
    pub service_prefixes: [Prefix<A>; MAX_PREFIXES],
    /// The first `node_address_count` are addresses of this node.
    pub node_addresses: [A; MAX_PREFIXES],
    /// The first `pod_prefix_count` hold the addresses of the cluster's pods.
    pub pod_prefixes: [Prefix<A>; MAX_PREFIXES],
    /// The address of this node that a backend sees where it can't see the client's: a
    /// pod that reaches itself, and backends on other nodes; unspecified if the node has
    /// none of this family.
    pub node_source: A,
    /// How many of `service_prefixes` are meant.
    pub service_prefix_count: u32,
    /// The first so many of `service_prefixes` are ServiceCIDRs: an address in them that no Service
    /// has never leaves the node. The rest merely covers ClusterIPs outside of them.
    pub service_cidr_count: u32,
    /// How many of `node_addresses` are meant; above [`MAX_PREFIXES`]: the node has
    /// more than fit, and any address may be one.
    pub node_address_count: u32,
    /// How many of `pod_prefixes` are meant.
    pub pod_prefix_count: u32,
}

impl<A: Address> FamilySettings<A> {
    /// Whether `address` may be a ClusterIP.
    #[inline(always)]
    pub fn may_be_service(&self, address: A) -> bool {
        Self::any(&self.service_prefixes, self.service_prefix_count, address)
    }

    /// Whether `address` lies in a ServiceCIDR.
    #[inline(always)]
    pub fn is_in_service_cidr(&self, address: A) -> bool {
        Self::any(&self.service_prefixes, self.service_cidr_count, address)
    }

    /// Whether `address` is that of a pod, as far as that is known.
    #[inline(always)]
    pub fn is_pod(&self, address: A) -> bool {
        Self::any(&self.pod_prefixes, self.pod_prefix_count, address)
    }

    /// Whether `address` is known to be an address of this node.
    #[inline(always)]
    pub fn is_node(&self, address: A) -> bool {
        let mut index = 0;
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

/// A device that flows of node processes leave by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Device {
    /// The kernel's index of the device; 0 = the entry is free.
    pub ifindex: u32,
    /// Its link-layer address.
    pub mac: [u8; 6],
    /// A set of [`Device::XDP_REDIRECT`].
    pub flags: u16,
    /// The longest packet that it sends, bytes without Ethernet header.
    pub mtu: u32,
    /// From 1 to 255, another one whenever routes or neighbours may have changed: what flows
    /// remember of them from before counts no more.
    pub epoch: u32,
}

impl Device {
    /// XDP sends frames by redirecting them to the device: a veth's peer is not woken for
    /// those that XDP_TX leaves there, unless it runs XDP itself (`veth_xdp_flush`).
    pub const XDP_REDIRECT: u16 = 1;
}

/// How many entries DEVICES has.
pub const MAX_DEVICES: u32 = 16;

pod! {
    FamilySettings<A> {
        [Prefix<A>; MAX_PREFIXES], [A; MAX_PREFIXES], [Prefix<A>; MAX_PREFIXES],
        A, u32, u32, u32, u32,
    }
}
