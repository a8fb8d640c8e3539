//! The figures: ratios of lanes, what they are held to, and the medians that they come from.

use std::collections::BTreeMap;

use serde::Serialize;

use super::case::{Case, Proxy, Route};
use super::exchange::{Load, Sample};
use super::machine::Machine;
use super::scaling::curve::Curve;
use super::scaling::removal::Removal;
use super::{Measured, Plan, Samples, scaling, tools};
use crate::tools::bench::report::Verdict;
use crate::tools::bench::stats::Estimate;

/// How far the control may differ from the direct lane before the run is void, as a share.
const CONTROL: f64 = 0.03;

/// What two lanes are compared by.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// The median time of an operation.
    P50,
    /// Operations, datagrams or bytes each second.
    Rate,
    /// The median time above that of [`Proxy::Direct`].
    Above,
}

impl Measure {
    /// What lanes are compared by under a load.
    pub(super) fn usual(load: Load) -> Self {
        match load {
            Load::Request | Load::Connect | Load::Datagram | Load::Forward => Self::P50,
            Load::Burst | Load::Bulk => Self::Rate,
        }
    }

    /// `direct` is the sample of the direct lane in the same round.
    fn of(self, sample: &Sample, direct: &Sample) -> f64 {
        match self {
            Self::P50 => sample.p50_us,
            Self::Rate => sample.rate,
            Self::Above => sample.p50_us - direct.p50_us,
        }
    }
}

/// A ratio that docs/performance.md holds to limits.
#[derive(Clone, Copy, Debug)]
struct Target {
    row: u8,
    load: Load,
    routes: &'static [Route],
    measure: Measure,
    of: Proxy,
    to: Proxy,
    aim: Option<f64>,
    must: Option<f64>,
}

const CLUSTER_IP: &[Route] = &[Route::ClusterIpNear, Route::ClusterIpFar];
const POD_IP: &[Route] = &[Route::PodIp];
const NODE_PORT: &[Route] = &[Route::NodePort];

/// `row: load, routes, measure: of / to, aim, must`. A ratio of rates is to be larger than its
/// limits. A ratio of times is to be smaller, unless it is one of kube-proxy to lb: how far lb is
/// ahead.
macro_rules! target {
    ($row:literal: $load:ident $routes:ident $measure:ident: $of:ident / $to:ident, $aim:expr, $must:expr) => {
        Target {
            row: $row,
            load: Load::$load,
            routes: $routes,
            measure: Measure::$measure,
            of: Proxy::$of,
            to: Proxy::$to,
            aim: $aim,
            must: $must,
        }
    };
}

/// The rows of the table of targets in docs/performance.md.
const TARGETS: &[Target] = &[
    target!(1: Request CLUSTER_IP P50: LbConnect / Direct, Some(1.005), Some(1.01)),
    target!(2: Request CLUSTER_IP P50: LbTc / Direct, Some(1.02), Some(1.05)),
    target!(3: Bulk CLUSTER_IP Rate: LbConnect / Direct, Some(0.99), Some(0.95)),
    target!(3: Bulk CLUSTER_IP Rate: LbTc / Direct, Some(0.98), Some(0.95)),
    target!(4: Connect CLUSTER_IP Rate: LbConnect / Direct, Some(0.985), None),
    target!(4: Connect CLUSTER_IP Rate: LbTc / Direct, Some(0.96), None),
    target!(4: Connect CLUSTER_IP Rate: LbConnect / Nftables, Some(1.15), Some(1.0)),
    target!(4: Connect CLUSTER_IP Rate: LbConnect / Iptables, None, Some(1.0)),
    target!(4: Connect CLUSTER_IP Rate: LbTc / Nftables, Some(1.15), Some(1.0)),
    target!(4: Connect CLUSTER_IP Rate: LbTc / Iptables, None, Some(1.0)),
    target!(10: Burst NODE_PORT Rate: LbTc / Iptables, Some(1.7), Some(1.3)),
    target!(10: Burst NODE_PORT Rate: LbXdp / Iptables, Some(4.5), Some(3.0)),
    // What the node itself spends on a datagram that it forwards, without both ends.
    target!(10: Forward NODE_PORT Above: Iptables / LbTc, None, None),
    target!(10: Forward NODE_PORT Above: Iptables / LbXdp, None, None),
    target!(10: Forward NODE_PORT Above: Nftables / LbTc, None, None),
    target!(10: Forward NODE_PORT Above: Iptables / LbDsr, None, None),
    target!(10: Forward NODE_PORT Above: Iptables / Relayed, None, None),
    target!(24: Request POD_IP P50: LbConnect / Direct, Some(1.03), Some(1.06)),
    target!(24: Request POD_IP P50: LbTc / Direct, Some(1.03), Some(1.06)),
    target!(24: Request POD_IP P50: LbTc / Empty, Some(1.01), Some(1.03)),
    target!(25: Connect CLUSTER_IP P50: LbConnect / Direct, Some(1.05), Some(1.08)),
    target!(25: Connect CLUSTER_IP P50: LbTc / Direct, Some(1.10), Some(1.15)),
    target!(25: Connect CLUSTER_IP P50: Nftables / LbConnect, Some(1.25), None),
    target!(25: Connect CLUSTER_IP P50: Iptables / LbConnect, Some(1.4), None),
    target!(25: Connect CLUSTER_IP P50: Nftables / LbTc, Some(1.25), None),
    target!(25: Connect CLUSTER_IP P50: Iptables / LbTc, Some(1.4), None),
    target!(26: Connect NODE_PORT P50: Nftables / LbTc, Some(1.3), Some(1.15)),
    target!(26: Connect NODE_PORT P50: Iptables / LbTc, Some(1.6), Some(1.3)),
    target!(26: Burst NODE_PORT Rate: LbTc / Nftables, Some(1.6), Some(1.3)),
    target!(26: Burst NODE_PORT Rate: LbTc / Iptables, Some(1.8), Some(1.4)),
    // How much of it is the kernel's forwarding, which lb leaves out.
    target!(26: Connect NODE_PORT P50: Nftables / Relayed, None, None),
    target!(26: Connect NODE_PORT P50: Iptables / Relayed, None, None),
    target!(26: Burst NODE_PORT Rate: Relayed / Nftables, None, None),
    target!(26: Burst NODE_PORT Rate: Relayed / Iptables, None, None),
];

/// A ratio of two lanes.
#[derive(Clone, Debug, Serialize)]
pub struct Ratio {
    /// The row of the target in docs/performance.md; 0 for none.
    pub row: u8,
    /// The load, the route and the family.
    pub case: Case,
    /// What is compared.
    pub measure: Measure,
    /// The lane that is divided.
    pub of: Proxy,
    /// The lane that it is divided by.
    pub to: Proxy,
    /// Whether the limits are lower ones.
    pub is_more_better: bool,
    /// What a change should keep.
    pub aim: Option<f64>,
    /// What must be kept.
    pub must: Option<f64>,
    /// Median of the rounds and its interval.
    pub measured: Estimate,
}

impl Ratio {
    fn new(case: Case, samples: &Samples, measure: Measure, [of, to]: [Proxy; 2]) -> Option<Self> {
        let of_case = samples.get(&case)?;
        let [of_lane, to_lane] = [of_case.get(&of)?, of_case.get(&to)?];
        // Only `Above` needs the direct lane.
        let direct = of_case.get(&Proxy::Direct).unwrap_or(to_lane);
        let ratios = of_lane
            .iter()
            .zip(to_lane)
            .zip(direct)
            .map(|((of, to), direct)| measure.of(of, direct) / measure.of(to, direct));
        let measured = Estimate::of(ratios.collect());
        let is_kube_proxy = matches!(of, Proxy::Nftables | Proxy::Iptables);
        let is_more_better = measure == Measure::Rate || is_kube_proxy;
        Some(Self {
            row: 0,
            case,
            measure,
            of,
            to,
            is_more_better,
            aim: None,
            must: None,
            measured,
        })
    }

    /// How it is judged, by its median.
    pub fn verdict(&self) -> Verdict {
        let misses = |limit: Option<f64>| {
            limit.is_some_and(|limit| match self.is_more_better {
                true => self.measured.median < limit,
                false => self.measured.median > limit,
            })
        };
        match (self.aim, self.must) {
            (None, None) => Verdict::Unjudged,
            _ if misses(self.must) => Verdict::FailedMust,
            _ if misses(self.aim) => Verdict::MissedAim,
            _ => Verdict::Ok,
        }
    }
}

/// The median sample of a lane.
#[derive(Clone, Debug, Serialize)]
pub struct Level {
    /// The load, the route and the family.
    pub case: Case,
    /// The lane.
    pub lane: Proxy,
    /// The median time of an operation, us.
    pub p50_us: Estimate,
    /// Its 99th percentile, us.
    pub p99_us: Estimate,
    /// Requests, connections, datagrams or bytes each second.
    pub rate: Estimate,
}

/// A lane against no proxy, for plots.
#[derive(Clone, Debug, Serialize)]
pub struct Relative {
    /// The load, the route and the family.
    pub case: Case,
    /// The lane.
    pub lane: Proxy,
    /// The ratio; with [`Load::Forward`] what the median time is above that without a proxy, us.
    pub value: Estimate,
}

impl Relative {
    fn all(samples: &Samples) -> Vec<Self> {
        let of_case = |(case, lanes): (&Case, &BTreeMap<Proxy, Vec<Sample>>)| {
            let case = *case;
            let direct = lanes.get(&Proxy::Direct)?;
            let others = lanes.iter().filter(|(lane, _)| **lane != Proxy::Direct);
            let relative = others.map(move |(lane, samples)| {
                let pairs = samples.iter().zip(direct);
                let values =
                    pairs.map(|(one, direct)| match (case.load, Measure::usual(case.load)) {
                        (Load::Forward, _) => one.p50_us - direct.p50_us,
                        (_, Measure::Rate) => one.rate / direct.rate,
                        _ => one.p50_us / direct.p50_us,
                    });
                Self { case, lane: *lane, value: Estimate::of(values.collect()) }
            });
            Some(relative.collect::<Vec<_>>())
        };
        samples.iter().filter_map(of_case).flatten().collect()
    }
}

/// All that was measured, and how it is judged.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Why no figure can be trusted; empty if they can.
    pub invalid: Vec<String>,
    /// Where it was measured.
    pub machine: Machine,
    /// What was measured.
    pub plan: Plan,
    /// Direct against direct.
    pub controls: Vec<Ratio>,
    /// Ratios with limits.
    pub ratios: Vec<Ratio>,
    /// The medians of every lane.
    pub levels: Vec<Level>,
    /// Every lane against no proxy.
    pub relative: Vec<Relative>,
    /// Known tools.
    pub tools: tools::Measured,
    /// What grows with the cluster.
    pub scaling: scaling::Measured,
}

impl Report {
    /// Compares the lanes.
    pub fn of(measured: Measured, plan: &Plan, machine: Machine) -> Self {
        let Measured { samples, tools, scaling } = measured;
        let samples = &samples;
        let controls: Vec<_> = samples.keys().filter_map(|case| control(*case, samples)).collect();
        let off = |ratio: &&Ratio| (ratio.measured.median - 1.0).abs() > CONTROL;
        let invalid = controls.iter().filter(off).map(|ratio| {
            let percent = (ratio.measured.median - 1.0) * 100.0;
            format!("{}: direct differs from itself by {percent:.1} %", ratio.case.title())
        });
        let invalid = invalid.collect();
        let ratios = TARGETS.iter().flat_map(|target| judged(target, samples)).collect();
        let levels = samples.iter().flat_map(|(case, lanes)| {
            lanes.iter().map(|(lane, samples)| level(*case, *lane, samples))
        });
        let levels = levels.collect();
        let relative = Relative::all(samples);
        let plan = plan.clone();
        Self { invalid, machine, plan, controls, ratios, levels, relative, tools, scaling }
    }

    /// Whether the run is void or a must is missed.
    pub fn fails(&self) -> bool {
        let ratios = self.ratios.iter().map(Ratio::verdict);
        let curves = self.scaling.curves.iter().flat_map(Curve::verdicts);
        let removals = self.scaling.removals.iter().map(Removal::verdict);
        let mut verdicts = ratios.chain(curves).chain(removals);
        !self.invalid.is_empty() || verdicts.any(|verdict| verdict == Verdict::FailedMust)
    }
}

fn control(case: Case, samples: &Samples) -> Option<Ratio> {
    Ratio::new(case, samples, Measure::usual(case.load), [Proxy::Control, Proxy::Direct])
}

fn judged(target: &Target, samples: &Samples) -> Vec<Ratio> {
    let meets = |case: &&Case| case.load == target.load && target.routes.contains(&case.route);
    let ratio = |case: &Case| {
        let ratio = Ratio::new(*case, samples, target.measure, [target.of, target.to])?;
        Some(Ratio { row: target.row, aim: target.aim, must: target.must, ..ratio })
    };
    samples.keys().filter(meets).filter_map(ratio).collect()
}

fn level(case: Case, lane: Proxy, samples: &[Sample]) -> Level {
    let of = |value: fn(&Sample) -> f64| Estimate::of(samples.iter().map(value).collect());
    Level {
        case,
        lane,
        p50_us: of(|sample| sample.p50_us),
        p99_us: of(|sample| sample.p99_us),
        rate: of(|sample| sample.rate),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One case with these median times by lane, two rounds each.
    fn samples(load: Load, route: Route, times: &[(Proxy, [f64; 2])]) -> Samples {
        let sample = |p50_us| Sample { p50_us, p99_us: p50_us, rate: 1e6 / p50_us };
        let lanes: BTreeMap<_, _> =
            times.iter().map(|(lane, times)| (*lane, times.map(sample).to_vec())).collect();
        Samples::from([(Case { route, load, is_v6: false }, lanes)])
    }

    fn report(samples: Samples) -> Report {
        let measured = Measured { samples, ..Measured::default() };
        Report::of(measured, &Plan::default(), Machine::default())
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        // The machine was ten times slower in the second round.
        let times = [(Proxy::Direct, [10.0, 100.0]), (Proxy::LbTc, [10.3, 103.0])];
        let report = report(samples(Load::Request, Route::ClusterIpFar, &times));
        let [ratio] = &report.ratios[..] else { panic!("{report:?}") };
        assert!((ratio.measured.median - 1.03).abs() < 1e-9, "{ratio:?}");
        assert_eq!((ratio.row, ratio.verdict()), (2, Verdict::MissedAim));
    }

    #[test]
    fn times_are_to_be_small_and_leads_are_to_be_large() {
        let verdict = |times: &[(Proxy, [f64; 2])], row| {
            let report = report(samples(Load::Connect, Route::NodePort, times));
            let ratio = report.ratios.iter().find(|ratio| ratio.row == row).expect("the row");
            (ratio.verdict(), report.fails())
        };
        let ahead = |nftables| [(Proxy::LbTc, [10.0; 2]), (Proxy::Nftables, [nftables; 2])];
        assert_eq!(verdict(&ahead(13.0), 26), (Verdict::Ok, false));
        assert_eq!(verdict(&ahead(12.0), 26), (Verdict::MissedAim, false));
        assert_eq!(verdict(&ahead(11.0), 26), (Verdict::FailedMust, true));
    }

    #[test]
    fn what_a_node_spends_is_above_the_way_to_it() {
        let times = [
            (Proxy::Direct, [10.0, 20.0]),
            (Proxy::LbTc, [11.0, 22.0]),
            (Proxy::Iptables, [13.0, 26.0]),
        ];
        let report = report(samples(Load::Forward, Route::NodePort, &times));
        let mut ratios = report.ratios.iter();
        let ratio = ratios.find(|ratio| (ratio.of, ratio.to) == (Proxy::Iptables, Proxy::LbTc));
        let ratio = ratio.expect("row 10");
        assert!((ratio.measured.median - 3.0).abs() < 1e-9, "{ratio:?}");
    }

    #[test]
    fn a_control_that_is_off_voids_the_run() {
        let is_void = |again: f64| {
            let times = [(Proxy::Direct, [100.0; 2]), (Proxy::Control, [again; 2])];
            let report = report(samples(Load::Request, Route::PodIp, &times));
            assert_eq!(report.markdown(&[]).contains("INVALID RUN"), report.fails());
            report.fails()
        };
        assert_eq!([96.9, 97.1, 102.9, 103.1].map(is_void), [true, false, false, true]);
    }
}
