//! The selection of endpoints, by the function that the agent's desired state uses.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Result, ensure};
use lb_common::abi::backend::{IN_CLUSTER_SET, IN_LOCAL_SET};
use lb_control::desired::{Locality, endpoints};
use lb_control::model::service::Policy;
use lb_control::model::slice::{Endpoint, Hints};
use lb_control::options::ExternalMode;
use lb_control::snapshot::nodes::NodeIndex;

use super::format::{Candidate, Selection};

/// Selects endpoints and compares them with the case's.
///
/// # Errors
/// The selection differs.
pub(super) fn check(case: &Selection) -> Result<()> {
    let traits = &case.service;
    let policy = Policy {
        internal_local: traits.internal_traffic_policy_local,
        external_local: traits.external_traffic_policy_local,
        externally_reachable: traits.externally_accessible,
    };
    // lb gives a local set to every Service that other nodes may send encapsulated packets to.
    // kube-proxy has no such clients.
    let is_kept_here =
        policy.internal_local || (policy.external_local && policy.externally_reachable);
    ensure!(
        policy.uses_cluster_set() == traits.uses_cluster_endpoints
            && is_kept_here == traits.uses_local_endpoints,
        "the Service uses other sets than kube-proxy's"
    );
    let reads_nodes = case.prefer_same_traffic_distribution_enabled;
    let endpoints: Vec<Endpoint> =
        case.endpoints.iter().map(|given| endpoint(given, reads_nodes)).collect();
    const ZONE: &str = "topology.kubernetes.io/zone";
    let zone = case.node_labels.as_ref().and_then(|labels| labels.get(ZONE));
    let none = BTreeSet::new();
    let locality = Locality {
        node: &case.node_name,
        zone: zone.map(String::as_str).filter(|zone| !zone.is_empty()),
        addresses: &none,
        node_port_addresses: &none,
        nodes: &NodeIndex::default(),
        external_mode: ExternalMode::Snat,
    };
    let sets = endpoints::choose(&endpoints.iter().collect::<Vec<_>>(), policy, locality);
    let of = |bits: u8| -> BTreeSet<SocketAddr> {
        let chosen = case.endpoints.iter().zip(&sets).filter(|(_, sets)| **sets & bits != 0);
        chosen.map(|(given, _)| given.endpoint).collect()
    };
    let cluster = if policy.uses_cluster_set() { IN_CLUSTER_SET } else { 0 };
    let local = if is_kept_here { IN_LOCAL_SET } else { 0 };
    let expected = &case.expect;
    for (what, chosen, expected) in [
        ("clusterEndpoints", of(cluster), &expected.cluster_endpoints),
        ("localEndpoints", of(local), &expected.local_endpoints),
        (
            "allLocallyReachableEndpoints",
            of(cluster | local),
            &expected.all_locally_reachable_endpoints,
        ),
    ] {
        let expected = expected.iter().flatten().copied().collect::<BTreeSet<_>>();
        ensure!(chosen == expected, "{what}: expected {expected:?}, got {chosen:?}");
    }
    let has_any = sets.iter().any(|sets| sets & IN_CLUSTER_SET != 0);
    ensure!(has_any == expected.has_any_endpoints, "hasAnyEndpoints: got {has_any}");
    Ok(())
}

fn endpoint(given: &Candidate, reads_nodes: bool) -> Endpoint {
    let hints = Hints {
        nodes: given.for_nodes.clone().filter(|_| reads_nodes).unwrap_or_default(),
        zones: given.for_zones.clone().unwrap_or_default(),
    };
    Endpoint {
        address: given.endpoint.ip(),
        is_ready: given.ready,
        is_serving: given.serving,
        is_terminating: given.terminating,
        is_local: given.is_local,
        node: None,
        hints: (hints != Hints::default()).then(|| Arc::new(hints)),
    }
}
