//! A VXLAN between the nodes as flannel's backend `vxlan` makes it: a device for each family, which
//! holds the network address of the node's pods, and permanent entries for every other node.

use super::plan::{self, Addresses, cidr};

/// The MTU of pods: that of the network less the outer IPv6, UDP, VXLAN and Ethernet headers.
pub(in crate::harness::netns) const POD_MTU: u16 = 1430;

/// The device for IPv4 pods and the device for IPv6 pods.
const DEVICES: [(&str, u16); 2] = [("flannel.1", 1450), ("flannel-v6.1", POD_MTU)];

/// What a node needs to reach the pods of the other nodes, after its `eth0` is up.
pub(in crate::harness::netns) fn on_node(node: u8, nodes: u8) -> Vec<String> {
    let Addresses { v4, v6 } = plan::node(node);
    let own = plan::pod(node, 0);
    let locals = [v4.to_string(), v6.to_string()];
    let held = [format!("{}/32", own.v4), format!("{}/128", own.v6)];
    let mut lines = Vec::new();
    for (((device, mtu), local), held) in DEVICES.iter().zip(locals).zip(held) {
        lines.push(format!(
            "link add {device} address {} mtu {mtu} type vxlan id 1 local {local} dev eth0 \
             dstport 8472 nolearning",
            mac(device, node)
        ));
        let nodad = if held.contains(':') { " nodad" } else { "" };
        lines.push(format!("addr add {held} dev {device}{nodad}"));
        lines.push(format!("link set {device} up"));
    }
    for other in (1..=nodes).filter(|other| *other != node) {
        let gateway = plan::pod(other, 0);
        let [pods_v4, pods_v6] = cidr::pods_of_node(other);
        let routes = [(gateway.v4.to_string(), pods_v4), (gateway.v6.to_string(), pods_v6)];
        for ((device, _), (gateway, pods)) in DEVICES.iter().zip(routes) {
            let mac = mac(device, other);
            lines.push(format!("neigh add {gateway} lladdr {mac} dev {device} nud permanent"));
            lines.push(format!("route add {pods} via {gateway} dev {device} onlink"));
        }
    }
    lines
}

/// `bridge fdb` lines: the node behind each MAC.
pub(in crate::harness::netns) fn forwarding(node: u8, nodes: u8) -> Vec<String> {
    let others = (1..=nodes).filter(|other| *other != node);
    let line = |other| {
        let Addresses { v4, v6 } = plan::node(other);
        let ends = [v4.to_string(), v6.to_string()];
        DEVICES.iter().zip(ends).map(move |((device, _), end)| {
            format!("fdb append {} dev {device} dst {end} self permanent", mac(device, other))
        })
    };
    others.flat_map(line).collect()
}

/// The MAC of a node's device.
fn mac(device: &str, node: u8) -> String {
    let family = if device == DEVICES[0].0 { 4 } else { 6 };
    format!("0a:f1:00:00:{family:02x}:{node:02x}")
}
