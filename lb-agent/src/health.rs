//! Whether this proxy keeps up, and the servers that say so.
//!
//! The state takes time as an argument and reads no clock; [`server`] does. Invariant:
//! before the first complete state is in the maps nothing is healthy. Beside the servers of
//! the proxy as a whole, a Service can ask for one of its own: [`health_checks`](lb_control::desired::health_checks), [`listeners`].

mod http;
pub mod listeners;
mod reply;
pub mod server;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use serde::Serialize;

/// The taint of a node that is about to be removed.
const TO_BE_DELETED_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// The state of the proxy, shared by those who change it and those who show it.
#[derive(Clone, Debug)]
pub struct Health(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    update_timeout: Duration,
    last_updated: Option<Timestamp>,
    oldest_queued: Option<Timestamp>,
    node_eligible: bool,
    faults: BTreeMap<&'static str, String>,
}

impl Health {
    /// A proxy that has done nothing yet, on a node that is eligible until told otherwise.
    pub fn new(update_timeout: Duration) -> Self {
        Self(Arc::new(Mutex::new(State {
            update_timeout,
            last_updated: None,
            oldest_queued: None,
            node_eligible: true,
            faults: BTreeMap::new(),
        })))
    }

    /// A change waits to be programmed, from `now` on if none waited before.
    pub fn queued_update(&self, now: Timestamp) {
        self.state().oldest_queued.get_or_insert(now);
    }

    /// Everything known at `now` is in the maps.
    pub fn updated(&self, now: Timestamp) {
        let mut state = self.state();
        state.last_updated = Some(now);
        state.oldest_queued = None;
    }

    /// Whether load balancers may send to this node; see [`is_eligible`].
    pub fn node_eligible(&self, eligible: bool) {
        self.state().node_eligible = eligible;
    }

    /// Something that makes the proxy unhealthy until it is over (`None`), as a program
    /// that is not attached any more or a map that is full.
    pub fn fault(&self, what: &'static str, detail: Option<String>) {
        let mut state = self.state();
        let changed = match detail {
            Some(detail) => state.faults.insert(what, detail.clone()) != Some(detail),
            None => {
                if state.faults.remove(what).is_some() {
                    tracing::info!(what, "fault is over");
                }
                false
            }
        };
        if changed {
            let detail = state.faults.get(what).map(String::as_str);
            tracing::warn!(what, detail, "unhealthy");
        }
    }

    /// What is to be said at `now`.
    pub fn report(&self, now: Timestamp) -> Report {
        let state = self.state();
        let waited_too_long = state.oldest_queued.is_some_and(|queued| {
            now.duration_since(queued).unsigned_abs() >= state.update_timeout && now > queued
        });
        let healthy = state.last_updated.is_some() && !waited_too_long && state.faults.is_empty();
        let last_updated = state.last_updated.unwrap_or(NEVER);
        let family = FamilyReport { last_updated, healthy };
        Report {
            last_updated,
            current_time: now,
            node_eligible: Some(state.node_eligible),
            healthy,
            status: BTreeMap::from([("IPv4", family), ("IPv6", family)]),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a time that has not come yet is written: as Go writes its zero time.
const NEVER: Timestamp = Timestamp::constant(-62_135_596_800, 0);

/// What `/healthz` and `/livez` answer, in the form of kube-proxy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// When everything known was last in the maps.
    pub last_updated: Timestamp,
    /// The time of the report.
    pub current_time: Timestamp,
    /// Whether load balancers may send to this node; absent on `/livez`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_eligible: Option<bool>,
    /// Whether the proxy keeps up.
    pub healthy: bool,
    /// The same for each family; both are one here.
    pub status: BTreeMap<&'static str, FamilyReport>,
}

/// The part of one family in a [`Report`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FamilyReport {
    /// As in [`Report`].
    pub last_updated: Timestamp,
    /// As in [`Report`].
    pub healthy: bool,
}

/// Whether load balancers may send to a node: it exists, is not being deleted and not
/// about to be. Without an API server there need be no Node, and nobody should ask.
pub fn is_eligible(node: Option<&Node>) -> bool {
    let Some(node) = node else { return false };
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    node.metadata.deletion_timestamp.is_none()
        && !taints.iter().any(|taint| taint.key == TO_BE_DELETED_TAINT)
}

#[cfg(test)]
mod tests;
