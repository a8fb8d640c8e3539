//! Lanes, which are measured in turn, and the figures that result.
//!
//! A figure and its floor have their turns in the same rounds. So does the control: a lane that
//! is measured twice, and whose two costs must be equal.

use std::ops::Range;

use anyhow::{Result, ensure};
use lb_common::{
    abi::counter::{Hook, Reason},
    packet::IP_OFFSET,
};

use super::{
    harness::{Harness, Pace, Run, Shot},
    report::{Figure, Floor, Outcome, control},
    stats::Estimate,
    tables::Datapath,
};

/// A figure to measure.
#[derive(Clone)]
pub struct Lane {
    /// The number of the target that it belongs to; 0 for none.
    pub row: u8,
    /// What is measured.
    pub name: String,
    /// Aim and must, ns.
    pub limits: Option<(f64, f64)>,
    /// The lane that the limits depend on.
    pub floor: Option<FloorLane>,
    /// How to measure it.
    pub shot: Shot,
    /// How every packet must end.
    pub end: End,
    /// The head of the resulting frame, up to its ports. Checksums in it are not compared. Only
    /// for lanes with a single flow.
    pub onward: Option<Vec<u8>>,
    /// The lane that handles the packets next: its cost is part of this figure.
    pub then: Option<String>,
    /// The lane, measured at both paces, whose difference is what single packets cost more. That
    /// difference is subtracted from this figure before it is judged.
    pub pace: Option<String>,
    /// Whether it is measured a second time, as the control.
    pub is_control: bool,
}

impl Lane {
    /// The same at this pace, with the pace in its name. Single packets vary too much for a
    /// control.
    #[must_use]
    pub fn at(self, pace: Pace) -> Self {
        let is_control = self.is_control && pace == Pace::Running;
        let shot = Shot { pace, ..self.shot };
        Self { name: self.name + suffix(pace), shot, is_control, ..self }
    }
}

/// How much more a single packet of the lane of this name costs than one of many, ns; at least
/// 0.
pub fn single_cost(figures: &[Figure], name: &str) -> Option<f64> {
    let median = |name: String| {
        let figure = figures.iter().find(|figure| figure.name == name)?;
        let Outcome::Measured(estimate) = &figure.outcome else { return None };
        Some(estimate.median)
    };
    let [running, single] =
        [Pace::Running, Pace::Single].map(|pace| median(name.to_owned() + suffix(pace)));
    Some((single? - running?).max(0.0))
}

fn suffix(pace: Pace) -> &'static str {
    match pace {
        Pace::Running => "",
        Pace::Single => ", one packet a call",
    }
}

/// How a packet ends.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// The step of the last packet succeeds, and returns this.
    Step(Verdict),
    /// COUNTERS count the packet here, with this reason, and the program returns this.
    Counted(Hook, Reason, Verdict),
}

/// What a program returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict(i32);

impl Verdict {
    /// tc: continue to the stack.
    pub const NEXT: Self = Self(-1);
    /// tc: into or out of a device.
    pub const REDIRECT: Self = Self(7);
    /// XDP: on to tc.
    pub const XDP_PASS: Self = Self(2);
    /// XDP: back out of the device.
    pub const XDP_TX: Self = Self(3);
}

/// The lane that is a figure's floor.
#[derive(Clone, Debug)]
pub struct FloorLane {
    /// Its name.
    pub step: String,
    /// What the step costs on the reference machine of docs/performance.md, ns.
    pub anchor: f64,
}

impl FloorLane {
    /// The same lane at this pace (see [`Lane::at`]).
    #[must_use]
    pub fn at(self, pace: Pace) -> Self {
        Self { step: self.step + suffix(pace), ..self }
    }
}

/// Measures `lanes` in turn, each in so many `rounds`.
pub fn measure(
    harness: &Harness,
    datapath: &Datapath,
    rounds: usize,
    lanes: &[Lane],
) -> Vec<Figure> {
    let controls = lanes.iter().filter(|lane| lane.is_control);
    let all: Vec<&Lane> = lanes.iter().chain(controls).collect();
    let shots: Vec<Shot> = all.iter().map(|lane| lane.shot.clone()).collect();
    let tried: Vec<Result<()>> = lanes.iter().map(|lane| one_by_one(harness, lane)).collect();
    let mut before = Vec::new();
    let mut samples = harness
        .measure(&shots, rounds, |index, run| check(datapath, all[index].end, run, &mut before));
    for (samples, tried) in samples.iter_mut().zip(tried) {
        if let Err(error) = tried {
            *samples = Err(error);
        }
    }
    let (first, again) = samples.split_at(lanes.len());
    let figures = lanes.iter().zip(first).map(|(lane, samples)| {
        let outcome = match whole(lane, samples, lanes, first) {
            Ok(samples) => Outcome::Measured(Estimate::of(samples)),
            Err(error) => Outcome::Invalid(error),
        };
        let figure = Figure {
            row: lane.row,
            aim: lane.limits.map(|limits| limits.0),
            must: lane.limits.map(|limits| limits.1),
            ..Figure::unjudged(&lane.name, outcome)
        };
        match &lane.floor {
            Some(floor) => with_floor(figure, floor, lanes, first),
            None => figure,
        }
    });
    let mut figures: Vec<Figure> = figures.collect();
    let twice = lanes.iter().zip(first).filter(|(lane, _)| lane.is_control);
    for ((lane, once), again) in twice.zip(again) {
        if let (Ok(once), Ok(again)) = (once, again) {
            figures.push(control(&lane.name, once, again));
        }
    }
    figures
}

/// The samples of a lane, each with that of the lane that handles its packets next.
fn whole(
    lane: &Lane,
    samples: &Result<Vec<f64>>,
    lanes: &[Lane],
    all: &[Result<Vec<f64>>],
) -> Result<Vec<f64>, String> {
    let samples = samples.as_ref().map_err(|error| format!("{error:#}"))?;
    let Some(then) = &lane.then else { return Ok(samples.clone()) };
    let position = lanes.iter().position(|other| other.name == *then);
    let Some(Ok(others)) = position.map(|index| &all[index]) else {
        return Err(format!("{then} was not measured"));
    };
    Ok(samples.iter().zip(others).map(|(one, other)| one + other).collect())
}

/// How many packets are given to a program one by one.
const TRIED: usize = 256;

/// Compares the verdicts of some packets: of a measured run only the last verdict is known.
fn one_by_one(harness: &Harness, lane: &Lane) -> Result<()> {
    let End::Counted(_, _, expected) = lane.end else { return Ok(()) };
    for number in 0..TRIED {
        let run = harness.once(&lane.shot)?;
        let verdict = Verdict(run.returned);
        ensure!(verdict == expected, "packet {number} of {TRIED} ended as {verdict:?}");
        if let Some(onward) = &lane.onward {
            ensure!(
                is_like(&run.frame, onward),
                "the packet became {:02x?}, not {onward:02x?}",
                run.frame
            );
        }
    }
    Ok(())
}

/// Whether a frame has the link-layer and IP addresses, and the ports, of `head`.
fn is_like(frame: &[u8], head: &[u8]) -> bool {
    let same = |bytes: Range<usize>| {
        frame.get(bytes.clone()).is_some_and(|bytes_of| Some(bytes_of) == head.get(bytes))
    };
    let ports = head.len();
    let addresses = if ports == IP_OFFSET + 24 { IP_OFFSET + 12 } else { IP_OFFSET + 8 };
    same(0..IP_OFFSET) && same(addresses..ports)
}

fn with_floor(
    figure: Figure,
    floor: &FloorLane,
    lanes: &[Lane],
    samples: &[Result<Vec<f64>>],
) -> Figure {
    let step = lanes.iter().position(|lane| lane.name == floor.step);
    let Some(Ok(samples)) = step.map(|index| &samples[index]) else {
        let why = format!("{} was not measured", floor.step);
        return Figure { outcome: Outcome::Invalid(why), ..figure };
    };
    let cost = Estimate::of(samples.clone()).median;
    figure.with_floor(Floor { steps: floor.step.clone(), cost, anchor: floor.anchor })
}

fn check(datapath: &Datapath, end: End, run: Option<Run>, before: &mut Vec<u64>) -> Result<()> {
    let (hook, reason, verdict) = match end {
        End::Step(verdict) => {
            ensure!(run.is_none_or(|run| Verdict(run.returned) == verdict), "the step failed");
            return Ok(());
        }
        End::Counted(hook, reason, verdict) => (hook, reason, verdict),
    };
    let now = datapath.counters.sums()?;
    if let Some(run) = run {
        let ends = ends(before, &now);
        let expected = [(hook, reason, u64::from(run.packets))];
        ensure!(ends == expected, "{} packets ended as {ends:?}", run.packets);
        let last = Verdict(run.returned);
        ensure!(last == verdict, "the last packet ended as {last:?}, not {verdict:?}");
    }
    *before = now;
    Ok(())
}

/// How many packets each hook counted with each reason between two readings of COUNTERS.
fn ends(before: &[u64], now: &[u64]) -> Vec<(Hook, Reason, u64)> {
    let all = Hook::ALL.iter().flat_map(|hook| Reason::ALL.iter().map(move |why| (*hook, *why)));
    all.filter_map(|(hook, reason)| {
        let counter = hook.counter(reason) as usize;
        let count = now.get(counter)?.checked_sub(*before.get(counter)?)?;
        (count != 0).then_some((hook, reason, count))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::{
        super::harness::{EMPTY, Wrapper},
        *,
    };

    #[test]
    fn every_counter_that_moved_is_named() {
        let mut now = vec![7; lb_common::abi::counter::COUNTERS as usize];
        let before = now.clone();
        assert_eq!(ends(&before, &now), []);
        now[Hook::Xdp.counter(Reason::LeftToTc) as usize] += 2;
        now[Hook::FromDevice.counter(Reason::NoRoute) as usize] += 1;
        assert_eq!(
            ends(&before, &now),
            [(Hook::FromDevice, Reason::NoRoute, 1), (Hook::Xdp, Reason::LeftToTc, 2)]
        );
    }

    fn lane(name: &str, then: Option<&str>) -> Lane {
        let shot = Shot {
            wrapper: Wrapper::tc("request4"),
            frame: Vec::new(),
            flows: 1,
            target: EMPTY,
            base: EMPTY,
            ifindex: 0,
            pace: Pace::Running,
        };
        Lane {
            row: 0,
            name: name.to_owned(),
            limits: None,
            floor: None,
            shot,
            end: End::Step(Verdict::NEXT),
            onward: None,
            then: then.map(str::to_owned),
            pace: None,
            is_control: false,
        }
    }

    #[test]
    fn the_next_lane_is_added_round_by_round() {
        let lanes = [lane("xdp", Some("tc")), lane("tc", None), lane("gone", Some("elsewhere"))];
        let all = [Ok(vec![1.0, 2.0]), Ok(vec![30.0, 10.0]), Ok(vec![1.0, 1.0])];
        let wholes = [0, 1, 2].map(|index| whole(&lanes[index], &all[index], &lanes, &all));
        assert_eq!(wholes[..2], [Ok(vec![31.0, 12.0]), Ok(vec![30.0, 10.0])]);
        assert!(wholes[2].is_err(), "a part alone is no figure");
    }

    #[test]
    fn the_cost_of_single_packets_is_the_difference_of_both_paces() {
        let figures = |running, single| {
            [("x", running), ("x, one packet a call", single)].map(|(name, median)| {
                Figure::unjudged(name, Outcome::Measured(Estimate::of(vec![median])))
            })
        };
        assert_eq!(single_cost(&figures(50.0, 80.0), "x"), Some(30.0));
        assert_eq!(single_cost(&figures(50.0, 49.0), "x"), Some(0.0));
        assert_eq!(single_cost(&figures(50.0, 80.0)[..1], "x"), None, "at one pace alone");
    }

    #[test]
    fn checksums_do_not_count_in_a_head() {
        let frame: Vec<u8> = (0..64).collect();
        let changed = |at: usize| {
            let mut frame = frame.clone();
            frame[at] ^= 0xff;
            frame
        };
        let (ipv4, ipv6) = (IP_OFFSET + 20 + 4, IP_OFFSET + 40 + 4);
        for ports in [ipv4, ipv6] {
            assert!(is_like(&frame, &frame[..ports]));
            assert!(!is_like(&changed(0), &frame[..ports]), "the next hop");
            assert!(!is_like(&changed(ports - 1), &frame[..ports]), "the port");
            assert!(!is_like(&frame[..ports - 1], &frame[..ports]), "too short");
        }
        let header_checksum = changed(IP_OFFSET + 10);
        assert!(is_like(&header_checksum, &frame[..ipv4]));
        assert!(!is_like(&changed(IP_OFFSET + 8), &frame[..ipv6]), "the source");
    }
}
