//! `lb-bench traffic`: real connections through lb and through kube-proxy, side by side.
//!
//! The machine makes a cluster for every proxy ([`lane`]). Client and server ([`exchange`]) share
//! one processor, on which nothing else of the benchmark runs: wake-ups from one processor to
//! another would hide everything else. In each round every lane has a turn of each load on each
//! route, in random order. A figure is the median, over the rounds, of the ratio of two lanes in the
//! same round, so that a slow second of the machine slows down both.
//!
//! It measures no hardware: frames pass from one veth to another on the same processor.

pub mod exchange;
pub mod judge;
pub mod lane;
pub mod relay;

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use self::exchange::{Load, Sample};
use self::lane::{Lane, Proxy, Route, Shared};
use super::namespace::{keep_off, last_processor};
use crate::harness::netns::topology::plan::Family;

/// What lanes are compared by: a load on a route over an address family.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Case {
    /// Who asks whom.
    pub route: Route,
    /// What it does.
    pub load: Load,
    /// Whether over IPv6.
    pub is_v6: bool,
}

impl Case {
    /// For people.
    pub fn title(self) -> String {
        let family = if self.is_v6 { ", IPv6" } else { "" };
        format!("{}, {}{family}", self.load.title(), self.route.title())
    }

    fn family(self) -> Family {
        if self.is_v6 { Family::V6 } else { Family::V4 }
    }
}

/// What is measured, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// The rounds; an odd number has a median of its own.
    pub rounds: usize,
    /// Only cases whose title contains this.
    pub only: &'a str,
    /// Also over IPv6.
    pub v6: bool,
}

impl Plan<'_> {
    fn cases(&self) -> Vec<Case> {
        let families: &[bool] = if self.v6 { &[false, true] } else { &[false] };
        let mut cases = Vec::new();
        for &is_v6 in families {
            for route in Route::ALL {
                let of_load = Load::ALL.map(|load| Case { route, load, is_v6 });
                cases.extend(of_load.iter().filter(|case| case.title().contains(self.only)));
            }
        }
        cases
    }
}

/// The samples of a case by lane, one for each round.
pub type Samples = BTreeMap<Case, BTreeMap<Proxy, Vec<Sample>>>;

/// Makes the lanes, measures, and removes them.
///
/// # Errors
/// A lane cannot be made, does not serve, or does not forward the way it is meant to.
pub fn measure(plan: &Plan) -> Result<Samples> {
    let cases = plan.cases();
    ensure!(!cases.is_empty(), "no case contains {:?}", plan.only);
    let processor = last_processor()?;
    keep_off(processor)?;
    let mut shared = Shared::start().context("control plane")?;
    let lanes = Proxy::ALL.map(|proxy| Lane::new(proxy, processor));
    let mut lanes = lanes.into_iter().collect::<Result<Vec<_>>>()?;
    shared.fill(lanes.first().context("no lane")?)?;
    lanes.iter_mut().try_for_each(|lane| lane.start_proxy(&shared))?;
    let mut turns = Turns { lanes: &lanes, random: 0x9e37_79b9_7f4a_7c15, samples: Samples::new() };
    turns.warm_up(&cases)?;
    for round in 1..=plan.rounds {
        turns.round(cases.clone()).with_context(|| format!("round {round}"))?;
        eprintln!("round {round} of {}", plan.rounds);
    }
    check_flows(&lanes, &cases)?;
    Ok(turns.samples)
}

/// Connections are translated where the lane is meant to: at connect(), or packet by packet.
fn check_flows(lanes: &[Lane], cases: &[Case]) -> Result<()> {
    let has_services =
        |proxy: Proxy| cases.iter().any(|case| case.route != Route::PodIp && case.route.has(proxy));
    for lane in lanes.iter().filter(|lane| has_services(lane.proxy)) {
        let Some(flows) = lane.flows_opened()? else { continue };
        let title = lane.proxy.title();
        match lane.proxy {
            // The readiness of the lane itself may open a few before its hooks are attached.
            Proxy::LbConnect => ensure!(flows < 100, "{title} opened {flows} flows"),
            _ => ensure!(flows > 100, "{title} opened {flows} flows only"),
        }
    }
    Ok(())
}

struct Turns<'a> {
    lanes: &'a [Lane],
    random: u64,
    samples: Samples,
}

impl Turns<'_> {
    /// Waits until every lane serves every case.
    fn warm_up(&self, cases: &[Case]) -> Result<()> {
        for Case { route, load, .. } in cases {
            for lane in self.lanes.iter().filter(|lane| route.has(lane.proxy)) {
                let family = |case: &&Case| case.route == *route && case.load == *load;
                for case in cases.iter().filter(family) {
                    lane.wait_served(*route, *load, case.family())?;
                }
            }
        }
        Ok(())
    }

    /// The lanes of a case follow one another, so that they meet the same state of the machine.
    fn round(&mut self, mut cases: Vec<Case>) -> Result<()> {
        self.shuffle(&mut cases);
        for case in cases {
            let Case { route, load, .. } = case;
            let of_route = self.lanes.iter().filter(|lane| route.has(lane.proxy));
            let mut lanes: Vec<_> = of_route.collect();
            self.shuffle(&mut lanes);
            for lane in lanes {
                let sample = lane.turn(route, load, case.family(), load.operations())?;
                let of_case = self.samples.entry(case).or_default();
                of_case.entry(lane.proxy).or_default().push(sample);
            }
        }
        Ok(())
    }

    /// Fisher and Yates, with xorshift64.
    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            items.swap(last, (self.random % (last as u64 + 1)) as usize);
        }
    }
}
