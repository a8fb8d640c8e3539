//! The rules that other software keeps on a node, as nft scripts.

use crate::harness::netns::topology::cluster::Options;
use crate::harness::netns::topology::plan::{self, cidr};

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

/// Counts and drops, for the port of each node, before the fabric looks at the frame's
/// destination, what the node sends to a ClusterIP, and what it sends from an address that is not
/// its own. It may use the addresses of load balancers and external IPs, which are routed to it,
/// and those of its pods if the network routes them.
pub(in crate::harness::netns) fn fabric(nodes: u8, options: &Options) -> String {
    let (v4, v6) = (cidr::SERVICES_V4, cidr::SERVICES_V6);
    let mut script = String::from("table netdev fabric {\n");
    for node in 1..=nodes {
        let own = plan::node(node);
        let (mut own4, mut own6) = (
            vec![own.v4.to_string(), v4.to_string()],
            vec![own.v6.to_string(), v6.to_string(), "fe80::/10".to_owned(), "::".to_owned()],
        );
        own4.extend(cidr::EXTERNAL_V4.map(|net| net.to_string()));
        own6.extend(cidr::EXTERNAL_V6.map(|net| net.to_string()));
        if options.cni.is_routed() {
            let [pods_v4, pods_v6] = cidr::pods_of_node(node);
            own4.push(pods_v4.to_string());
            own6.push(pods_v6.to_string());
        }
        let (own4, own6) = (own4.join(", "), own6.join(", "));
        let check = if options.checks_sources {
            format!(
                "ip saddr != {{ {own4} }} counter name \"foreign{node}\" drop
                 ip6 saddr != {{ {own6} }} counter name \"foreign{node}\" drop"
            )
        } else {
            String::new()
        };
        script.push_str(&format!(
            "  counter node{node} {{
               }}
               counter foreign{node} {{
               }}
               chain from_node{node} {{
                 type filter hook ingress device \"node{node}\" priority 0; policy accept;
                 ip daddr {v4} counter name \"node{node}\" drop
                 ip6 daddr {v6} counter name \"node{node}\" drop
                 {check}
               }}\n"
        ));
    }
    script.push_str("}\n");
    script
}
