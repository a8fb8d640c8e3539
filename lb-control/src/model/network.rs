//! The network namespace of this node, as decisions need it.

use std::{collections::BTreeSet, net::IpAddr};

/// An interface of the agent's network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Interface {
    /// The kernel's index.
    pub index: u32,
    /// The name.
    pub name: String,
}

/// The facts about the network namespace that decisions depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeNetwork {
    /// Addresses of this node without those of pods' interfaces; those of external devices
    /// first, each once.
    pub addresses: Vec<IpAddr>,
    /// Addresses that the host side of pods' interfaces holds, such as the one gateway
    /// address that a point-to-point CNI gives to every veth.
    pub pod_side_addresses: Vec<IpAddr>,
    /// Every address that an interface holds, except the one of kube-proxy's mode ipvs.
    pub held_addresses: BTreeSet<IpAddr>,
    /// The source address of the best default route of each family.
    pub default_sources: Vec<IpAddr>,
    /// The source addresses that the kernel prefers on routes by external devices.
    pub route_sources: BTreeSet<IpAddr>,
    /// The external devices.
    pub devices: Vec<Interface>,
    /// How many interfaces of pods there are.
    pub pods: usize,
    /// Programs that were detached and could not be attached again, one sentence each.
    pub problems: Vec<String>,
    /// Interfaces of which Service traffic is not handled, one sentence each.
    pub unhandled: Vec<String>,
    /// Programs of others that are on the wrong side of lb's on a hook, one phrase each.
    pub misplaced: Vec<String>,
    /// Whether the addresses of the Node object were known when this was read.
    pub knows_node_object: bool,
}
