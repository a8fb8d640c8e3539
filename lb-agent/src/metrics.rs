//! The metrics of the agent: those of kube-proxy that dashboards read, and its own, all of
//! which `docs/metrics.md` lists.
//!
//! There is no global registry: whoever counts is given a [`Metrics`]. What the
//! programs count is read when somebody asks ([`DatapathStats`]).

pub mod format;
mod kube_proxy;
mod scrape;

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use jiff::Timestamp;
use lb_common::abi::counter::{Hook, Reason};
use lb_control::model::IpFamily;
use prometheus_client::{
    encoding::text::encode,
    metrics::{gauge::Gauge, info::Info},
    registry::Registry,
};

use crate::watch::manifests::Problems;

use format::Format;
use kube_proxy::KubeProxy;
use scrape::OnScrape;

/// What the maps say when they are asked.
pub trait DatapathStats: fmt::Debug + Send + Sync + 'static {
    /// How often programs ended for each reason, over all CPUs.
    fn counters(&self) -> Vec<(Hook, Reason, u64)>;
    /// For each map its name, used entries and capacity.
    fn map_fill(&self) -> Vec<(&'static str, u64, u64)>;
}

type Code = [(&'static str, String); 1];

/// The metrics; clones count together.
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
        let mut inner = Inner {
            registry: Registry::default(),
            started_at: Timestamp::now(),
            kube_proxy: KubeProxy::default(),
            services: Gauge::default(),
            frontends: Gauge::default(),
            endpoints: Gauge::default(),
            datapath: Arc::default(),
            problems: Arc::default(),
        };
        let mut registry = Registry::default();
        inner.kube_proxy.register(&mut registry);
        inner.register_own(&mut registry);
        inner.registry = registry;
        Self(Arc::new(inner))
    }

    /// Since when they count.
    pub fn started_at(&self) -> Timestamp {
        self.0.started_at
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

    /// So many changes arrived at `now` and wait to be programmed.
    pub fn queued(&self, change: Change, count: usize, now: Timestamp) {
        self.0.kube_proxy.queued(change, count, now);
    }

    /// Everything that waited was in the maps at `now`, after work of `duration`.
    pub fn synced(&self, duration: Duration, now: Timestamp) {
        self.0.kube_proxy.synced(duration, now);
    }

    /// A change of endpoints took so long from its cause in the cluster to the maps.
    pub fn programmed(&self, family: IpFamily, duration: Duration) {
        self.0.kube_proxy.programmed(family, duration);
    }

    /// How many service ports have endpoints, but none here, where a policy wants one.
    pub fn no_local_endpoints(&self, family: IpFamily, internal: usize, external: usize) {
        self.0.kube_proxy.no_local_endpoints(family, internal, external);
    }

    /// How many services, front ends and endpoints are programmed.
    pub fn programmed_objects(&self, services: usize, frontends: usize, endpoints: usize) {
        self.0.services.set(services as i64);
        self.0.frontends.set(frontends as i64);
        self.0.endpoints.set(endpoints as i64);
    }

    /// `/healthz` answered with a status code.
    pub fn healthz_answered(&self, code: u16) {
        self.0.kube_proxy.healthz_answered(code);
    }

    /// `/livez` answered with a status code.
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
        registry.register_collector(Box::new(OnScrape {
            datapath: Arc::clone(&self.datapath),
            problems: Arc::clone(&self.problems),
        }));
        let own = registry.sub_registry_with_prefix("lb");
        own.register("build", "The version of the agent and of its maps", Info::new(build()));
        own.register("services", "Entries of SERVICES programmed", self.services.clone());
        own.register("frontends", "Front ends programmed", self.frontends.clone());
        own.register("endpoints", "Endpoints programmed", self.endpoints.clone());
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
