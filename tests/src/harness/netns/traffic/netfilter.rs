//! The rules that other software keeps on a node, as nft scripts.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::harness::netns::topology::cluster::Options;
use crate::harness::netns::topology::cni::Cni;
use crate::harness::netns::topology::plan::{self, Addresses, cidr};
use crate::harness::netns::topology::second;

/// Which of them a node has.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::harness::netns) struct Rules {
    pub(in crate::harness::netns) masquerade: bool,
    pub(in crate::harness::netns) drop_invalid: bool,
    pub(in crate::harness::netns) forward_policy: bool,
}

impl Rules {
    /// The script for a node, empty if it has none of the rules.
    pub(in crate::harness::netns) fn of_node(self, node: u8) -> String {
        let mut script = String::new();
        if self.masquerade {
            script.push_str(&masquerade(node));
        }
        if self.drop_invalid || self.forward_policy {
            script.push_str(&self.filter());
        }
        script
    }

    fn filter(self) -> String {
        let invalid = if self.drop_invalid { "ct state invalid counter drop" } else { "" };
        let (policy, accept) = if self.forward_policy {
            let (v4, v6) = (cidr::PODS_V4, cidr::PODS_V6);
            let accept = format!(
                "ct state established,related accept
                 ip saddr {v4} accept
                 ip daddr {v4} accept
                 ip6 saddr {v6} accept
                 ip6 daddr {v6} accept
                 icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept"
            );
            ("drop", accept)
        } else {
            ("accept", String::new())
        };
        format!(
            "table inet host {{
               chain input {{
                 type filter hook input priority filter; policy accept;
                 {invalid}
               }}
               chain forward {{
                 type filter hook forward priority filter; policy {policy};
                 {invalid}
                 {accept}
               }}
             }}\n"
        )
    }
}

/// Pods leave the cluster with the node's address.
fn masquerade(node: u8) -> String {
    let [pods_v4, pods_v6] = cidr::pods_of_node(node);
    let (cluster_v4, cluster_v6) = (cidr::PODS_V4, cidr::PODS_V6);
    format!(
        "table inet cni {{
           chain postrouting {{
             type nat hook postrouting priority srcnat; policy accept;
             ip saddr {pods_v4} ip daddr != {cluster_v4} counter masquerade
             ip6 saddr {pods_v6} ip6 daddr != {cluster_v6} counter masquerade
           }}
         }}\n"
    )
}

/// What flannel keeps on a node (`flannel.1`, `--ip-masq`): traffic into the pods' network that
/// comes from elsewhere gets the address of the device that it leaves by.
pub(in crate::harness::netns) fn flannel(node: u8) -> String {
    let [pods_v4, pods_v6] = cidr::pods_of_node(node);
    let (cluster_v4, cluster_v6) = (cidr::PODS_V4, cidr::PODS_V6);
    format!(
        "table inet flannel {{
           chain postrouting {{
             type nat hook postrouting priority srcnat; policy accept;
             ip saddr {pods_v4} ip daddr {cluster_v4} return
             ip saddr {cluster_v4} ip daddr {pods_v4} return
             ip saddr != {pods_v4} ip daddr {pods_v4} return
             ip saddr {cluster_v4} ip daddr != 224.0.0.0/4 masquerade
             ip saddr != {cluster_v4} ip daddr {cluster_v4} masquerade
             ip6 saddr {pods_v6} ip6 daddr {cluster_v6} return
             ip6 saddr {cluster_v6} ip6 daddr {pods_v6} return
             ip6 saddr != {pods_v6} ip6 daddr {pods_v6} return
             ip6 saddr {cluster_v6} ip6 daddr != ff00::/8 masquerade
             ip6 saddr != {cluster_v6} ip6 daddr {cluster_v6} masquerade
           }}
         }}\n"
    )
}

/// Counts and drops, for the ports of each node, before the fabric looks at the frame's
/// destination, what the node sends to a ClusterIP, and what it sends from an address that is not
/// its own. It may use the addresses of load balancers and external IPs, which are routed to it,
/// and those of its pods if the network routes them.
pub(in crate::harness::netns) fn fabric(nodes: u8, options: &Options) -> String {
    let mut script = String::from("table netdev fabric {\n");
    for node in 1..=nodes {
        script.push_str(&format!(
            "  counter node{node} {{
               }}
               counter foreign{node} {{
               }}\n"
        ));
        let pods = cidr::pods_of_node(node);
        let mut sources = own(plan::node(node)).to_vec();
        sources.extend(cidr::EXTERNAL_V4.map(IpNet::from));
        sources.extend(cidr::EXTERNAL_V6.map(IpNet::from));
        if options.cni.is_routed() {
            sources.extend(pods);
        }
        script.push_str(&port(node, &format!("node{node}"), &sources, options));
        if options.cni == Cni::TwoNetworks {
            let sources = [own(plan::second(node)), pods].concat();
            script.push_str(&port(node, &second::port(node), &sources, options));
        }
    }
    script.push_str("}\n");
    script
}

fn own(addresses: Addresses) -> [IpNet; 2] {
    [IpAddr::from(addresses.v4), addresses.v6.into()].map(IpNet::from)
}

/// The chain of a port, by which a node may send from these addresses.
fn port(node: u8, device: &str, sources: &[IpNet], options: &Options) -> String {
    let (v4, v6) = (cidr::SERVICES_V4, cidr::SERVICES_V6);
    let listed = |is_v4: bool| {
        let own = sources.iter().filter(|net| net.addr().is_ipv4() == is_v4);
        own.map(|net| format!(", {net}")).collect::<String>()
    };
    let (own4, own6) = (listed(true), listed(false));
    let check = if options.checks_sources {
        format!(
            "ip saddr != {{ {v4}{own4} }} counter name \"foreign{node}\" drop
             ip6 saddr != {{ {v6}, fe80::/10, ::{own6} }} counter name \"foreign{node}\" drop"
        )
    } else {
        String::new()
    };
    format!(
        "  chain from_{device} {{
             type filter hook ingress device \"{device}\" priority 0; policy accept;
             ip daddr {v4} counter name \"node{node}\" drop
             ip6 daddr {v6} counter name \"node{node}\" drop
             {check}
           }}\n"
    )
}
