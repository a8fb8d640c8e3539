//! Which endpoints serve clients: the choice of the cluster set and the local set.

use lb_common::abi::backend::{IN_CLUSTER_SET, IN_LOCAL_SET};

use super::Locality;
use crate::model::{
    service::Policy,
    slice::{Endpoint, Hints},
};

/// The sets that each endpoint of a service port is a member of, as in
/// [`Backend::sets`](lb_common::abi::backend::Backend::sets).
///
/// The cluster set is chosen even if the policy does not use it: whether it is empty
/// distinguishes "no endpoint anywhere" from "no endpoint on this node".
pub fn choose(endpoints: &[&Endpoint], policy: Policy, locality: Locality<'_>) -> Vec<u8> {
    let mut sets = vec![0; endpoints.len()];
    let hinted = hinted(endpoints, locality);
    let in_cluster = |endpoint: &Endpoint| {
        endpoint.is_ready && hinted.is_none_or(|names| names(endpoint, locality))
    };
    mark(&mut sets, endpoints, IN_CLUSTER_SET, in_cluster, is_serving_terminating);
    if policy.uses_local_set() {
        let ready = |endpoint: &Endpoint| endpoint.is_local && endpoint.is_ready;
        let draining = |endpoint: &Endpoint| endpoint.is_local && is_serving_terminating(endpoint);
        mark(&mut sets, endpoints, IN_LOCAL_SET, ready, draining);
    }
    sets
}

/// Adds `set` to the wanted endpoints, or to those of the fallback if none is wanted.
fn mark(
    sets: &mut [u8],
    endpoints: &[&Endpoint],
    set: u8,
    wanted: impl Fn(&Endpoint) -> bool,
    fallback: impl Fn(&Endpoint) -> bool,
) {
    let mut found = false;
    for (sets, endpoint) in sets.iter_mut().zip(endpoints) {
        if wanted(endpoint) {
            *sets |= set;
            found = true;
        }
    }
    if !found {
        for (sets, endpoint) in sets.iter_mut().zip(endpoints) {
            if fallback(endpoint) {
                *sets |= set;
            }
        }
    }
}

fn is_serving_terminating(endpoint: &Endpoint) -> bool {
    endpoint.is_serving && endpoint.is_terminating
}

/// Whether an endpoint's hints name this node, or its zone.
type HintTest = fn(&Endpoint, Locality<'_>) -> bool;

/// The hints by which the ready endpoints are filtered, if by any.
fn hinted(endpoints: &[&Endpoint], locality: Locality<'_>) -> Option<HintTest> {
    let ready = || endpoints.iter().filter(|endpoint| endpoint.is_ready);
    let all_carry = |has: fn(&Hints) -> bool| {
        ready().all(|endpoint| endpoint.hints.as_deref().is_some_and(has))
    };
    let one_names = |names: HintTest| ready().any(|endpoint| names(endpoint, locality));
    if all_carry(|hints| !hints.nodes.is_empty()) && one_names(names_node) {
        return Some(names_node);
    }
    if all_carry(|hints| !hints.zones.is_empty()) && one_names(names_zone) {
        return Some(names_zone);
    }
    None
}

fn names_node(endpoint: &Endpoint, locality: Locality<'_>) -> bool {
    let hints = endpoint.hints.as_deref();
    hints.is_some_and(|hints| hints.nodes.iter().any(|node| **node == *locality.node))
}

fn names_zone(endpoint: &Endpoint, locality: Locality<'_>) -> bool {
    let (hints, Some(zone)) = (endpoint.hints.as_deref(), locality.zone) else { return false };
    hints.is_some_and(|hints| hints.zones.iter().any(|name| **name == *zone))
}

#[cfg(test)]
mod tests;
