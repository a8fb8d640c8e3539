//! How a figure changes with what grows.

use std::collections::BTreeMap;

use serde::Serialize;

use super::super::case::Proxy;
use super::super::exchange::Sample;
use super::Axis;
use crate::tools::bench::report::Verdict;
use crate::tools::bench::stats::Estimate;

/// Samples by lane and size, one for each round.
pub type Samples = BTreeMap<(Axis, Proxy, u32), Vec<Sample>>;

/// The samples of a lane at all sizes.
#[derive(Clone, Debug, Serialize)]
pub struct Curve {
    /// What grows, and what is measured meanwhile.
    pub axis: Axis,
    /// The lane.
    pub lane: Proxy,
    /// From small to large.
    pub points: Vec<Point>,
}

/// The samples of a lane at one size.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// How large it is.
    pub size: u32,
    /// The median time of an operation, us.
    pub p50_us: Estimate,
    /// Its 99th percentile, us.
    pub p99_us: Estimate,
    /// The ratio of the medians to that of the smallest size in the same round.
    pub p50_growth: Estimate,
    /// The same of the 99th percentiles.
    pub p99_growth: Estimate,
}

impl Curve {
    /// All curves.
    pub fn all(samples: &Samples) -> Vec<Self> {
        let mut curves: Vec<Self> = Vec::new();
        for ((axis, lane, size), of_size) in samples {
            let is_next = |curve: &Self| (curve.axis, curve.lane) == (*axis, *lane);
            if !curves.last().is_some_and(is_next) {
                curves.push(Self { axis: *axis, lane: *lane, points: Vec::new() });
            }
            let Some(curve) = curves.last_mut() else { continue };
            let least = curve.points.first().map_or(*size, |point| point.size);
            let Some(of_least) = samples.get(&(*axis, *lane, least)) else { continue };
            curve.points.push(Point::new(*size, of_size, of_least));
        }
        curves
    }

    /// How much larger the figures are at the last size: median, 99th percentile.
    pub fn growth(&self) -> Option<[Estimate; 2]> {
        let last = self.points.last().filter(|_| self.points.len() > 1)?;
        Some([last.p50_growth, last.p99_growth])
    }

    /// How lb is judged by the growth of its medians and of its 99th percentiles; nothing else is.
    pub fn verdicts(&self) -> [Verdict; 2] {
        let limits = self.axis.limits().filter(|_| self.lane.agent_modes().is_some());
        let (Some(limits), Some([p50, p99])) = (limits, self.growth()) else {
            return [Verdict::Unjudged; 2];
        };
        [(p50, limits[0]), (p99, limits[1])].map(|(growth, (aim, must))| match growth.median {
            growth if growth > must => Verdict::FailedMust,
            growth if growth > aim => Verdict::MissedAim,
            _ => Verdict::Ok,
        })
    }
}

impl Point {
    fn new(size: u32, samples: &[Sample], of_least: &[Sample]) -> Self {
        let of = |value: fn(&Sample) -> f64| Estimate::of(samples.iter().map(value).collect());
        let growth = |value: fn(&Sample) -> f64| {
            let pairs = samples.iter().zip(of_least);
            Estimate::of(pairs.map(|(one, least)| value(one) / value(least)).collect())
        };
        Self {
            size,
            p50_us: of(|sample| sample.p50_us),
            p99_us: of(|sample| sample.p99_us),
            p50_growth: growth(|sample| sample.p50_us),
            p99_growth: growth(|sample| sample.p99_us),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two rounds, in the second of which the machine was ten times slower.
    fn samples(lane: Proxy, times: &[(u32, f64)]) -> Samples {
        let sample = |time| Sample { p50_us: time, p99_us: 2.0 * time, rate: 0.0 };
        let at = |(size, time): &(u32, f64)| {
            ((Axis::Services, lane, *size), vec![sample(*time), sample(time * 10.0)])
        };
        times.iter().map(at).collect()
    }

    #[test]
    fn growth_is_taken_round_by_round_from_the_smallest_size() {
        let curves = Curve::all(&samples(Proxy::LbTc, &[(1, 10.0), (1_000, 10.2), (10_000, 10.4)]));
        let [curve] = &curves[..] else { panic!("{curves:?}") };
        let sizes: Vec<_> = curve.points.iter().map(|point| point.size).collect();
        assert_eq!(sizes, [1, 1_000, 10_000]);
        let [p50, p99] = curve.growth().expect("three points");
        assert!((p50.median - 1.04).abs() < 1e-9 && (p99.median - 1.04).abs() < 1e-9, "{p50:?}");
        assert_eq!(curve.verdicts(), [Verdict::MissedAim, Verdict::Ok]);
    }

    #[test]
    fn lb_alone_is_judged_by_its_growth() {
        let verdicts =
            |lane, last| Curve::all(&samples(lane, &[(1, 10.0), (9, last)]))[0].verdicts();
        assert_eq!(verdicts(Proxy::LbConnect, 10.2), [Verdict::Ok; 2]);
        assert_eq!(verdicts(Proxy::LbConnect, 11.1), [Verdict::FailedMust; 2]);
        assert_eq!(verdicts(Proxy::Nftables, 50.0), [Verdict::Unjudged; 2]);
    }
}
