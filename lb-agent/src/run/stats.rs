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
        read::read_settings,
        source_ports::{CROWDED, EXHAUSTED, NAMED},
        sweep::{self, Classes, Sweeper, Swept},
        timeouts,
    },
    metrics::DatapathStats,
    report::PortUse,
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

    fn source_ports(&self) -> Vec<PortUse> {
        let swept = self.swept.lock().unwrap_or_else(PoisonError::into_inner);
        swept.ports.iter().take(NAMED).cloned().collect()
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
    let (pins, health, cancel) = (pins.clone(), health.clone(), cancel.clone());
    let mut crowded = Crowded::default();
    agent.tasks.spawn(async move {
        let mut ticks = tokio::time::interval(INTERVAL);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = cancel.cancelled() => return,
            }
            // Without settings there is no flow yet.
            let source_ports =
                read_settings(&pins).map(|settings| settings.source_ports).unwrap_or_default();
            let swept = tokio::task::spawn_blocking(move || {
                let timeouts = timeouts::timeouts(ticks_per_second);
                let result = sweeper.sweep(&timeouts, ticks_per_second, source_ports);
                (sweeper, result)
            });
            // A panic ends the process; the runtime cancels it only when it ends itself.
            let Ok((returned, result)) = swept.await else { return };
            sweeper = returned;
            match result {
                Ok(swept) => {
                    crowded.next(&swept.ports).iter().for_each(log);
                    *stats.swept.lock().unwrap_or_else(PoisonError::into_inner) = swept;
                    health.set_fault("sweep", None);
                }
                Err(error) => health.set_fault("sweep", Some(error.to_string())),
            }
        }
    });
    Ok(())
}

/// The backends of which it was logged that their source ports run out.
#[derive(Debug, Default)]
struct Crowded(Vec<(PortUse, State)>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Crowded,
    Exhausted,
}

impl State {
    fn of(ports: &PortUse) -> Self {
        if ports.percent() >= EXHAUSTED { Self::Exhausted } else { Self::Crowded }
    }
}

/// A change that is worth a line of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Change {
    /// Now it is in this state, which is worse than before.
    Worse(PortUse, State),
    /// It is not crowded any more; this is how it was.
    Over(PortUse),
}

impl Crowded {
    /// What has changed, now that these are [`CROWDED`]. A backend that is a little better than it was
    /// keeps its state, so that one at the limit is logged once.
    fn next(&mut self, ports: &[PortUse]) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut now = Vec::new();
        for of_backend in ports {
            let before = self.0.iter().find(|(before, _)| before.is_same(of_backend));
            let state = State::of(of_backend);
            let worst = before.map_or(state, |(_, before)| state.max(*before));
            if before.is_none_or(|(_, before)| state > *before) {
                changes.push(Change::Worse(of_backend.clone(), state));
            }
            now.push((of_backend.clone(), worst));
        }
        let is_over = |(before, _): &&(PortUse, State)| !ports.iter().any(|it| it.is_same(before));
        let over = self.0.iter().filter(is_over);
        changes.extend(over.map(|(before, _)| Change::Over(before.clone())));
        self.0 = now;
        changes
    }
}

fn log(change: &Change) {
    match change {
        Change::Worse(ports, State::Crowded) => tracing::warn!(
            "{ports}: if they run out, new flows to this backend are refused (no_source_port); more \
             backends, direct server return or externalTrafficPolicy Local need fewer"
        ),
        Change::Worse(ports, State::Exhausted) => tracing::warn!(
            "{ports}: some new flows to this backend find none and are refused (no_source_port); add \
             backends, or use direct server return or externalTrafficPolicy Local, which need fewer"
        ),
        Change::Over(ports) => tracing::info!(
            "backend {}/{}: less than {CROWDED} % of the source ports of {} are in use again",
            ports.backend,
            ports.protocol,
            ports.address,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(backend: u16, used: u32) -> PortUse {
        PortUse {
            address: [10, 0, 0, 1].into(),
            backend: ([10, 1, 0, 1], backend).into(),
            protocol: "udp".to_owned(),
            used,
            ports: 100,
        }
    }

    #[test]
    fn a_backend_is_logged_once_for_each_state_and_when_it_is_over() {
        use Change::{Over, Worse};
        let mut crowded = Crowded::default();
        let mut next = |now: &[PortUse]| crowded.next(now);
        assert_eq!(next(&[]), []);
        assert_eq!(next(&[ports(1, 70)]), [Worse(ports(1, 70), State::Crowded)]);
        assert_eq!(next(&[ports(1, 80)]), []);
        let both = [ports(1, 90), ports(2, 95)];
        let worse = both.clone().map(|ports| Worse(ports, State::Exhausted));
        assert_eq!(next(&both), worse);
        assert_eq!(next(&[ports(1, 89), ports(2, 90)]), []);
        assert_eq!(next(&both), [], "it has been said");
        assert_eq!(next(&[ports(1, 90)]), [Over(ports(2, 95))]);
        assert_eq!(next(&[]), [Over(ports(1, 90))]);
        assert_eq!(next(&[ports(1, 70)]), [Worse(ports(1, 70), State::Crowded)]);
    }
}
