//! The metrics of the agent: those of kube-proxy that dashboards read, and its own.
//! `docs/metrics.md` lists all.
//!
//! There is no global registry: code that counts has a [`Metrics`]. The programs' counters are
//! read from the maps at each scrape ([`DatapathStats`]).

#[cfg(test)]
mod alerts;
pub mod format;
mod kube_proxy;
mod process;
mod scrape;

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use jiff::Timestamp;
use lb_common::{
    abi::{
        counter::{Hook, Reason},
        flow_table::EVENTS,
    },
    flow_table::Class,
};
use lb_control::{model::IpFamily, plan::Map};
use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::Registry,
};

use crate::{
    events::Refusals,
    report::PortUse,
    watch::{api::Liveness, manifests::Problems},
};

use format::Format;
use kube_proxy::KubeProxy;
use process::OfProcess;
use scrape::OnScrape;

/// Figures that are read from the maps at each scrape.
pub trait DatapathStats: fmt::Debug + Send + Sync + 'static {
    /// How often each hook ended with each reason, summed over all CPUs; 0 for reasons without a case.
    fn counters(&self) -> Vec<(Hook, Reason, u64)>;
    /// Name, used entries and capacity of each map.
    fn map_fill(&self) -> Vec<(&'static str, u64, u64)>;
    /// The number of flows by family and class.
    fn flows(&self) -> Vec<(IpFamily, Class, u64)>;
    /// The backends to which most source ports are in use, if they are many.
    fn source_ports(&self) -> Vec<PortUse>;
    /// How many flows were inserted, then how many were evicted, by class.
    fn flow_events(&self) -> Option<[u64; EVENTS]>;
}

type Code = [(&'static str, String); 1];

/// The faults of the agent, by the part that has one.
pub type Faults = Family<[(&'static str, &'static str); 1], Gauge>;

/// The metrics; clones share them.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    started_at: Timestamp,
    kube_proxy: KubeProxy,
    services: Gauge,
    frontends: Gauge,
    endpoints: Gauge,
    kube_proxy_rules: Gauge,
    missing_pins: Gauge,
    misplaced_programs: Gauge,
    restored_pins: Counter,
    faults: Faults,
    attach_failures: Counter,
    netlink_overruns: Counter,
    shortages: Family<Code, Gauge>,
    datapath: Arc<OnceLock<Arc<dyn DatapathStats>>>,
    problems: Arc<OnceLock<Problems>>,
    liveness: Arc<OnceLock<Liveness>>,
    refusals: Arc<OnceLock<Refusals>>,
}

/// The kind of object that changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A Service.
    Service,
    /// An EndpointSlice.
    Endpoint,
}

impl Metrics {
    /// Metrics with all counters at zero.
    pub fn new() -> Self {
        let mut inner = Inner {
            registry: Registry::default(),
            started_at: Timestamp::now(),
            kube_proxy: KubeProxy::default(),
            services: Gauge::default(),
            frontends: Gauge::default(),
            endpoints: Gauge::default(),
            kube_proxy_rules: Gauge::default(),
            missing_pins: Gauge::default(),
            misplaced_programs: Gauge::default(),
            restored_pins: Counter::default(),
            faults: Faults::default(),
            attach_failures: Counter::default(),
            netlink_overruns: Counter::default(),
            shortages: Family::default(),
            datapath: Arc::default(),
            problems: Arc::default(),
            liveness: Arc::default(),
            refusals: Arc::default(),
        };
        let mut registry = Registry::default();
        inner.kube_proxy.register(&mut registry);
        inner.register_own(&mut registry);
        inner.registry = registry;
        Self(Arc::new(inner))
    }

    /// When the counters started at zero.
    pub fn started_at(&self) -> Timestamp {
        self.0.started_at
    }

    /// Sets the source of the programs' counters and the maps' fill levels.
    pub fn set_datapath(&self, datapath: Arc<dyn DatapathStats>) {
        if self.0.datapath.set(datapath).is_err() {
            tracing::debug!("the metrics already have a datapath");
        }
    }

    /// The backends whose source ports run out, as of the last sweep.
    pub fn source_ports(&self) -> Vec<PortUse> {
        self.0.datapath.get().map(|datapath| datapath.source_ports()).unwrap_or_default()
    }

    /// Sets the source of the number of errors in manifests.
    pub fn set_problems(&self, problems: Problems) {
        if self.0.problems.set(problems).is_err() {
            tracing::debug!("the metrics already have a list of problems");
        }
    }

    /// Sets the source of the number of refused objects.
    pub fn set_refusals(&self, refusals: &Refusals) {
        if self.0.refusals.set(refusals.clone()).is_err() {
            tracing::debug!("the metrics already have a list of refused objects");
        }
    }

    /// Counts `count` changes that arrived at `now` and wait to be programmed.
    pub fn queued(&self, change: Change, count: usize, now: Timestamp) {
        self.0.kube_proxy.queued(change, count, now);
    }

    /// Records that the maps contained all waiting changes at `now`, after a sync that took
    /// `duration`.
    pub fn synced(&self, duration: Duration, now: Timestamp) {
        self.0.kube_proxy.synced(duration, now);
    }

    /// Records that no change waits to be programmed, without a sync.
    pub fn nothing_pending(&self) {
        self.0.kube_proxy.nothing_pending();
    }

    /// Sets the source of the figures of watches.
    pub fn set_liveness(&self, liveness: Liveness) {
        if self.0.liveness.set(liveness).is_err() {
            tracing::debug!("the metrics already have the figures of watches");
        }
    }

    /// Records the time that a change of endpoints took from its cause in the cluster to the
    /// maps.
    pub fn programmed(&self, family: IpFamily, duration: Duration) {
        self.0.kube_proxy.programmed(family, duration);
    }

    /// Sets the number of service ports with endpoints, but without the local endpoint that
    /// their internal or external policy requires.
    pub fn set_no_local_endpoints(&self, family: IpFamily, internal: usize, external: usize) {
        self.0.kube_proxy.set_no_local_endpoints(family, internal, external);
    }

    /// Sets the numbers of services, frontends and endpoints that are programmed.
    pub fn set_programmed_objects(&self, services: usize, frontends: usize, endpoints: usize) {
        self.0.services.set(services as i64);
        self.0.frontends.set(frontends as i64);
        self.0.endpoints.set(endpoints as i64);
    }

    /// Sets whether rules of kube-proxy are on the node.
    pub fn set_kube_proxy_rules(&self, exist: bool) {
        self.0.kube_proxy_rules.set(exist.into());
    }

    /// Sets how many pins are missing.
    pub fn set_missing_pins(&self, pins: usize) {
        self.0.missing_pins.set(pins as i64);
    }

    /// Sets how many programs of others are on the wrong side of lb's.
    pub fn set_misplaced_programs(&self, programs: usize) {
        self.0.misplaced_programs.set(programs as i64);
    }

    /// Sets how many Services do not fit into each map.
    pub fn set_shortages(&self, of_maps: impl Iterator<Item = (Map, usize)>) {
        for (map, count) in of_maps {
            let labels = [("map", map.name().to_owned())];
            self.0.shortages.get_or_create(&labels).set(count as i64);
        }
    }

    /// Counts pins that were made again.
    pub fn pins_restored(&self, pins: usize) {
        self.0.restored_pins.inc_by(pins as u64);
    }

    /// The gauge of faults.
    pub fn faults(&self) -> Faults {
        self.0.faults.clone()
    }

    /// Counts a program that could not be attached.
    pub fn attach_failed(&self) {
        self.0.attach_failures.inc();
    }

    /// Counts a loss of netlink messages.
    pub fn netlink_overran(&self) {
        self.0.netlink_overruns.inc();
    }

    /// Counts an answer of `/healthz` by its status code.
    pub fn healthz_answered(&self, code: u16) {
        self.0.kube_proxy.healthz_answered(code);
    }

    /// Counts an answer of `/livez` by its status code.
    pub fn livez_answered(&self, code: u16) {
        self.0.kube_proxy.livez_answered(code);
    }

    /// All metrics as text.
    ///
    /// # Errors
    /// If a collector fails to write.
    pub fn encode(&self, format: Format) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.0.registry)?;
        Ok(match format {
            Format::OpenMetrics => text,
            Format::Plain => format::plain(&text),
        })
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Inner {
    fn register_own(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(OfProcess));
        registry.register_collector(Box::new(OnScrape {
            datapath: Arc::clone(&self.datapath),
            problems: Arc::clone(&self.problems),
            liveness: Arc::clone(&self.liveness),
            refusals: Arc::clone(&self.refusals),
        }));
        let own = registry.sub_registry_with_prefix("lb");
        own.register(
            "build",
            "Version of the agent and of the layout of its maps",
            Info::new(build()),
        );
        own.register("services", "Used entries of the map SERVICES", self.services.clone());
        own.register(
            "frontends",
            "Frontends programmed: addresses and ports that clients connect to",
            self.frontends.clone(),
        );
        own.register(
            "endpoints",
            "Backends programmed: endpoints of all service ports",
            self.endpoints.clone(),
        );
        own.register(
            "kube_proxy_rules",
            "Whether rules of kube-proxy are on this node",
            self.kube_proxy_rules.clone(),
        );
        own.register(
            "missing_pins",
            "Pins of this agent that were removed and cannot be made again",
            self.missing_pins.clone(),
        );
        own.register(
            "misplaced_programs",
            "Programs of others that see packets of Services with the addresses of backends",
            self.misplaced_programs.clone(),
        );
        own.register(
            "shortages",
            "Services that do not fit into a map, or whose namespace has its share of it",
            self.shortages.clone(),
        );
        own.register(
            "restored_pins",
            "Pins of this agent that were removed and made again",
            self.restored_pins.clone(),
        );
        own.register("faults", "Whether a part of the agent has a fault", self.faults.clone());
        own.register(
            "attach_failures",
            "Attempts to attach a program that failed",
            self.attach_failures.clone(),
        );
        own.register(
            "netlink_overruns",
            "Times that messages about interfaces were dropped and everything was read again",
            self.netlink_overruns.clone(),
        );
    }
}

fn build() -> Vec<(&'static str, String)> {
    vec![
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("abi", lb_common::abi::ABI_VERSION.to_string()),
    ]
}

#[cfg(test)]
mod tests;
