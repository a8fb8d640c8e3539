//! The network of this node, as the rest of the agent sees it.

use std::net::IpAddr;

/// An interface of the agent's network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Interface {
    /// The kernel's index.
    pub index: u32,
    /// The name.
    pub name: String,
}

/// What the rest of the agent wants to know of the network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeNetwork {
    /// Addresses of this node but those of pods' interfaces; those of external devices
    /// first, without repetition.
    pub addresses: Vec<IpAddr>,
    /// Addresses that the host side of pods' interfaces holds, such as the one gateway
    /// address that a point-to-point CNI gives to every veth.
    pub pod_side_addresses: Vec<IpAddr>,
    /// The source address of the best default route of each family.
    pub default_sources: Vec<IpAddr>,
    /// The external devices.
    pub devices: Vec<Interface>,
    /// How many interfaces of pods there are.
    pub pods: usize,
    /// What could not be attached, one sentence each; it is tried again.
    pub problems: Vec<String>,
    /// Whether this takes the addresses of the Node object into account.
    pub knows_node_object: bool,
}
