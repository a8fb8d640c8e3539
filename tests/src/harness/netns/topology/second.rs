//! A second network between the nodes, by which their pods reach each other: each node has an
//! `eth1` in it, with an address of its own. The default route stays with `eth0`.

use super::namespace::Netns;
use super::plan::{self, Addresses, SUBNET, cidr};

/// The node's device.
pub(in crate::harness::netns) const DEVICE: &str = "eth1";

/// The port of a node's device.
pub(in crate::harness::netns) fn port(node: u8) -> String {
    format!("second{node}")
}

/// What the fabric needs: a switch of its own, which nothing is routed by.
pub(in crate::harness::netns) fn on_fabric(nodes: &[&Netns]) -> Vec<String> {
    let mut lines = vec!["link add br1 type bridge forward_delay 0 mcast_snooping 0".to_owned()];
    for (node, far) in (1..).zip(nodes) {
        let port = port(node);
        lines.push(format!("link add {port} type veth peer name {DEVICE} netns {}", far.name()));
        lines.push(format!("link set {port} master br1"));
        lines.push(format!("link set {port} up"));
    }
    lines.push("link set br1 up".to_owned());
    lines
}

/// What a node needs to reach the pods of the other nodes.
pub(in crate::harness::netns) fn on_node(node: u8, nodes: u8) -> Vec<String> {
    let Addresses { v4, v6 } = plan::second(node);
    let mut lines = vec![
        format!("addr add {v4}/{} dev {DEVICE}", SUBNET.0),
        format!("addr add {v6}/{} dev {DEVICE} nodad", SUBNET.1),
        format!("link set {DEVICE} up"),
    ];
    for other in (1..=nodes).filter(|other| *other != node) {
        let Addresses { v4, v6 } = plan::second(other);
        let [pods_v4, pods_v6] = cidr::pods_of_node(other);
        lines.push(format!("route add {pods_v4} via {v4}"));
        lines.push(format!("route add {pods_v6} via {v6}"));
    }
    lines
}
