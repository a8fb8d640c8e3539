//! FRONTENDS4 and FRONTENDS6: the addresses that clients connect to.

use bytemuck::{Pod, Zeroable};

use super::ip::{Be16, pod};

/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP: u8 = 17;

/// What clients connect to. Port 0 with protocol 0 stands for the address itself. Every live
/// ClusterIP has such an entry, so that its other ports can be refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct FrontendKey<A> {
    /// The address, network byte order.
    pub address: A,
    /// The port, network byte order.
    #[cfg(not(feature = "next-layout"))]
    pub port: Be16,
    /// [`TCP`] or [`UDP`]; 0 with port 0.
    pub protocol: u8,
    /// Always 0.
    pub zero: u8,
    /// The port, network byte order.
    #[cfg(feature = "next-layout")]
    pub port: Be16,
}

pod! {
    FrontendKey<A> { A, Be16, u8, u8 }
}

impl<A> FrontendKey<A> {
    /// The key of `address:port/protocol`.
    #[inline(always)]
    pub const fn new(address: A, port: Be16, protocol: u8) -> Self {
        Self { address, port, protocol, zero: 0 }
    }

    /// The key of the address itself.
    #[inline(always)]
    pub const fn of_address(address: A) -> Self {
        Self::new(address, Be16::new(0), 0)
    }

    /// The key of a node port on any node, with the unspecified address in place of the node's. It
    /// is for packets that another node received and sent here untranslated (direct server return).
    #[inline(always)]
    pub fn of_any_node(port: Be16, protocol: u8) -> Self
    where
        A: Default,
    {
        Self::new(A::default(), port, protocol)
    }
}

/// The service port of a frontend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Frontend {
    /// Index into SERVICES.
    pub service: u32,
    /// One of [`FrontendKind`]'s constants.
    pub kind: FrontendKind,
    /// A set of [`Frontend::RANGED`].
    pub flags: u8,
    /// Always 0.
    pub zero: u16,
}

impl Frontend {
    /// The frontend is an address of a load balancer whose Service has `loadBalancerSourceRanges`:
    /// only clients in RANGES are allowed.
    pub const RANGED: u8 = 1;
}

/// The kind of a frontend's address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct FrontendKind {
    /// The number of the kind.
    pub kind: u8,
}

impl FrontendKind {
    /// A port of a ClusterIP.
    pub const CLUSTER_IP: Self = Self { kind: 1 };
    /// A ClusterIP as a whole: the entry with port 0 and protocol 0.
    pub const CLUSTER_IP_ADDRESS: Self = Self { kind: 2 };
    /// A node port on an address of this node.
    pub const NODE_PORT: Self = Self { kind: 3 };
    /// A port of a load balancer's address or of an external IP.
    pub const EXTERNAL: Self = Self { kind: 4 };
    /// A load balancer's address or external IP as a whole: the entry with port 0 and protocol 0.
    pub const EXTERNAL_ADDRESS: Self = Self { kind: 5 };

    /// Whether this is a ClusterIP: `internalTrafficPolicy` applies to its clients, and clients
    /// outside the cluster have no route to it.
    #[inline(always)]
    pub const fn is_internal(self) -> bool {
        self.kind <= Self::CLUSTER_IP_ADDRESS.kind
    }
}

const _: () = assert!(size_of::<Frontend>() == 8);
