//! The rules that other software keeps on a node, as nft scripts.

use crate::harness::netns::topology::plan::cidr;

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

/// Counts, per port, what leaves a node for a ClusterIP, and drops it before the fabric looks
/// at the frame's destination: it is seen wherever it is sent.
pub(in crate::harness::netns) fn fabric(ports: &[String]) -> String {
    let (v4, v6) = (cidr::SERVICES_V4, cidr::SERVICES_V6);
    let mut script = String::from("table netdev fabric {\n");
    for port in ports {
        script.push_str(&format!(
            "  counter {port} {{
               }}
               chain from_{port} {{
                 type filter hook ingress device \"{port}\" priority 0; policy accept;
                 ip daddr {v4} counter name \"{port}\" drop
                 ip6 daddr {v6} counter name \"{port}\" drop
               }}\n"
        ));
    }
    script.push_str("}\n");
    script
}
