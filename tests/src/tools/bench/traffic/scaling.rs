//! What grows with Services, flows, endpoints and changes, and what becomes of removed endpoints.
//!
//! Each proxy has a node for each number of Services. As in the other cases every lane has its turn
//! in every round, in random order, with client and server on one processor. A figure is compared
//! with that of the smallest size in the same round.

pub mod churn;
pub mod curve;
pub mod objects;
pub mod removal;
pub mod site;
pub mod work;

use std::time::Instant;

use anyhow::{Context, Result};
use lb_testing::random::Random;
use serde::Serialize;

use self::curve::{Curve, Samples};
use self::objects::{LEAST, Used};
use self::removal::Removal;
use self::site::Site;
use self::work::Work;
use super::Plan;
use super::case::Proxy;
use super::exchange::Sample;
use super::lane::Settings;

/// What grows.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Axis {
    /// Services; measured is connect() to one of them.
    Services,
    /// Flows; measured is a datagram and its answer in a random one.
    Flows,
    /// Endpoints of a Service; measured is a connection with one request.
    Endpoints,
    /// Changes of endpoints each second; measured is a connection with one request.
    Changes,
}

/// The removal of endpoints, as `--only` finds it.
const REMOVAL: &str = "scaling: removed endpoints";
/// Lanes that are compared.
const LANES: [Proxy; 4] = [Proxy::LbConnect, Proxy::LbTc, Proxy::Nftables, Proxy::Iptables];

impl Axis {
    /// All, in the order of the report.
    pub const ALL: [Self; 4] = [Self::Services, Self::Flows, Self::Endpoints, Self::Changes];

    /// For people, and for `--only`.
    pub fn title(self) -> &'static str {
        match self {
            Self::Services => "scaling: TCP connect() by Services",
            Self::Flows => "scaling: UDP request/response by flows",
            Self::Endpoints => "scaling: TCP connect-request by endpoints of the Service",
            Self::Changes => "scaling: TCP connect-request by changes of endpoints",
        }
    }

    /// What grows, for people.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Services => "Services in the cluster",
            Self::Flows => "flows that are used in random order",
            Self::Endpoints => "endpoints of the Service",
            Self::Changes => "changes of endpoints each second, 1,000 Services",
        }
    }

    /// Aim and must of the growth from the smallest size to the largest: median, 99th percentile.
    pub(super) fn limits(self) -> Option<[(f64, f64); 2]> {
        // Row 5 of docs/performance.md.
        (self == Self::Services).then_some([(1.03, 1.10), (1.05, 1.10)])
    }

    fn sizes(self, is_quick: bool) -> &'static [u32] {
        match (self, is_quick) {
            (Self::Services, true) => &[1, LEAST, 10_000],
            (Self::Services, false) => &[1, LEAST, 10_000, 100_000],
            (Self::Flows, true) => &[1, 1_000],
            (Self::Flows, false) => &[1, 1_000, work::MOST_FLOWS],
            (Self::Endpoints, true) => &[1, 1_000],
            (Self::Endpoints, false) => &[1, 10, 100, 1_000],
            (Self::Changes, true) => &[0, 1_000],
            (Self::Changes, false) => &[0, 100, 1_000],
        }
    }

    /// How many rounds there are: where a turn takes seconds, fewer.
    fn rounds(self, rounds: usize) -> usize {
        match self {
            Self::Services | Self::Endpoints => rounds,
            Self::Flows => rounds.div_ceil(3),
            Self::Changes => rounds.div_ceil(5),
        }
    }

    fn has(self, lane: Proxy, size: u32, is_quick: bool) -> bool {
        match self {
            // kube-proxy takes a minute for ten thousand Services, and most of an hour for more.
            Self::Services if lane.kube_proxy_mode().is_some() => {
                size <= if is_quick { LEAST } else { 10_000 }
            }
            // Without a proxy only the flows differ.
            _ => lane != Proxy::Direct || self == Self::Flows,
        }
    }

    /// How many Services there are.
    fn services(self, size: u32) -> u32 {
        match self {
            Self::Services => size,
            Self::Flows => 1,
            Self::Endpoints | Self::Changes => LEAST,
        }
    }
}

/// All that was measured.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    /// What grows.
    pub curves: Vec<Curve>,
    /// Removed endpoints, by lane.
    pub removals: Vec<Removal>,
}

/// One turn of a lane.
#[derive(Clone, Copy, Debug)]
struct Turn {
    axis: Axis,
    lane: Proxy,
    size: u32,
}

/// Makes the nodes, measures, and removes them.
///
/// # Errors
/// A node cannot be made, or a connection fails.
pub fn measure(plan: &Plan, settings: &Settings) -> Result<Measured> {
    let axes: Vec<_> = Axis::ALL.into_iter().filter(|axis| plan.wants(axis.title())).collect();
    let has_removals = plan.wants(REMOVAL);
    if axes.is_empty() && !has_removals {
        return Ok(Measured::default());
    }
    let turns: Vec<_> = axes.iter().flat_map(|axis| turns(*axis, plan.is_quick)).collect();
    let mut wanted: Vec<_> =
        turns.iter().map(|turn| (turn.axis.services(turn.size), turn.lane)).collect();
    if has_removals {
        wanted.extend(LANES.map(|lane| (LEAST, lane)));
    }
    wanted.sort_unstable();
    wanted.dedup();
    let mut sites = start(&wanted, settings)?;
    let mut samples = Samples::new();
    let mut random = Random::new(1);
    for axis in axes {
        let rounds = axis.rounds(plan.rounds);
        for round in 1..=rounds {
            let mut of_axis: Vec<_> = turns.iter().filter(|turn| turn.axis == axis).collect();
            random.shuffle(&mut of_axis);
            for turn in of_axis {
                let sample = turn.take(&sites, plan.is_quick)?;
                let Turn { axis, lane, size } = *turn;
                samples.entry((axis, lane, size)).or_default().push(sample);
            }
            eprintln!("{}: round {round} of {rounds}", axis.title());
        }
        sites.iter_mut().try_for_each(Site::check)?;
    }
    let mut removals = Vec::new();
    let has_all = |site: &&Site| has_removals && site.size.services == LEAST;
    for site in sites.iter().filter(has_all) {
        let is_lb = site.proxy.agent_modes().is_some();
        let count = match (is_lb, plan.is_quick) {
            (true, true) => 50,
            (true, false) => 200,
            (false, true) => 3,
            (false, false) => 15,
        };
        removals.push(removal::measure(site, count)?);
        eprintln!("{REMOVAL}: {}", site.proxy.title());
    }
    Ok(Measured { curves: Curve::all(&samples), removals })
}

fn turns(axis: Axis, is_quick: bool) -> Vec<Turn> {
    let lanes = [Proxy::Direct].into_iter().chain(LANES);
    let of_lane =
        |lane| axis.sizes(is_quick).iter().map(move |size| Turn { axis, lane, size: *size });
    lanes.flat_map(of_lane).filter(|turn| axis.has(turn.lane, turn.size, is_quick)).collect()
}

/// All nodes; the proxies start at the same time.
fn start(wanted: &[(u32, Proxy)], settings: &Settings) -> Result<Vec<Site>> {
    let begin = Instant::now();
    let start = |(services, lane): &(u32, Proxy)| {
        Site::start(*lane, *services, settings)
            .with_context(|| format!("{} with {services} Services", lane.title()))
    };
    let mut sites: Vec<_> = wanted.iter().map(start).collect::<Result<_>>()?;
    for site in &mut sites {
        site.wait_served()?;
        eprintln!("{} served after {:.1} s", site.title(), begin.elapsed().as_secs_f64());
    }
    Ok(sites)
}

impl Turn {
    fn take(&self, sites: &[Site], is_quick: bool) -> Result<Sample> {
        let Self { axis, lane, size } = *self;
        let services = axis.services(size);
        let is_it = |site: &&Site| site.proxy == lane && site.size.services == services;
        let site = sites.iter().find(is_it).context("no such node")?;
        match axis {
            Axis::Services => site.turn(Work::Open, Used::One, 1_000, 1),
            Axis::Flows => site.turn(Work::Flows, Used::One, 2_000, size),
            Axis::Endpoints => {
                let used = if size == 1 { Used::One } else { Used::Endpoints(size) };
                site.turn(Work::Exchange, used, 500, 1)
            }
            Axis::Changes => {
                // One to two seconds: kube-proxy writes its rules once a second.
                let count = if is_quick { 10_000 } else { 20_000 };
                churn::during(site, size, || site.turn(Work::Exchange, Used::One, count, 1))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kube_proxy_is_spared_what_takes_it_an_hour() {
        let most = |lane, is_quick| {
            let turns = turns(Axis::Services, is_quick);
            turns.iter().filter(|turn| turn.lane == lane).map(|turn| turn.size).max()
        };
        assert_eq!(most(Proxy::LbTc, false), Some(100_000));
        assert_eq!(most(Proxy::Iptables, false), Some(10_000));
        assert_eq!(most(Proxy::Iptables, true), Some(1_000));
        assert_eq!(most(Proxy::Direct, false), None);
        assert_eq!(turns(Axis::Flows, true).len(), 2 * (1 + LANES.len()));
    }
}
