//! `lb-bench traffic`: real connections through lb and through kube-proxy, side by side.
//!
//! The machine makes a cluster for every proxy ([`lane`]). Client and server ([`exchange`]) share
//! one processor, on which nothing else of the benchmark runs: wake-ups from one processor to
//! another would hide everything else. In each round every lane has a turn of each load on each
//! route, in random order. A figure is the median, over the rounds, of the ratio of two lanes in the
//! same round, so that a slow second of the machine slows down both.
//!
//! The same lanes are measured by known tools ([`tools`]), and nodes of their own show what grows with
//! the cluster ([`scaling`]).
//!
//! It measures no hardware: frames pass from one veth to another on the same processor.

pub mod case;
pub mod exchange;
pub mod judge;
pub mod lane;
pub mod machine;
pub mod page;
pub mod plots;
pub mod publish;
pub mod relay;
pub mod scaling;
pub mod shared;
pub mod tools;

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use lb_testing::random::Random;
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
    /// Smaller clusters, and fewer rounds of what takes long.
    pub is_quick: bool,
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

    /// Whether a case of this title is measured.
    fn wants(&self, title: &str) -> bool {
        title.contains(&self.only)
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
                let is_wanted = |case: &&Case| case.is_meant() && self.wants(&case.title());
                cases.extend(of_load.iter().filter(is_wanted));
            }
        }
        cases
    }
}

/// The samples of a case by lane, one for each round.
pub type Samples = BTreeMap<Case, BTreeMap<Proxy, Vec<Sample>>>;

/// All that was measured.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Lanes by the loads of lb-bench.
    pub samples: Samples,
    /// Lanes by known tools.
    pub tools: tools::Measured,
    /// What grows with the cluster.
    pub scaling: scaling::Measured,
}

/// Makes the lanes, measures, and removes them.
///
/// # Errors
/// A lane cannot be made, does not serve, or does not forward the way it is meant to.
pub fn measure(plan: &Plan) -> Result<Measured> {
    let settings = plan.settings()?;
    keep_off(settings.client_processor)?;
    let (samples, tools) = measure_lanes(plan, &settings)?;
    let scaling = scaling::measure(plan, &settings)?;
    let has_any = !samples.is_empty() || !tools.rates.is_empty() || !scaling.curves.is_empty();
    ensure!(
        has_any || !scaling.removals.is_empty() || !tools.missing.is_empty(),
        "no case contains {:?}",
        plan.only
    );
    Ok(Measured { samples, tools, scaling })
}

fn measure_lanes(plan: &Plan, settings: &Settings) -> Result<(Samples, tools::Measured)> {
    let cases = plan.cases();
    let has_tools = tools::are_wanted(plan);
    if cases.is_empty() && !has_tools {
        return Ok(Default::default());
    }
    let mut shared = Shared::start().context("control plane")?;
    let mut lanes = Vec::new();
    for proxy in Proxy::ALL {
        let is_measured = cases.iter().any(|case| case.has(proxy));
        if is_measured || proxy == Proxy::LbTc || (has_tools && tools::has(proxy)) {
            lanes.push(Lane::new(proxy, settings)?);
        }
    }
    shared.fill(&lanes.first().context("no lane")?.cluster, plan.services)?;
    lanes.iter_mut().try_for_each(|lane| lane.start_proxy(&shared))?;
    imitate(&mut lanes)?;
    let mut turns = Turns { lanes: &lanes, random: Random::new(1), samples: Samples::new() };
    turns.warm_up(&cases)?;
    for round in 1..=plan.rounds {
        turns.round(cases.clone()).with_context(|| format!("round {round}"))?;
        eprintln!("round {round} of {}", plan.rounds);
    }
    check_flows(&lanes, &cases, plan.rounds)?;
    let samples = turns.samples;
    Ok((samples, tools::measure(plan, &lanes, settings)?))
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
    random: Random,
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
        self.random.shuffle(&mut cases);
        for case in cases {
            let Case { route, load, .. } = case;
            let of_case = self.lanes.iter().filter(|lane| case.has(lane.proxy));
            let mut lanes: Vec<_> = of_case.collect();
            self.random.shuffle(&mut lanes);
            for lane in lanes {
                let sample = lane.turn(route, load, case.family(), load.operations())?;
                let of_case = self.samples.entry(case).or_default();
                of_case.entry(lane.proxy).or_default().push(sample);
            }
        }
        Ok(())
    }
}
