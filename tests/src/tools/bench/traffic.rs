//! `lb-bench traffic`: real connections through lb and through kube-proxy, side by side.
//!
//! The machine makes a cluster for every proxy ([`lane`]). Client and server ([`exchange`]) share
//! one processor, on which nothing else of the benchmark runs: wake-ups from one processor to
//! another would hide everything else. In each round every lane has a turn of each load on each
//! route, in random order. A figure is the median, over the rounds, of the ratio of two lanes in the
//! same round, so that a slow second of the machine slows down both.
//!
//! It measures no hardware: frames pass from one veth to another on the same processor.

pub mod case;
pub mod exchange;
pub mod judge;
pub mod lane;
pub mod machine;
pub mod relay;
pub mod shared;

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use self::case::{Case, Proxy, Route};
use self::exchange::{Load, Sample};
use self::lane::{Lane, Settings};
use self::shared::Shared;
use super::namespace::{keep_off, last_processor};

/// What is measured, and how often.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Plan {
    /// The rounds; an odd number has a median of its own.
    pub rounds: usize,
    /// Only cases whose title contains this.
    pub only: String,
    /// Also over IPv6.
    pub v6: bool,
    /// Services beside those that are used.
    pub services: usize,
    /// The MTU of every device, unless it is 1500.
    pub mtu: Option<u16>,
    /// The server has another processor than the client.
    pub two_processors: bool,
}

impl Plan {
    /// For people.
    fn title(&self) -> String {
        let Self { rounds, services, .. } = self;
        let mtu = self.mtu.unwrap_or(1500);
        let place = if self.two_processors { "two processors" } else { "one processor" };
        format!(
            "{rounds} rounds; client and server on {place}; {services} more Services; MTU {mtu}."
        )
    }

    fn settings(&self) -> Result<Settings> {
        let client_processor = last_processor()?;
        let other = client_processor.checked_sub(1);
        let server_processor = if self.two_processors {
            other.context("one processor only")?
        } else {
            client_processor
        };
        Ok(Settings { client_processor, server_processor, mtu: self.mtu, max_flows: None })
    }

    fn cases(&self) -> Vec<Case> {
        let families: &[bool] = if self.v6 { &[false, true] } else { &[false] };
        let mut cases = Vec::new();
        for &is_v6 in families {
            for route in Route::ALL {
                let of_load = Load::ALL.map(|load| Case { route, load, is_v6 });
                let is_wanted = |case: &&Case| case.is_meant() && case.title().contains(&self.only);
                cases.extend(of_load.iter().filter(is_wanted));
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
    let settings = plan.settings()?;
    keep_off(settings.client_processor)?;
    let mut shared = Shared::start().context("control plane")?;
    let mut lanes = Vec::new();
    for proxy in Proxy::ALL {
        if cases.iter().any(|case| case.has(proxy)) || proxy == Proxy::LbTc {
            lanes.push(Lane::new(proxy, &settings)?);
        }
    }
    shared.fill(&lanes.first().context("no lane")?.cluster, plan.services)?;
    lanes.iter_mut().try_for_each(|lane| lane.start_proxy(&shared))?;
    imitate(&mut lanes)?;
    let mut turns = Turns { lanes: &lanes, random: 0x9e37_79b9_7f4a_7c15, samples: Samples::new() };
    turns.warm_up(&cases)?;
    for round in 1..=plan.rounds {
        turns.round(cases.clone()).with_context(|| format!("round {round}"))?;
        eprintln!("round {round} of {}", plan.rounds);
    }
    check_flows(&lanes, &cases, plan.rounds)?;
    Ok(turns.samples)
}

/// Attaches the programs of the lane with empty ones.
fn imitate(lanes: &mut [Lane]) -> Result<()> {
    let Some(empty) = lanes.iter().position(|lane| lane.proxy == Proxy::Empty) else {
        return Ok(());
    };
    // The lane of lb at tc is before it.
    let (before, after) = lanes.split_at_mut(empty);
    let tc = before.iter().find(|lane| lane.proxy == Proxy::LbTc).context("no lane of lb at tc")?;
    after.iter_mut().take(1).try_for_each(|lane| lane.imitate(tc))
}

/// Connections are translated where the lane is meant to: packet by packet, where a turn opens one
/// flow at least, or at connect(), where it opens none.
fn check_flows(lanes: &[Lane], cases: &[Case], rounds: usize) -> Result<()> {
    for lane in lanes {
        let Some(flows) = lane.flows_opened()? else { continue };
        let proxy = lane.proxy;
        let translated = |case: &&Case| case.route != Route::PodIp && case.has(proxy);
        let turns = (rounds * cases.iter().filter(translated).count()) as u64;
        let is_right =
            if proxy == Proxy::LbConnect { turns == 0 || flows < turns } else { flows >= turns };
        ensure!(is_right, "{} opened {flows} flows in {turns} turns", proxy.title());
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
        for case in cases {
            for lane in self.lanes.iter().filter(|lane| case.has(lane.proxy)) {
                lane.wait_served(case.route, case.load, case.family())?;
            }
        }
        Ok(())
    }

    /// The lanes of a case follow one another, so that they meet the same state of the machine.
    fn round(&mut self, mut cases: Vec<Case>) -> Result<()> {
        self.shuffle(&mut cases);
        for case in cases {
            let Case { route, load, .. } = case;
            let of_case = self.lanes.iter().filter(|lane| case.has(lane.proxy));
            let mut lanes: Vec<_> = of_case.collect();
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
