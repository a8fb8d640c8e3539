//! The metrics that kube-proxy has too, because dashboards and alerts read them.
//!
//! Names, types, labels, buckets and help texts are kube-proxy's. kube-proxy syncs each IP
//! family by itself; lb syncs both at once, so figures of a sync are recorded for both
//! families.

use std::{iter, sync::atomic::AtomicU64, time::Duration};

use jiff::Timestamp;
use lb_control::model::IpFamily;
use prometheus_client::{
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets, linear_buckets},
    },
    registry::{Metric, Registry},
};

use super::{Change, Code};

type OfFamily = [(&'static str, &'static str); 1];
type OfPolicy = [(&'static str, &'static str); 2];
type Seconds = Gauge<f64, AtomicU64>;
type Histograms = Family<OfFamily, Histogram, fn() -> Histogram>;

#[derive(Debug)]
pub(super) struct KubeProxy {
    sync_duration: Histograms,
    last_sync: Family<OfFamily, Seconds>,
    last_queued: Family<OfFamily, Seconds>,
    endpoint_changes: Counter,
    endpoint_changes_pending: Gauge,
    service_changes: Counter,
    service_changes_pending: Gauge,
    no_local_endpoints: Family<OfPolicy, Gauge>,
    programming_duration: Histograms,
    healthz: Family<Code, Counter>,
    livez: Family<Code, Counter>,
}

impl Default for KubeProxy {
    fn default() -> Self {
        Self {
            sync_duration: Family::new_with_constructor(sync_buckets),
            last_sync: Family::default(),
            last_queued: Family::default(),
            endpoint_changes: Counter::default(),
            endpoint_changes_pending: Gauge::default(),
            service_changes: Counter::default(),
            service_changes_pending: Gauge::default(),
            no_local_endpoints: Family::default(),
            programming_duration: Family::new_with_constructor(programming_buckets),
            healthz: Family::default(),
            livez: Family::default(),
        }
    }
}

impl KubeProxy {
    pub(super) fn queued(&self, change: Change, count: usize, now: Timestamp) {
        let (total, pending) = match change {
            Change::Service => (&self.service_changes, &self.service_changes_pending),
            Change::Endpoint => (&self.endpoint_changes, &self.endpoint_changes_pending),
        };
        total.inc_by(count as u64);
        pending.inc_by(count as i64);
        for family in IpFamily::ALL {
            self.last_queued.get_or_create(&of(family)).set(seconds(now));
        }
    }

    pub(super) fn synced(&self, duration: Duration, now: Timestamp) {
        for family in IpFamily::ALL {
            self.sync_duration.get_or_create(&of(family)).observe(duration.as_secs_f64());
            self.last_sync.get_or_create(&of(family)).set(seconds(now));
        }
        self.nothing_pending();
    }

    pub(super) fn nothing_pending(&self) {
        self.service_changes_pending.set(0);
        self.endpoint_changes_pending.set(0);
    }

    pub(super) fn programmed(&self, family: IpFamily, duration: Duration) {
        self.programming_duration.get_or_create(&of(family)).observe(duration.as_secs_f64());
    }

    pub(super) fn set_no_local_endpoints(
        &self,
        family: IpFamily,
        internal: usize,
        external: usize,
    ) {
        for (policy, count) in [("internal", internal), ("external", external)] {
            let labels = [("ip_family", family.name()), ("traffic_policy", policy)];
            self.no_local_endpoints.get_or_create(&labels).set(count as i64);
        }
    }

    pub(super) fn healthz_answered(&self, code: u16) {
        self.healthz.get_or_create(&[("code", code.to_string())]).inc();
    }

    pub(super) fn livez_answered(&self, code: u16) {
        self.livez.get_or_create(&[("code", code.to_string())]).inc();
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("kubeproxy");
        let sync = registry.sub_registry_with_prefix("sync_proxy_rules");
        alpha(sync, "duration_seconds", "SyncProxyRules latency in seconds", &self.sync_duration);
        let help = "The last time proxy rules were successfully synced";
        alpha(sync, "last_timestamp_seconds", help, &self.last_sync);
        let help = "The last time a sync of proxy rules was queued";
        alpha(sync, "last_queued_timestamp_seconds", help, &self.last_queued);
        let help = "Cumulative proxy rules Endpoint changes";
        alpha(sync, "endpoint_changes", help, &self.endpoint_changes);
        let help = "Pending proxy rules Endpoint changes";
        alpha(sync, "endpoint_changes_pending", help, &self.endpoint_changes_pending);
        let help = "Cumulative proxy rules Service changes";
        alpha(sync, "service_changes", help, &self.service_changes);
        let help = "Pending proxy rules Service changes";
        alpha(sync, "service_changes_pending", help, &self.service_changes_pending);
        let help = "Number of services with a Local traffic policy and no endpoints";
        alpha(sync, "no_local_endpoints_total", help, &self.no_local_endpoints);
        let help = "In Cluster Network Programming Latency in seconds";
        alpha(registry, "network_programming_duration_seconds", help, &self.programming_duration);
        alpha(registry, "proxy_healthz", "Cumulative proxy healthz HTTP status", &self.healthz);
        alpha(registry, "proxy_livez", "Cumulative proxy livez HTTP status", &self.livez);
    }
}

/// Registers a metric with the stability level that Kubernetes puts before a help text.
fn alpha(registry: &mut Registry, name: &str, help: &str, metric: &(impl Metric + Clone)) {
    registry.register(name, format!("[ALPHA] {help}"), metric.clone());
}

fn of(family: IpFamily) -> OfFamily {
    [("ip_family", family.name())]
}

fn seconds(time: Timestamp) -> f64 {
    time.as_microsecond() as f64 / 1e6
}

fn sync_buckets() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

/// kube-proxy's buckets: 0, quarters of a second up to half a second, seconds up to a minute,
/// five seconds up to two minutes, half minutes up to five minutes.
fn programming_buckets() -> Histogram {
    let quarters = linear_buckets(0.25, 0.25, 2);
    let seconds = linear_buckets(1.0, 1.0, 59);
    let fives = linear_buckets(60.0, 5.0, 12);
    let half_minutes = linear_buckets(120.0, 30.0, 7);
    let longer = quarters.chain(seconds).chain(fives).chain(half_minutes);
    Histogram::new(iter::once(0.0).chain(longer))
}
