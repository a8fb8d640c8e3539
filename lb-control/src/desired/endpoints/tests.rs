use std::{collections::BTreeSet, sync::Arc};

use super::*;
use crate::{options::ExternalMode, snapshot::nodes::NodeIndex};

const CLUSTER: Policy =
    Policy { internal_local: false, external_local: false, externally_reachable: false };
const INTERNAL_LOCAL: Policy = Policy { internal_local: true, ..CLUSTER };
const EXTERNAL_LOCAL: Policy =
    Policy { external_local: true, externally_reachable: true, ..CLUSTER };
/// Another node may send packets of its clients here.
const REACHABLE: Policy = Policy { externally_reachable: true, ..CLUSTER };
const UNREACHABLE_LOCAL: Policy = Policy { external_local: true, ..CLUSTER };

/// An endpoint from a few letters: `r`eady, `s`erving, `t`erminating, on this node (`h`),
/// then its hints: `n=NODE` and `z=ZONE`.
fn endpoint(text: &str) -> Endpoint {
    let mut words = text.split(' ');
    let letters = words.next().expect("split gives one word at least");
    let mut hints = Hints::default();
    for word in words {
        match word.split_once('=') {
            Some(("n", node)) => hints.nodes.push(node.into()),
            Some(("z", zone)) => hints.zones.push(zone.into()),
            _ => panic!("{word} is no hint"),
        }
    }
    Endpoint {
        address: [10, 0, 0, 1].into(),
        is_ready: letters.contains('r'),
        is_serving: letters.contains('s'),
        is_terminating: letters.contains('t'),
        is_local: letters.contains('h'),
        node: None,
        hints: (hints != Hints::default()).then(|| Arc::new(hints)),
    }
}

/// `expected` has a `c`luster and a `l`ocal letter for the sets of each endpoint.
#[track_caller]
fn check(policy: Policy, endpoints: &[&str], expected: &[&str]) {
    let addresses = BTreeSet::new();
    let here = Locality {
        node: "here",
        zone: Some("a"),
        addresses: &addresses,
        node_port_addresses: &addresses,
        nodes: &NodeIndex::default(),
        external_mode: ExternalMode::Snat,
    };
    let endpoints: Vec<_> = endpoints.iter().map(|text| endpoint(text)).collect();
    let references: Vec<_> = endpoints.iter().collect();
    let letters = |sets: u8| match sets {
        0 => "",
        IN_CLUSTER_SET => "c",
        IN_LOCAL_SET => "l",
        _ => "cl",
    };
    let chosen: Vec<_> = choose(&references, policy, here).into_iter().map(letters).collect();
    assert_eq!(chosen, expected);
}

#[test]
fn ready_endpoints_serve_whatever_their_other_conditions() {
    check(CLUSTER, &["rs", "s", "r", "st"], &["c", "", "c", ""]);
}

#[test]
fn serving_terminating_endpoints_serve_when_none_is_ready() {
    check(CLUSTER, &["s", "st", "t"], &["", "c", ""]);
    check(CLUSTER, &["s", "t", ""], &["", "", ""]);
    check(CLUSTER, &["st z=b", "st z=a"], &["c", "c"]);
}

#[test]
fn hints_for_this_node_win_over_those_for_the_zone() {
    check(CLUSTER, &["r n=here z=a", "r n=there z=a"], &["c", ""]);
    check(CLUSTER, &["r n=other z=a", "r n=there z=b"], &["c", ""]);
    check(CLUSTER, &["r n=other z=b", "r n=there z=b"], &["c", "c"]);
}

#[test]
fn hints_count_only_if_all_ready_endpoints_carry_them() {
    check(CLUSTER, &["r z=a", "r z=b"], &["c", ""]);
    check(CLUSTER, &["r z=a", "r"], &["c", "c"]);
    check(CLUSTER, &["r n=here", "r z=a"], &["c", "c"]);
    check(CLUSTER, &["r z=a", "r z=b", "s"], &["c", "", ""]);
    check(CLUSTER, &["r z=b z=a", "r z=b"], &["c", ""]);
    check(CLUSTER, &["s z=a", "r z=b"], &["", "c"]);
}

#[test]
fn the_local_set_is_of_this_node_and_ignores_hints() {
    check(INTERNAL_LOCAL, &["rh z=b", "r z=a"], &["l", "c"]);
    check(EXTERNAL_LOCAL, &["rh", "r"], &["cl", "c"]);
    check(UNREACHABLE_LOCAL, &["rh", "r"], &["c", "c"]);
    check(REACHABLE, &["rh z=b", "r z=a"], &["l", "c"]);
    check(REACHABLE, &["sth", "r", "h"], &["l", "c", ""]);
    check(CLUSTER, &["rh", "r"], &["c", "c"]);
    check(INTERNAL_LOCAL, &["r", "r"], &["c", "c"]);
}

#[test]
fn the_local_set_falls_back_by_itself() {
    check(EXTERNAL_LOCAL, &["r", "h", "sth", "st"], &["c", "", "l", ""]);
    check(INTERNAL_LOCAL, &["rh", "sth"], &["cl", ""]);
}

#[test]
fn without_a_zone_no_hint_for_zones_counts() {
    let addresses = BTreeSet::new();
    let nowhere = Locality {
        node: "here",
        zone: None,
        addresses: &addresses,
        node_port_addresses: &addresses,
        nodes: &NodeIndex::default(),
        external_mode: ExternalMode::Snat,
    };
    let endpoints = [endpoint("r z=a"), endpoint("r z=b")];
    let sets = choose(&endpoints.iter().collect::<Vec<_>>(), CLUSTER, nowhere);
    assert_eq!(sets, [IN_CLUSTER_SET; 2]);
}
