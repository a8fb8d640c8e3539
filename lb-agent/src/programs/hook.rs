//! The hooks of an interface, and the roles of interfaces.

use aya_obj::generated::bpf_attach_type::{BPF_TCX_EGRESS, BPF_TCX_INGRESS};

/// The direction of packets on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Received packets.
    Ingress,
    /// Transmitted packets.
    Egress,
}

impl Direction {
    /// The name, as in pins.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    /// The direction with this name.
    pub(crate) fn of_name(name: &str) -> Option<Self> {
        [Self::Ingress, Self::Egress].into_iter().find(|direction| direction.name() == name)
    }

    /// The attach type of tcx.
    pub(super) fn tcx(self) -> u32 {
        match self {
            Self::Ingress => BPF_TCX_INGRESS as u32,
            Self::Egress => BPF_TCX_EGRESS as u32,
        }
    }
}

/// What packets have in front of the IP header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinkHeader {
    /// An Ethernet header.
    #[default]
    Ethernet,
    /// Nothing: an L3 device, such as tun, WireGuard, ipip or ppp.
    Nothing,
    /// Another header, such as InfiniBand's: lb has no programs for it.
    Other,
}

/// The role of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The host side of a pod's interface.
    Pod,
    /// Connects the node to other nodes and to clients outside.
    External,
    /// The loopback device.
    Loopback,
}

impl Role {
    /// The programs of interfaces.
    pub(super) const PROGRAMS: [&'static str; 7] =
        ["from_pod", "to_pod", "from_device", "to_device", "from_l3", "to_l3", "loopback"];

    /// The role of an interface that has this program attached.
    pub fn of_program(program: &str) -> Option<Self> {
        match program {
            "from_pod" | "to_pod" => Some(Self::Pod),
            "from_device" | "to_device" | "from_l3" | "to_l3" => Some(Self::External),
            "loopback" => Some(Self::Loopback),
            _ => None,
        }
    }
}

/// An attach point: an interface, by index, and a direction.
pub type AttachPoint = (u32, Direction);
