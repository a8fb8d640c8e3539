//! Hooks of an interface, and what an interface is for the node.

use aya_obj::generated::bpf_attach_type::{BPF_TCX_EGRESS, BPF_TCX_INGRESS};

/// The direction of packets on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Packets that come in.
    Ingress,
    /// Packets that go out.
    Egress,
}

impl Direction {
    /// The name in pins.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    /// The direction of that name.
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

/// What an interface is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The host side of a pod's.
    Pod,
    /// Faces the outside.
    External,
    /// The loopback device.
    Loopback,
}

impl Role {
    /// What an interface with this program of ours was taken for.
    pub fn of_program(program: &str) -> Option<Self> {
        match program {
            "from_pod" | "to_pod" => Some(Self::Pod),
            "from_device" | "to_device" => Some(Self::External),
            "loopback" => Some(Self::Loopback),
            _ => None,
        }
    }
}

/// A program's place.
pub type Place = (u32, Direction);
