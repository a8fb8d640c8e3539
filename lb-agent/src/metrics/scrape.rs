//! Metrics whose values are read at each scrape.
//!
//! Nothing is cached: two scrapes at once read twice.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Instant,
};

use lb_common::{
    abi::counter::{self, Reason},
    flow_table::Class,
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

use super::DatapathStats;
use crate::{
    events::Refusals,
    report::PortUse,
    watch::{
        api::{Figures, Liveness},
        manifests::Problems,
    },
};

/// The sources that are read at each scrape, if they are set.
#[derive(Debug)]
pub(super) struct OnScrape {
    pub(super) datapath: Arc<OnceLock<Arc<dyn DatapathStats>>>,
    pub(super) problems: Arc<OnceLock<Problems>>,
    pub(super) liveness: Arc<OnceLock<Liveness>>,
    pub(super) refusals: Arc<OnceLock<Refusals>>,
}

impl Collector for OnScrape {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        if let Some(problems) = self.problems.get() {
            let gauge = ConstGauge::new(problems.count() as i64);
            let help = "Current errors in the files of --manifests";
            let out =
                encoder.encode_descriptor("lb_manifest_errors", help, None, gauge.metric_type())?;
            gauge.encode(out)?;
        }
        if let Some(liveness) = self.liveness.get() {
            encode_watches(&mut encoder, &liveness.figures(Instant::now()))?;
        }
        if let Some(refusals) = self.refusals.get() {
            encode_refusals(&mut encoder, refusals)?;
        }
        let Some(datapath) = self.datapath.get() else { return Ok(()) };
        let counter = ConstCounter::new(0_u64);
        let mut out = encoder.encode_descriptor(
            "lb_datapath_packets",
            &datapath_help(),
            None,
            counter.metric_type(),
        )?;
        // Alarms are there from the start: increase() does not see the step from nothing to 1.
        let is_shown = |reason: Reason, count| count > 0 || reason.class() == counter::Class::Alarm;
        for (hook, reason, count) in datapath.counters() {
            if !is_shown(reason, count) {
                continue;
            }
            let labels = [("hook", hook.name()), ("reason", reason.name())];
            ConstCounter::new(count).encode(out.encode_family(&labels)?)?;
        }
        let fill = datapath.map_fill();
        let used = fill.iter().map(|(map, used, _)| (*map, *used));
        encode_maps(
            &mut encoder,
            "lb_map_entries",
            "Used entries of a map, as of the last sweep",
            used,
        )?;
        let capacity = fill.iter().map(|(map, _, capacity)| (*map, *capacity));
        encode_maps(&mut encoder, "lb_map_capacity", "Capacity of a map in entries", capacity)?;
        encode_flows(&mut encoder, datapath.as_ref())?;
        encode_source_ports(&mut encoder, &datapath.source_ports())
    }
}

fn encode_watches(
    encoder: &mut DescriptorEncoder<'_>,
    figures: &[Figures],
) -> Result<(), fmt::Error> {
    let kind = ConstGauge::new(0.0).metric_type();
    let help = "Time since the API server last sent an event, a bookmark or a complete list";
    let mut out = encoder.encode_descriptor("lb_watch_age_seconds", help, None, kind)?;
    for Figures { kind, age, .. } in figures {
        let Some(age) = age else { continue };
        let labels = [("kind", kind.name())];
        ConstGauge::new(age.as_secs_f64()).encode(out.encode_family(&labels)?)?;
    }
    type Count = fn(&Figures) -> u64;
    let counters: [(_, _, Count); 3] = [
        ("lb_watch_lists", "Complete lists from the API server", |figures| figures.lists),
        ("lb_watch_failures", "Lists and watches that failed", |figures| figures.failures),
        (
            "lb_watch_unreadable_objects",
            "How often an object of the API server could not be read",
            |figures| figures.unreadable,
        ),
    ];
    for (name, help, count) in counters {
        let kind = ConstCounter::new(0_u64).metric_type();
        let mut out = encoder.encode_descriptor(name, help, None, kind)?;
        for figures in figures {
            let labels = [("kind", figures.kind.name())];
            ConstCounter::new(count(figures)).encode(out.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn encode_refusals(
    encoder: &mut DescriptorEncoder<'_>,
    refusals: &Refusals,
) -> Result<(), fmt::Error> {
    let kind = ConstGauge::new(0_i64).metric_type();
    let help = "Objects that are refused, or of which a part is, by the reason of their Event";
    let mut out = encoder.encode_descriptor("lb_refusals", help, None, kind)?;
    for (reason, count) in refusals.counts() {
        let labels = [("reason", reason.word())];
        ConstGauge::new(count as i64).encode(out.encode_family(&labels)?)?;
    }
    Ok(())
}

fn encode_flows(
    encoder: &mut DescriptorEncoder<'_>,
    datapath: &dyn DatapathStats,
) -> Result<(), fmt::Error> {
    let kind = ConstGauge::new(0_i64).metric_type();
    let help = "Flows by family and class, as of the last sweep";
    let mut out = encoder.encode_descriptor("lb_flow_table_entries", help, None, kind)?;
    for (family, class, count) in datapath.flows() {
        let labels = [("family", family.name()), ("class", class.name())];
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        ConstGauge::new(count).encode(out.encode_family(&labels)?)?;
    }
    let Some([inserted, evicted @ ..]) = datapath.flow_events() else { return Ok(()) };
    let inserted = ConstCounter::new(inserted);
    let kind = inserted.metric_type();
    let help = "Flows that were inserted";
    inserted.encode(encoder.encode_descriptor("lb_flow_insertions", help, None, kind)?)?;
    let help = "Flows that made room for a new one before they were expired, by class";
    let mut out = encoder.encode_descriptor("lb_flow_evictions", help, None, kind)?;
    for (class, count) in Class::ALL.into_iter().zip(evicted) {
        let labels = [("class", class.name())];
        ConstCounter::new(count).encode(out.encode_family(&labels)?)?;
    }
    Ok(())
}

/// The source ports in use, only of backends that run short of them: a few series.
fn encode_source_ports(
    encoder: &mut DescriptorEncoder<'_>,
    ports: &[PortUse],
) -> Result<(), fmt::Error> {
    let kind = ConstGauge::new(0.0).metric_type();
    let help = "Part of the source ports of a node's address that flows to a backend use, of the \
                five worst from 0.7 on, as of the last sweep";
    let mut out = encoder.encode_descriptor("lb_source_ports_used_ratio", help, None, kind)?;
    for of_backend in ports {
        let labels = [
            ("address", of_backend.address.to_string()),
            ("backend", of_backend.backend.to_string()),
            ("protocol", of_backend.protocol.clone()),
        ];
        let ratio = f64::from(of_backend.used) / f64::from(of_backend.ports.max(1));
        ConstGauge::new(ratio).encode(out.encode_family(&labels)?)?;
    }
    Ok(())
}

/// The help of `lb_datapath_packets_total`: every reason with its class and meaning.
fn datapath_help() -> String {
    let mut help = "Packets and calls by hook and by the reason for what became of them".to_owned();
    for reason in Reason::ALL {
        let (name, class, meaning) = (reason.name(), reason.class().name(), reason.meaning());
        help += &format!("; {name} ({class}): {meaning}");
    }
    help
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
