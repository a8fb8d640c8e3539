//! The addresses on which node ports are served.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::{
    model::{IpFamily, network::NodeNetwork},
    options::NodePortAddresses,
};

const LOOPBACKS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// The options that select them.
#[derive(Clone, Debug)]
pub struct Selection {
    /// `--nodeport-addresses`.
    pub addresses: NodePortAddresses,
    /// Whether processes of this node reach node ports on the loopback addresses.
    pub on_loopback: bool,
    /// The primary address of its family, if it is not the Node's (`--bind-address`).
    pub primary: Option<IpAddr>,
}

/// The selected addresses, out of those that this node has now (without those of pods'
/// interfaces) and, for processes of this node, the loopback addresses.
///
/// `internal_ips` are those of the Node object in its order; without any, the source addresses
/// of the default routes are used instead.
pub fn addresses(
    selection: &Selection,
    internal_ips: &[IpAddr],
    network: &NodeNetwork,
) -> BTreeSet<IpAddr> {
    let loopbacks = LOOPBACKS.iter().filter(|_| selection.on_loopback);
    let candidates = network.addresses.iter().chain(loopbacks);
    match &selection.addresses {
        NodePortAddresses::Ranges(ranges) => candidates
            .filter(|ip| ranges.iter().any(|range| range.contains(*ip)))
            .copied()
            .collect(),
        NodePortAddresses::Primary => {
            let named =
                if internal_ips.is_empty() { &network.default_sources[..] } else { internal_ips };
            let first = |family| {
                let named = selection.primary.iter().chain(named);
                named.copied().find(|ip| IpFamily::of(*ip) == family)
            };
            let primary = [first(IpFamily::V4), first(IpFamily::V6)];
            candidates
                .filter(|ip| ip.is_loopback() || primary.contains(&Some(**ip)))
                .copied()
                .collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().expect("an address")).collect()
    }

    #[track_caller]
    fn check(selected: &str, internal_ips: &[&str], expected: &[&str]) {
        let addresses = selected.parse().expect("a value of the flag");
        let selection = Selection { addresses, on_loopback: true, primary: None };
        check_selection(&selection, internal_ips, expected);
    }

    /// The node has two devices, a bridge of pods and a veth of a pod.
    #[track_caller]
    fn check_selection(selection: &Selection, internal_ips: &[&str], expected: &[&str]) {
        let own = ["192.0.2.10", "2001:db8::10", "198.51.100.7", "10.0.0.1"];
        let network = NodeNetwork {
            addresses: ips(&own),
            pod_side_addresses: ips(&["10.0.9.9"]),
            default_sources: ips(&["198.51.100.7", "2001:db8::10"]),
            ..NodeNetwork::default()
        };
        let found = addresses(selection, &ips(internal_ips), &network);
        assert_eq!(found, ips(expected).into_iter().collect());
    }

    #[test]
    fn primary_is_the_first_internal_ip_of_each_family_that_the_node_has() {
        let both = ["192.0.2.10", "198.51.100.7", "2001:db8::10"];
        check("primary", &both, &["192.0.2.10", "2001:db8::10", "127.0.0.1", "::1"]);
        check("primary", &["198.51.100.7"], &["198.51.100.7", "127.0.0.1", "::1"]);
        check("primary", &["203.0.113.1", "192.0.2.10"], &["127.0.0.1", "::1"]);
    }

    #[test]
    fn another_primary_address_may_be_named_and_loopback_turned_off() {
        let mut selection = Selection {
            addresses: NodePortAddresses::Primary,
            on_loopback: false,
            primary: "198.51.100.7".parse().ok(),
        };
        let both = ["192.0.2.10", "2001:db8::10"];
        check_selection(&selection, &both, &["198.51.100.7", "2001:db8::10"]);
        check_selection(&selection, &[], &["198.51.100.7", "2001:db8::10"]);
        selection.primary = "2001:db8::99".parse().ok();
        check_selection(&selection, &both, &["192.0.2.10"]);
        selection.addresses = "127.0.0.0/8, ::1/128".parse().expect("a value of the flag");
        check_selection(&selection, &both, &[]);
    }

    #[test]
    fn without_a_node_object_the_source_of_the_default_route_is_primary() {
        check("primary", &[], &["198.51.100.7", "2001:db8::10", "127.0.0.1", "::1"]);
    }

    #[test]
    fn ranges_select_among_the_addresses_that_are_no_pod_s() {
        check("0.0.0.0/0", &[], &["192.0.2.10", "198.51.100.7", "10.0.0.1", "127.0.0.1"]);
        check("192.0.2.0/24, 2001:db8::/32", &[], &["192.0.2.10", "2001:db8::10"]);
        check("192.0.2.11/32", &["192.0.2.10"], &[]);
        check("10.0.0.0/8, ::1/128", &[], &["10.0.0.1", "::1"]);
    }
}
