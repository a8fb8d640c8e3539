//! How pods hang on a node: `ip` lines for the forms that container networks have.

use super::overlay;
use super::plan::{self, Addresses, SUBNET};

/// What a container network does with a pod's link.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Cni {
    /// As Calico: the node's end of the veth has no address, the node has a route to the pod,
    /// the pod has a /32 (/128) and a gateway that is on its link only.
    #[default]
    PointToPoint,
    /// As the bridge plugin, kindnet or flannel: the node's ends are ports of `cni0`, which
    /// holds the pods' gateway address.
    Bridge,
    /// As flannel with its backend `vxlan`: pods as with [`Cni::Bridge`], those of other nodes by
    /// an overlay. The network between the nodes does not know the addresses of pods.
    Vxlan,
    /// Pods as with [`Cni::PointToPoint`], those of other nodes by a second network, which has
    /// an interface of each node. The network of the default route does not know them.
    TwoNetworks,
}

impl Cni {
    /// All, for loops.
    pub const ALL: [Self; 4] = [Self::PointToPoint, Self::Bridge, Self::Vxlan, Self::TwoNetworks];

    /// Whether the network of the nodes' default routes routes the addresses of pods. Where it does
    /// not, nodes masquerade what pods send there.
    pub fn is_routed(self) -> bool {
        match self {
            Self::PointToPoint | Self::Bridge => true,
            Self::Vxlan | Self::TwoNetworks => false,
        }
    }

    /// The MTU of a pod's link, if it is not the default.
    fn pod_mtu(self) -> Option<u16> {
        (self == Self::Vxlan).then_some(overlay::POD_MTU)
    }
}

/// The MAC of every node's end of a point-to-point veth.
const HOST_MAC: &str = "ee:ee:ee:ee:ee:ee";
/// The link-local address that the kernel derives from it.
const HOST_LINK_LOCAL: &str = "fe80::ecee:eeff:feee:eeee";
/// The pods' IPv4 gateway: no device holds it, a permanent neighbour entry answers for it.
const LINK_GATEWAY: &str = "169.254.1.1";

/// The link of one pod.
#[derive(Clone, Debug)]
pub(in crate::harness::netns) struct Link {
    pub(in crate::harness::netns) cni: Cni,
    pub(in crate::harness::netns) node: u8,
    pub(in crate::harness::netns) number: u8,
    pub(in crate::harness::netns) hairpin: bool,
}

impl Link {
    /// The device on the node.
    pub(in crate::harness::netns) fn host_device(&self) -> String {
        match self.cni {
            Cni::PointToPoint | Cni::TwoNetworks => {
                format!("cali{:02x}{:04x}", self.node, self.number)
            }
            Cni::Bridge | Cni::Vxlan => format!("veth{:02x}{:04x}", self.node, self.number),
        }
    }

    pub(in crate::harness::netns) fn addresses(&self) -> Addresses {
        plan::pod(self.node, self.number)
    }

    /// What is done on the node; `netns` is the name of the pod's namespace.
    pub(in crate::harness::netns) fn on_node(&self, netns: &str) -> Vec<String> {
        let device = self.host_device();
        let Addresses { v4, v6 } = self.addresses();
        match self.cni {
            Cni::PointToPoint | Cni::TwoNetworks => vec![
                format!(
                    "link add {device} address {HOST_MAC} type veth peer name eth0 netns {netns}"
                ),
                format!("link set {device} up"),
                format!("route add {v4}/32 dev {device} scope link"),
                format!("route add {v6}/128 dev {device}"),
            ],
            Cni::Bridge | Cni::Vxlan => {
                let mtu = self.cni.pod_mtu().map_or(String::new(), |mtu| format!(" mtu {mtu}"));
                let mut lines = vec![
                    format!("link add {device}{mtu} type veth peer name eth0{mtu} netns {netns}"),
                    format!("link set {device} master cni0"),
                    format!("link set {device} up"),
                ];
                if self.hairpin {
                    lines.push(format!("link set {device} type bridge_slave hairpin on"));
                }
                lines
            }
        }
    }

    /// What is done in the pod, after the node.
    pub(in crate::harness::netns) fn in_pod(&self) -> Vec<String> {
        let Addresses { v4, v6 } = self.addresses();
        let mut lines = vec!["link set lo up".to_owned()];
        match self.cni {
            Cni::PointToPoint | Cni::TwoNetworks => lines.extend([
                format!("addr add {v4}/32 dev eth0"),
                format!("addr add {v6}/128 dev eth0 nodad"),
                "link set eth0 up".to_owned(),
                format!("neigh add {LINK_GATEWAY} lladdr {HOST_MAC} dev eth0 nud permanent"),
                format!("neigh add {HOST_LINK_LOCAL} lladdr {HOST_MAC} dev eth0 nud permanent"),
                format!("route add {LINK_GATEWAY} dev eth0 scope link"),
                format!("route add default via {LINK_GATEWAY} dev eth0"),
                format!("route add default via {HOST_LINK_LOCAL} dev eth0"),
            ]),
            Cni::Bridge | Cni::Vxlan => {
                let gateway = plan::pod(self.node, 1);
                lines.extend([
                    format!("addr add {v4}/{} dev eth0", SUBNET.0),
                    format!("addr add {v6}/{} dev eth0 nodad", SUBNET.1),
                    "link set eth0 up".to_owned(),
                    format!("route add default via {}", gateway.v4),
                    format!("route add default via {}", gateway.v6),
                ]);
            }
        }
        lines
    }
}

/// What a node needs before its first pod.
pub(in crate::harness::netns) fn on_node(cni: Cni, node: u8) -> Vec<String> {
    match cni {
        Cni::PointToPoint | Cni::TwoNetworks => Vec::new(),
        Cni::Bridge | Cni::Vxlan => {
            let gateway = plan::pod(node, 1);
            vec![
                // An address of its own: the bridge would take on the lowest of its ports'.
                format!(
                    "link add cni0 address 0a:58:0a:f4:{node:02x}:01 type bridge \
                     forward_delay 0 mcast_snooping 0"
                ),
                format!("addr add {}/{} dev cni0", gateway.v4, SUBNET.0),
                format!("addr add {}/{} dev cni0 nodad", gateway.v6, SUBNET.1),
                "link set cni0 up".to_owned(),
            ]
        }
    }
}
