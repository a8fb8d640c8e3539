//! The periodic sweep of flows and affinity entries, and the metrics that are read from maps.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use lb_common::{
    abi::{
        counter::{Hook, Reason},
        flow_table::EVENTS,
    },
    flow_table::Class,
};
use lb_control::model::IpFamily;

use super::agent::Agent;
use crate::{
    maps::{
        pins::{PinError, Pins},
        sweep::{self, Classes, Sweeper, Swept},
        timeouts,
    },
    metrics::DatapathStats,
};

/// Time between two sweeps.
const INTERVAL: Duration = Duration::from_secs(30);

/// What the last sweep has found, and access to the present counters.
struct MapStats {
    pins: Pins,
    swept: Mutex<Swept>,
}

impl fmt::Debug for MapStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MapStats").finish_non_exhaustive()
    }
}

impl DatapathStats for MapStats {
    fn counters(&self) -> Vec<(Hook, Reason, u64)> {
        let sums = match sweep::counters(&self.pins) {
            Ok(sums) => sums,
            Err(error) => {
                tracing::warn!(%error, "cannot read the counters: this scrape has none");
                return Vec::new();
            }
        };
        let pairs = Hook::ALL.iter().flat_map(|hook| Reason::ALL.iter().map(move |r| (*hook, *r)));
        pairs
            .filter_map(|(hook, reason)| {
                Some((hook, reason, *sums.get(hook.counter(reason) as usize)?))
            })
            .collect()
    }

    fn map_fill(&self) -> Vec<(&'static str, u64, u64)> {
        let swept = self.swept.lock().unwrap_or_else(PoisonError::into_inner);
        swept.fills.iter().map(|fill| (fill.map, fill.entries, fill.max_entries)).collect()
    }

    fn flows(&self) -> Vec<(IpFamily, Class, u64)> {
        let swept = self.swept.lock().unwrap_or_else(PoisonError::into_inner);
        if swept.fills.is_empty() {
            return Vec::new();
        }
        let families = [IpFamily::V4, IpFamily::V6].into_iter().zip(swept.flows);
        let of_family = |(family, counts): (IpFamily, Classes)| {
            Class::ALL.into_iter().zip(counts).map(move |(class, count)| (family, class, count))
        };
        families.flat_map(of_family).collect()
    }

    fn flow_events(&self) -> Option<[u64; EVENTS]> {
        sweep::flow_events(&self.pins)
            .inspect_err(|error| {
                tracing::warn!(%error, "cannot read FLOW_EVENTS: this scrape has none of it");
            })
            .ok()
    }
}

/// Starts the sweep and connects the metrics to the maps.
///
/// # Errors
/// [`PinError`] if a map cannot be opened.
pub(super) fn start(agent: &Agent, ticks_per_second: u32) -> Result<(), PinError> {
    let Agent { pins, metrics, health, cancel, .. } = agent;
    let mut sweeper = Sweeper::open(pins)?;
    let stats = Arc::new(MapStats { pins: pins.clone(), swept: Mutex::default() });
    metrics.set_datapath(Arc::clone(&stats) as Arc<dyn DatapathStats>);
    let (health, cancel) = (health.clone(), cancel.clone());
    agent.tasks.spawn(async move {
        let mut ticks = tokio::time::interval(INTERVAL);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = cancel.cancelled() => return,
            }
            let swept = tokio::task::spawn_blocking(move || {
                let timeouts = timeouts::timeouts(ticks_per_second);
                let result = sweeper.sweep(&timeouts, ticks_per_second);
                (sweeper, result)
            });
            // A panic ends the process; the runtime cancels it only when it ends itself.
            let Ok((returned, result)) = swept.await else { return };
            sweeper = returned;
            match result {
                Ok(swept) => {
                    *stats.swept.lock().unwrap_or_else(PoisonError::into_inner) = swept;
                    health.set_fault("sweep", None);
                }
                Err(error) => health.set_fault("sweep", Some(error.to_string())),
            }
        }
    });
    Ok(())
}
