//! What is compared: proxies, on a route, by a load.

use serde::Serialize;

use super::exchange::Load;
use crate::harness::controlplane::kube_proxy::Mode;
use crate::harness::netns::topology::plan::Family;

/// The client's pod, on node 1.
pub(super) const CLIENT: &str = "client";
/// The pod behind a Service on the client's node.
pub(super) const NEAR: &str = "near";
/// The pod behind a Service on the other node.
pub(super) const FAR: &str = "far";
/// The pod on the other node that belongs to no Service.
pub(super) const PLAIN: &str = "plain";

/// What forwards packets to Services in a lane.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proxy {
    /// Nothing: clients use pod IPs.
    Direct,
    /// Nothing, in another cluster: what differs from [`Proxy::Direct`] is noise.
    Control,
    /// Nothing, but a client outside reaches the backend's node and back through node 1, as it does
    /// where a proxy there has source NAT: what the kernel's forwarding costs.
    Relayed,
    /// lb, which translates when a process of a node or of a pod calls connect() or sendmsg().
    LbConnect,
    /// lb, packet by packet; node ports with source NAT.
    LbTc,
    /// lb, packet by packet; node ports with direct server return.
    LbDsr,
    /// lb, packet by packet; node ports with source NAT in XDP, where veths have no checksum
    /// offload.
    LbXdp,
    /// Empty programs on the hooks on which [`Proxy::LbTc`] has its own.
    Empty,
    /// kube-proxy in its mode nftables.
    Nftables,
    /// kube-proxy in its mode iptables.
    Iptables,
}

impl Proxy {
    /// All, in the order of the report.
    pub const ALL: [Self; 10] = [
        Self::Direct,
        Self::Control,
        Self::Relayed,
        Self::LbConnect,
        Self::LbTc,
        Self::LbDsr,
        Self::LbXdp,
        Self::Empty,
        Self::Nftables,
        Self::Iptables,
    ];

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Control => "direct again",
            Self::Relayed => "relayed, no proxy",
            Self::LbConnect => "lb connect-time",
            Self::LbTc => "lb tc",
            Self::LbDsr => "lb DSR",
            Self::LbXdp => "lb XDP",
            Self::Empty => "empty programs",
            Self::Nftables => "kube-proxy nftables",
            Self::Iptables => "kube-proxy iptables",
        }
    }

    pub(super) fn is_direct(self) -> bool {
        matches!(self, Self::Direct | Self::Control | Self::Relayed)
    }

    /// `--socket-lb`, `--external-mode` and `--xdp` of lb.
    pub(super) fn agent_modes(self) -> Option<[&'static str; 3]> {
        match self {
            Self::LbConnect => Some(["all", "snat", "off"]),
            Self::LbTc => Some(["off", "snat", "off"]),
            Self::LbDsr => Some(["off", "dsr", "off"]),
            Self::LbXdp => Some(["off", "snat", "native"]),
            _ => None,
        }
    }

    pub(super) fn kube_proxy_mode(self) -> Option<Mode> {
        match self {
            Self::Nftables => Some(Mode::Nftables),
            Self::Iptables => Some(Mode::Iptables),
            _ => None,
        }
    }
}

/// Who asks whom, and how the server is addressed where there is a proxy.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Route {
    /// A pod asks a ClusterIP whose backend is on its node.
    ClusterIpNear,
    /// A pod asks a ClusterIP whose backend is on the other node.
    ClusterIpFar,
    /// A pod asks a pod IP on the other node that is no Service's.
    PodIp,
    /// A client outside asks a node port whose backend is on the other node.
    NodePort,
}

impl Route {
    /// All, in the order of the report.
    pub const ALL: [Self; 4] =
        [Self::ClusterIpNear, Self::ClusterIpFar, Self::PodIp, Self::NodePort];

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Self::ClusterIpNear => "pod to ClusterIP, same node",
            Self::ClusterIpFar => "pod to ClusterIP, other node",
            Self::PodIp => "pod to pod IP without Service, other node",
            Self::NodePort => "outside to node port, other node",
        }
    }

    /// Lanes that differ on this route. At a node port lb never translates at connect(), and only
    /// there direct server return and XDP are any different. Empty programs forward to no Service.
    pub fn has(self, proxy: Proxy) -> bool {
        match proxy {
            Proxy::LbConnect => self != Self::NodePort,
            Proxy::Relayed | Proxy::LbDsr | Proxy::LbXdp => self == Self::NodePort,
            Proxy::Empty => self == Self::PodIp,
            _ => true,
        }
    }

    /// The pod that serves it.
    pub(super) fn server(self) -> &'static str {
        match self {
            Self::ClusterIpNear => NEAR,
            Self::ClusterIpFar | Self::NodePort => FAR,
            Self::PodIp => PLAIN,
        }
    }
}

/// What lanes are compared by: a load on a route over an address family.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Case {
    /// Who asks whom.
    pub route: Route,
    /// What it does.
    pub load: Load,
    /// Whether over IPv6.
    pub is_v6: bool,
}

impl Case {
    /// For people.
    pub fn title(self) -> String {
        let family = if self.is_v6 { ", IPv6" } else { "" };
        format!("{}, {}{family}", self.load.title(), self.route.title())
    }

    /// Whether a lane differs on this route and is measured with this load: XDP on veths needs
    /// devices without offloads, on which bulk compares with no other lane.
    pub(super) fn has(self, proxy: Proxy) -> bool {
        self.route.has(proxy) && !(proxy == Proxy::LbXdp && self.load == Load::Bulk)
    }

    /// Whether the load makes sense on the route.
    pub(super) fn is_meant(self) -> bool {
        self.load != Load::Forward || self.route == Route::NodePort
    }

    pub(super) fn family(self) -> Family {
        if self.is_v6 { Family::V6 } else { Family::V4 }
    }
}
