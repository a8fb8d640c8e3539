//! Who has which address. Every cluster uses the same: they do not see each other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The address families that everything here has one address of.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, for loops.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// An address of each family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Addresses {
    /// The IPv4 address.
    pub v4: Ipv4Addr,
    /// The IPv6 address.
    pub v6: Ipv6Addr,
}

impl Addresses {
    /// The one of this family.
    pub fn get(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }
}

/// The default gateway of the nodes, in the fabric.
pub const NODE_GATEWAY: Addresses = Addresses {
    v4: Ipv4Addr::new(172, 18, 0, 1),
    v6: Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, 1),
};
/// The default gateway of the outside client, in the fabric.
pub(in crate::harness::netns) const OUTSIDE_GATEWAY: Addresses = Addresses {
    v4: Ipv4Addr::new(192, 0, 2, 1),
    v6: Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1),
};
/// The outside client, on a subnet of its own.
pub(in crate::harness::netns) const OUTSIDE: Addresses = Addresses {
    v4: Ipv4Addr::new(192, 0, 2, 10),
    v6: Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10),
};
/// Prefix lengths of the nodes' subnet, the outside client's, and a node's pods'.
pub(in crate::harness::netns) const SUBNET: (u8, u8) = (24, 64);

/// The address ranges of pods and Services, as an API server is configured with them.
pub mod cidr {
    use super::{IpNet, Ipv4Addr, Ipv4Net, Ipv6Addr, Ipv6Net};

    /// ClusterIPs, IPv4. The fabric drops and counts what is meant for them.
    pub const SERVICES_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 16);
    /// ClusterIPs, IPv6.
    pub const SERVICES_V6: Ipv6Net =
        Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0), 112);
    /// Pods of all nodes, IPv4.
    pub const PODS_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16);
    /// Pods of all nodes, IPv6.
    pub const PODS_V6: Ipv6Net =
        Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0), 48);

    /// Addresses of load balancers and external IPs, IPv4.
    pub const EXTERNAL_V4: [Ipv4Net; 2] = [
        Ipv4Net::new_assert(Ipv4Addr::new(203, 0, 113, 0), 24),
        Ipv4Net::new_assert(Ipv4Addr::new(198, 51, 100, 0), 24),
    ];
    /// Addresses of load balancers and external IPs, IPv6.
    pub const EXTERNAL_V6: [Ipv6Net; 2] = [
        Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0), 64),
        Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 3, 0, 0, 0, 0, 0), 64),
    ];

    /// Pods of all nodes, as `--cluster-cidr` takes it.
    pub fn cluster() -> String {
        format!("{PODS_V4},{PODS_V6}")
    }

    /// Pods of one node; nodes count from 1.
    pub fn pods_of_node(node: u8) -> [IpNet; 2] {
        let v4 = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, node, 0), 24);
        let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, 0);
        [v4.into(), Ipv6Net::new_assert(v6, 64).into()]
    }
}

/// A node's own address; nodes count from 1.
pub(in crate::harness::netns) fn node(node: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(172, 18, 0, 10 + node),
        v6: Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, 0x10 + u16::from(node)),
    }
}

/// A node's address in the second network; nodes count from 1.
pub(in crate::harness::netns) fn second(node: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(172, 31, 0, 10 + node),
        v6: Ipv6Addr::new(0xfd00, 0x31, 0, 0, 0, 0, 0, 0x10 + u16::from(node)),
    }
}

/// A pod's address; number 1 is the bridge's.
pub(in crate::harness::netns) fn pod(node: u8, number: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(10, 244, node, number),
        v6: Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, number.into()),
    }
}

/// The ClusterIPs that tests give to their Services: number 1 to 250.
pub fn cluster_ip(number: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(10, 96, 0, number),
        v6: Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number.into()),
    }
}

/// The load balancer addresses that tests give to their Services: number 1 to 250.
pub fn balancer_ip(number: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(203, 0, 113, number),
        v6: Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, number.into()),
    }
}

/// The external IPs that tests give to their Services: number 1 to 250.
pub fn external_ip(number: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(198, 51, 100, number),
        v6: Ipv6Addr::new(0x2001, 0xdb8, 3, 0, 0, 0, 0, number.into()),
    }
}

/// The node ports that tests give to their Services: number 1 to 250.
pub fn node_port(number: u8) -> u16 {
    30_000 + u16::from(number)
}
