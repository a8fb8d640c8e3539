use std::{collections::BTreeSet, sync::Arc};

use super::*;
use crate::{cli::run::ExternalMode, snapshot::nodes::Nodes};

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
        nodes: &Nodes::default(),
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
        nodes: &Nodes::default(),
        external_mode: ExternalMode::Snat,
    };
    let endpoints = [endpoint("r z=a"), endpoint("r z=b")];
    let sets = choose(&endpoints.iter().collect::<Vec<_>>(), CLUSTER, nowhere);
    assert_eq!(sets, [IN_CLUSTER_SET; 2]);
}

/// The cases of a flow-vector file: `LB_VECTORS=FILE cargo test -- --ignored vectors`.
#[test]
#[ignore = "needs a file of vectors in LB_VECTORS"]
fn vectors_of_endpoint_selection_agree() {
    let path = std::env::var("LB_VECTORS").expect("LB_VECTORS names a file of vectors");
    let text = std::fs::read_to_string(&path).expect("the file can be read");
    let file: serde_json::Value = serde_json::from_str(&text).expect("the file is JSON");
    let cases = file["endpointSelection"].as_array().expect("a list of cases");
    assert!(!cases.is_empty());
    let differing: Vec<_> = cases.iter().filter_map(|case| vector(case).err()).collect();
    assert!(differing.is_empty(), "{} of {}: {differing:#?}", differing.len(), cases.len());
}

fn vector(case: &serde_json::Value) -> Result<(), String> {
    let flag = |value: &serde_json::Value| value.as_bool().unwrap_or_default();
    let service = &case["service"];
    let policy = Policy {
        internal_local: flag(&service["internalTrafficPolicyLocal"]),
        external_local: flag(&service["externalTrafficPolicyLocal"]),
        externally_reachable: flag(&service["externallyAccessible"]),
    };
    // The local set of tunnelled packets is none of kube-proxy's.
    let is_kept_here =
        policy.internal_local || (policy.external_local && policy.externally_reachable);
    if policy.uses_cluster_set() != flag(&service["usesClusterEndpoints"])
        || is_kept_here != flag(&service["usesLocalEndpoints"])
    {
        return Err(format!("{}: uses other sets", case["name"]));
    }
    let strings = |value: &serde_json::Value| -> Vec<Box<str>> {
        value
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|text| text.as_str().map(Into::into))
            .collect()
    };
    let reads_nodes = flag(&case["preferSameTrafficDistributionEnabled"]);
    let mut names = Vec::new();
    let mut endpoints = Vec::new();
    for given in case["endpoints"].as_array().into_iter().flatten() {
        let nodes = if reads_nodes { strings(&given["forNodes"]) } else { Vec::new() };
        let hints = Hints { nodes, zones: strings(&given["forZones"]) };
        let name = given["endpoint"].as_str().unwrap_or_default();
        let address: std::net::SocketAddr = name.parse().map_err(|_| name.to_owned())?;
        names.push(name);
        endpoints.push(Endpoint {
            address: address.ip(),
            is_ready: flag(&given["ready"]),
            is_serving: flag(&given["serving"]),
            is_terminating: flag(&given["terminating"]),
            is_local: flag(&given["isLocal"]),
            node: None,
            hints: Some(Arc::new(hints)),
        });
    }
    let addresses = BTreeSet::new();
    let zone = case["nodeLabels"]["topology.kubernetes.io/zone"].as_str();
    let locality = Locality {
        node: case["nodeName"].as_str().unwrap_or_default(),
        zone: zone.filter(|zone| !zone.is_empty()),
        addresses: &addresses,
        node_port_addresses: &addresses,
        nodes: &Nodes::default(),
        external_mode: ExternalMode::Snat,
    };
    let sets = choose(&endpoints.iter().collect::<Vec<_>>(), policy, locality);
    let of = |bits: u8| -> BTreeSet<&str> {
        let chosen = names.iter().zip(&sets).filter(|(_, sets)| **sets & bits != 0);
        chosen.map(|(name, _)| *name).collect()
    };
    let expected = |field: &str| -> BTreeSet<&str> {
        let list = case["expect"][field].as_array().into_iter().flatten();
        list.filter_map(serde_json::Value::as_str).collect()
    };
    let cluster = if policy.uses_cluster_set() { IN_CLUSTER_SET } else { 0 };
    let local = if is_kept_here { IN_LOCAL_SET } else { 0 };
    let rows = [
        ("clusterEndpoints", of(cluster)),
        ("localEndpoints", of(local)),
        ("allLocallyReachableEndpoints", of(cluster | local)),
    ];
    for (field, chosen) in rows {
        if chosen != expected(field) {
            return Err(format!("{}: {field} {chosen:?} != {:?}", case["name"], expected(field)));
        }
    }
    let has_any = sets.iter().any(|sets| sets & IN_CLUSTER_SET != 0);
    if has_any != flag(&case["expect"]["hasAnyEndpoints"]) {
        return Err(format!("{}: hasAnyEndpoints {has_any}", case["name"]));
    }
    Ok(())
}
