//! The metrics of the agent: those of kube-proxy that dashboards read, and its own.
//!
//! There is no global registry: whoever counts is given a [`Metrics`]. What the
//! programs count is read when somebody asks ([`DatapathStats`]).

use std::{
    fmt,
    sync::{Arc, OnceLock, atomic::AtomicU64},
    time::Duration,
};

use jiff::Timestamp;
use lb_common::abi::counter::{Hook, Reason};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text::encode},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::Registry,
};

use crate::watch::manifests::Problems;

/// What the maps say when they are asked.
pub trait DatapathStats: fmt::Debug + Send + Sync + 'static {
    /// How often programs ended for each reason, over all CPUs.
    fn counters(&self) -> Vec<(Hook, Reason, u64)>;
    /// For each map its name, used entries and capacity.
    fn map_fill(&self) -> Vec<(&'static str, u64, u64)>;
}

type Code = [(&'static str, String); 1];
type Policy = [(&'static str, &'static str); 1];

/// The metrics; clones count together.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    sync_duration: Histogram,
    last_sync: Gauge<f64, AtomicU64>,
    last_queued: Gauge<f64, AtomicU64>,
    endpoint_changes: Counter,
    endpoint_changes_pending: Gauge,
    service_changes: Counter,
    service_changes_pending: Gauge,
    no_local_endpoints: Family<Policy, Gauge>,
    programming_duration: Histogram,
    healthz: Family<Code, Counter>,
    livez: Family<Code, Counter>,
    services: Gauge,
    frontends: Gauge,
    endpoints: Gauge,
    datapath: Arc<OnceLock<Arc<dyn DatapathStats>>>,
    problems: Arc<OnceLock<Problems>>,
}

/// Whether a change was one of a Service or of endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A Service.
    Service,
    /// An EndpointSlice.
    Endpoint,
}

impl Metrics {
    /// Metrics that have counted nothing.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let datapath = Arc::<OnceLock<_>>::default();
        let problems = Arc::<OnceLock<_>>::default();
        register_build(&mut registry);
        registry.register_collector(Box::new(OnScrape {
            datapath: Arc::clone(&datapath),
            problems: Arc::clone(&problems),
        }));
        let kube = registry.sub_registry_with_prefix("kubeproxy");
        let sync_duration = Histogram::new(exponential_buckets(0.0001, 2.0, 18));
        let programming_duration = Histogram::new(exponential_buckets(0.001, 2.0, 18));
        let mut inner = Inner {
            sync_duration,
            programming_duration,
            last_sync: Gauge::default(),
            last_queued: Gauge::default(),
            endpoint_changes: Counter::default(),
            endpoint_changes_pending: Gauge::default(),
            service_changes: Counter::default(),
            service_changes_pending: Gauge::default(),
            no_local_endpoints: Family::default(),
            healthz: Family::default(),
            livez: Family::default(),
            services: Gauge::default(),
            frontends: Gauge::default(),
            endpoints: Gauge::default(),
            datapath,
            problems,
            registry: Registry::default(),
        };
        inner.register_sync(kube);
        inner.register_objects(registry.sub_registry_with_prefix("lb"));
        inner.registry = registry;
        Self(Arc::new(inner))
    }

    /// Where the programs' counters and the maps' fill levels are read from then on.
    pub fn set_datapath(&self, datapath: Arc<dyn DatapathStats>) {
        if self.0.datapath.set(datapath).is_err() {
            tracing::debug!("the metrics have a datapath already");
        }
    }

    /// Where the number of bad manifests is read from.
    pub fn set_problems(&self, problems: Problems) {
        if self.0.problems.set(problems).is_err() {
            tracing::debug!("the metrics have a list of problems already");
        }
    }

    /// A change arrived at `now` and waits to be programmed.
    pub fn queued(&self, change: Change, now: Timestamp) {
        let (total, pending) = match change {
            Change::Service => (&self.0.service_changes, &self.0.service_changes_pending),
            Change::Endpoint => (&self.0.endpoint_changes, &self.0.endpoint_changes_pending),
        };
        total.inc();
        pending.inc();
        self.0.last_queued.set(seconds(now));
    }

    /// Everything that waited was in the maps at `now`, after work of `duration`.
    pub fn synced(&self, duration: Duration, now: Timestamp) {
        self.0.sync_duration.observe(duration.as_secs_f64());
        self.0.last_sync.set(seconds(now));
        self.0.service_changes_pending.set(0);
        self.0.endpoint_changes_pending.set(0);
    }

    /// A change of endpoints took so long from its cause in the cluster to the maps.
    pub fn programmed(&self, duration: Duration) {
        self.0.programming_duration.observe(duration.as_secs_f64());
    }

    /// How many services have no endpoint here and a policy that wants one.
    pub fn no_local_endpoints(&self, internal: usize, external: usize) {
        for (policy, count) in [("internal", internal), ("external", external)] {
            let labels = [("traffic_policy", policy)];
            self.0.no_local_endpoints.get_or_create(&labels).set(count as i64);
        }
    }

    /// How many services, front ends and endpoints are programmed.
    pub fn programmed_objects(&self, services: usize, frontends: usize, endpoints: usize) {
        self.0.services.set(services as i64);
        self.0.frontends.set(frontends as i64);
        self.0.endpoints.set(endpoints as i64);
    }

    /// `/healthz` answered with a status code.
    pub fn healthz_answered(&self, code: u16) {
        self.0.healthz.get_or_create(&[("code", code.to_string())]).inc();
    }

    /// `/livez` answered with a status code.
    pub fn livez_answered(&self, code: u16) {
        self.0.livez.get_or_create(&[("code", code.to_string())]).inc();
    }

    /// All metrics as OpenMetrics text.
    ///
    /// # Errors
    /// If a collector fails to write.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.0.registry)?;
        Ok(text)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Inner {
    fn register_sync(&self, kube: &mut Registry) {
        let sync = "sync_proxy_rules";
        kube.register(
            format!("{sync}_duration_seconds"),
            "Time to bring changes into the maps",
            self.sync_duration.clone(),
        );
        kube.register(
            format!("{sync}_last_timestamp_seconds"),
            "When the maps last held everything",
            self.last_sync.clone(),
        );
        kube.register(
            format!("{sync}_last_queued_timestamp_seconds"),
            "When a change last arrived",
            self.last_queued.clone(),
        );
        kube.register(
            format!("{sync}_endpoint_changes"),
            "Changes of endpoints",
            self.endpoint_changes.clone(),
        );
        kube.register(
            format!("{sync}_endpoint_changes_pending"),
            "Changes of endpoints that are not in the maps yet",
            self.endpoint_changes_pending.clone(),
        );
        kube.register(
            format!("{sync}_service_changes"),
            "Changes of Services",
            self.service_changes.clone(),
        );
        kube.register(
            format!("{sync}_service_changes_pending"),
            "Changes of Services that are not in the maps yet",
            self.service_changes_pending.clone(),
        );
        kube.register(
            format!("{sync}_no_local_endpoints_total"),
            "Services whose policy is Local without an endpoint here",
            self.no_local_endpoints.clone(),
        );
        kube.register(
            "network_programming_duration_seconds",
            "Time from a change in the cluster to the maps",
            self.programming_duration.clone(),
        );
        kube.register("proxy_healthz", "Answers of /healthz", self.healthz.clone());
        kube.register("proxy_livez", "Answers of /livez", self.livez.clone());
    }

    fn register_objects(&self, own: &mut Registry) {
        own.register("services", "Service ports programmed", self.services.clone());
        own.register("frontends", "Front ends programmed", self.frontends.clone());
        own.register("endpoints", "Endpoints programmed", self.endpoints.clone());
    }
}

fn register_build(registry: &mut Registry) {
    let labels = vec![
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("abi", lb_common::abi::ABI_VERSION.to_string()),
    ];
    registry.register("lb_build", "The version of the agent and of its maps", Info::new(labels));
}

fn seconds(time: Timestamp) -> f64 {
    time.as_microsecond() as f64 / 1e6
}

/// Reads what others count, when somebody asks.
#[derive(Debug)]
struct OnScrape {
    datapath: Arc<OnceLock<Arc<dyn DatapathStats>>>,
    problems: Arc<OnceLock<Problems>>,
}

impl Collector for OnScrape {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        if let Some(problems) = self.problems.get() {
            let gauge = ConstGauge::new(problems.count() as i64);
            let help = "Faults in the manifests now";
            let out =
                encoder.encode_descriptor("lb_manifest_errors", help, None, gauge.metric_type())?;
            gauge.encode(out)?;
        }
        let Some(datapath) = self.datapath.get() else { return Ok(()) };
        let counter = ConstCounter::new(0_u64);
        let mut out = encoder.encode_descriptor(
            "lb_datapath_packets",
            "Packets and calls by hook and by why they went where they went",
            None,
            counter.metric_type(),
        )?;
        for (hook, reason, count) in datapath.counters() {
            let labels = [("hook", hook.name()), ("reason", reason.name())];
            ConstCounter::new(count).encode(out.encode_family(&labels)?)?;
        }
        let fill = datapath.map_fill();
        let used = fill.iter().map(|(map, used, _)| (*map, *used));
        encode_maps(&mut encoder, "lb_map_entries", "Used entries of a map", used)?;
        let capacity = fill.iter().map(|(map, _, capacity)| (*map, *capacity));
        encode_maps(&mut encoder, "lb_map_capacity", "Entries that a map can hold", capacity)
    }
}

fn encode_maps(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (&'static str, u64)>,
) -> Result<(), fmt::Error> {
    let kind = ConstGauge::new(0_i64).metric_type();
    let mut out = encoder.encode_descriptor(name, help, None, kind)?;
    for (map, value) in values {
        let value = i64::try_from(value).unwrap_or(i64::MAX);
        ConstGauge::new(value).encode(out.encode_family(&[("map", map)])?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Fake;

    impl DatapathStats for Fake {
        fn counters(&self) -> Vec<(Hook, Reason, u64)> {
            vec![(Hook::FromPod, Reason::FlowCreated, 3), (Hook::ToPod, Reason::Reply, 5)]
        }

        fn map_fill(&self) -> Vec<(&'static str, u64, u64)> {
            vec![("FLOWS4", 7, 1024), ("SERVICES", 1, 64)]
        }
    }

    #[test]
    fn the_metrics_have_their_names_types_and_values() {
        let metrics = Metrics::new();
        metrics.set_datapath(Arc::new(Fake));
        let now = Timestamp::from_millisecond(1_500).unwrap();
        metrics.queued(Change::Service, now);
        metrics.queued(Change::Endpoint, now);
        metrics.queued(Change::Endpoint, now);
        metrics.programmed_objects(1, 2, 3);
        metrics.no_local_endpoints(1, 0);
        let before = metrics.encode().unwrap();
        metrics.synced(Duration::from_millis(2), now);
        metrics.programmed(Duration::from_millis(20));
        let after = metrics.encode().unwrap();
        let build = format!("lb_build_info{{version=\"{}\"", env!("CARGO_PKG_VERSION"));
        for (text, line) in [
            (&before, "kubeproxy_sync_proxy_rules_endpoint_changes_pending 2"),
            (&before, "kubeproxy_sync_proxy_rules_service_changes_pending 1"),
            (&before, "# TYPE kubeproxy_sync_proxy_rules_duration_seconds histogram"),
            (&before, &build),
            (&after, "kubeproxy_sync_proxy_rules_endpoint_changes_total 2"),
            (&after, "kubeproxy_sync_proxy_rules_endpoint_changes_pending 0"),
            (&after, "kubeproxy_sync_proxy_rules_service_changes_total 1"),
            (&after, "kubeproxy_sync_proxy_rules_duration_seconds_count 1"),
            (&after, "kubeproxy_sync_proxy_rules_last_timestamp_seconds 1.5"),
            (&after, "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds 1.5"),
            (
                &after,
                "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"internal\"} 1",
            ),
            (&after, "kubeproxy_network_programming_duration_seconds_count 1"),
            (&after, "lb_services 1"),
            (&after, "lb_frontends 2"),
            (&after, "lb_endpoints 3"),
            (&after, "lb_datapath_packets_total{hook=\"from_pod\",reason=\"flow_created\"} 3"),
            (&after, "lb_datapath_packets_total{hook=\"to_pod\",reason=\"reply\"} 5"),
            (&after, "lb_map_entries{map=\"FLOWS4\"} 7"),
            (&after, "lb_map_capacity{map=\"FLOWS4\"} 1024"),
        ] {
            assert!(text.lines().any(|found| found.starts_with(line)), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn bad_manifests_are_counted_where_there_are_any() {
        let metrics = Metrics::new();
        assert!(!metrics.encode().unwrap().contains("lb_manifest_errors"));
        metrics.set_problems(Problems::default());
        assert!(metrics.encode().unwrap().contains("lb_manifest_errors 0"));
    }
}
