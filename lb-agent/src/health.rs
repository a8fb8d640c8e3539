//! The health of this proxy, and the servers that report it.
//!
//! [`Health`] takes the time that it reports as an argument; how long a change waits is measured by
//! the monotonic clock, so a step of the node's time is no fault. Invariant: the proxy
//! is unhealthy until the first complete state is in the maps. Besides the servers of the proxy
//! as a whole, a Service can have one of its own:
//! [`health_checks`](lb_control::desired::health_checks), [`listeners`].

mod connections;
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
use tokio::time::Instant;

use crate::metrics::Faults;

/// The taint of a node that the cluster autoscaler is about to remove.
const TO_BE_DELETED_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// The health of the proxy; clones share it.
#[derive(Clone, Debug)]
pub struct Health(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    update_timeout: Duration,
    last_updated: Option<Timestamp>,
    /// The oldest change that is not in the maps: when it came, by both clocks.
    oldest_queued: Option<(Timestamp, Instant)>,
    node_eligible: bool,
    faults: BTreeMap<&'static str, (Severity, String)>,
    /// The faults by their part, as a metric.
    gauge: Faults,
}

/// What a fault means for the answers of the health servers. What is true of all nodes at once, or
/// what a restart of the agent does not cure, must take no node out of its load balancers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Nothing: what works goes on, and `status` and `lb_faults` show it.
    Degraded,
    /// Nothing; but it goes on until somebody corrects the configuration, so the log has an error.
    Misconfigured,
    /// `/healthz` answers 503.
    NotReady,
    /// `/healthz`, `/livez` and health check node ports answer 503.
    Unhealthy,
}

impl Health {
    /// A proxy that has not programmed anything yet, on an eligible node. It becomes unhealthy
    /// if a change waits for `update_timeout`.
    pub fn new(update_timeout: Duration) -> Self {
        Self(Arc::new(Mutex::new(State {
            update_timeout,
            last_updated: None,
            oldest_queued: None,
            node_eligible: true,
            faults: BTreeMap::new(),
            gauge: Faults::default(),
        })))
    }

    /// The metric of the faults.
    pub fn with_gauge(self, gauge: Faults) -> Self {
        self.state().gauge = gauge;
        self
    }

    /// Records that a change has been waiting since `now` to be programmed, unless an older one
    /// is waiting.
    pub fn queued_update(&self, now: Timestamp) {
        self.state().oldest_queued.get_or_insert((now, Instant::now()));
    }

    /// Records that the maps contain all changes known at `now`.
    pub fn updated(&self, now: Timestamp) {
        let mut state = self.state();
        state.last_updated = Some(now);
        state.oldest_queued = None;
    }

    /// Sets whether load balancers may send to this node; see [`is_eligible`].
    pub fn set_node_eligible(&self, eligible: bool) {
        self.state().node_eligible = eligible;
    }

    /// Sets (`Some`) or clears (`None`) a fault of a part that makes the proxy unhealthy, such as
    /// a program that was detached and cannot be attached again.
    pub fn set_fault(&self, part: &'static str, detail: Option<String>) {
        self.set(part, Severity::Unhealthy, detail);
    }

    /// Sets (`Some`) or clears (`None`) a fault of a part.
    pub fn set(&self, part: &'static str, severity: Severity, detail: Option<String>) {
        let mut state = self.state();
        let Some(detail) = detail else {
            if state.faults.remove(part).is_some() {
                state.gauge.get_or_create(&[("part", part)]).set(0);
                tracing::info!(part, "recovered");
            }
            return;
        };
        let fault = (severity, detail);
        if state.faults.get(part) == Some(&fault) {
            return;
        }
        let detail = &fault.1;
        match severity {
            Severity::Degraded => tracing::warn!(part, detail, "degraded: what works goes on"),
            Severity::Misconfigured => tracing::error!(part, detail, "wrong configuration"),
            Severity::NotReady => tracing::warn!(part, detail, "not ready: /healthz answers 503"),
            Severity::Unhealthy => tracing::warn!(part, detail, "unhealthy"),
        }
        state.gauge.get_or_create(&[("part", part)]).set(1);
        state.faults.insert(part, fault);
    }

    /// The health at `now`.
    pub fn report(&self, now: Timestamp) -> Report {
        let state = self.state();
        let waited_too_long =
            state.oldest_queued.is_some_and(|(_, since)| since.elapsed() >= state.update_timeout);
        let worst = state.faults.values().map(|(severity, _)| *severity).max();
        let healthy = state.last_updated.is_some()
            && !waited_too_long
            && worst.is_none_or(|worst| worst < Severity::Unhealthy);
        let last_updated = state.last_updated.unwrap_or(NEVER);
        let family = FamilyReport { last_updated, healthy };
        Report {
            last_updated,
            current_time: now,
            node_eligible: Some(state.node_eligible),
            healthy,
            is_ready: worst.is_none_or(|worst| worst < Severity::NotReady),
            status: BTreeMap::from([("IPv4", family), ("IPv6", family)]),
        }
    }

    /// The health at `now`, and why.
    pub fn details(&self, now: Timestamp) -> Details {
        let report = self.report(now);
        let healthy = report.healthy && report.is_ready;
        let state = self.state();
        let faults = state.faults.iter();
        let faults = faults.map(|(part, (_, text))| ((*part).to_owned(), text.clone()));
        Details {
            healthy,
            last_updated: state.last_updated,
            waiting_since: state.oldest_queued.map(|(at, _)| at),
            faults: faults.collect(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The health, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Details {
    /// Whether the proxy is healthy and ready.
    pub healthy: bool,
    /// When the maps last contained all known changes.
    pub last_updated: Option<Timestamp>,
    /// Since when a change has been waiting.
    pub waiting_since: Option<Timestamp>,
    /// The faults, by their part.
    pub faults: BTreeMap<String, String>,
}

/// Go's zero time, which kube-proxy reports before the first update.
const NEVER: Timestamp = Timestamp::constant(-62_135_596_800, 0);

/// The body of `/healthz` and `/livez`, in the form of kube-proxy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// When the maps last contained all known changes.
    pub last_updated: Timestamp,
    /// The time of the report.
    pub current_time: Timestamp,
    /// Whether load balancers may send to this node; absent on `/livez`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_eligible: Option<bool>,
    /// Whether the proxy is healthy.
    pub healthy: bool,
    /// Whether `/healthz` may answer 200 if the proxy is healthy.
    #[serde(skip)]
    pub is_ready: bool,
    /// The same for each IP family; lb programs both together, so they are equal.
    pub status: BTreeMap<&'static str, FamilyReport>,
}

/// The part of a [`Report`] about one IP family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FamilyReport {
    /// As in [`Report`].
    pub last_updated: Timestamp,
    /// As in [`Report`].
    pub healthy: bool,
}

/// Whether load balancers may send to a node: it exists, is not being deleted, and is not
/// about to be removed. Only meaningful with an API server: manifests need not have a Node.
pub fn is_eligible(node: Option<&Node>) -> bool {
    let Some(node) = node else { return false };
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    node.metadata.deletion_timestamp.is_none()
        && !taints.iter().any(|taint| taint.key == TO_BE_DELETED_TAINT)
}

#[cfg(test)]
mod tests;
