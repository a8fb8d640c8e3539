//! What is measured turn about, and the figures that come of it.
//!
//! A figure and the floor that it stands on have their turns in the same rounds. So has the
//! control: a lane that is measured twice, and whose second cost must be its first.

use anyhow::{Result, ensure};
use lb_common::abi::counter::{Hook, Reason};

use super::{
    harness::{Harness, Run, Shot},
    report::{Figure, Floor, Outcome, control},
    stats::Estimate,
    tables::Datapath,
};

/// A figure to measure.
pub struct Lane {
    /// The number of the target that it belongs to; 0 for none.
    pub row: u8,
    /// What is measured.
    pub name: String,
    /// Aim and must, ns.
    pub limits: Option<(f64, f64)>,
    /// What the limits depend on.
    pub footing: Option<Footing>,
    /// How to measure it.
    pub shot: Shot,
    /// How every packet must end.
    pub end: End,
    /// Whether it is measured a second time, as the control.
    pub is_control: bool,
}

/// How a packet ends.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// The step succeeds.
    Step,
    /// COUNTERS say so.
    Counted(Hook, Reason),
}

/// The lane that a figure stands on.
#[derive(Clone, Debug)]
pub struct Footing {
    /// Its name.
    pub step: String,
    /// What the step cost, ns, where the limits are from.
    pub anchor: f64,
}

/// Measures `lanes` turn about, each so many `rounds`.
pub fn measure(
    harness: &Harness,
    datapath: &Datapath,
    rounds: usize,
    lanes: &[Lane],
) -> Vec<Figure> {
    let controls = lanes.iter().filter(|lane| lane.is_control);
    let all: Vec<&Lane> = lanes.iter().chain(controls).collect();
    let shots: Vec<Shot> = all.iter().map(|lane| lane.shot.clone()).collect();
    let mut before = Vec::new();
    let samples = harness
        .measure(&shots, rounds, |index, run| check(datapath, all[index].end, run, &mut before));
    let (first, again) = samples.split_at(lanes.len());
    let figures = lanes.iter().zip(first).map(|(lane, samples)| {
        let outcome = match samples {
            Ok(samples) => Outcome::Measured(Estimate::of(samples.clone())),
            Err(error) => Outcome::Invalid(format!("{error:#}")),
        };
        let figure = Figure {
            row: lane.row,
            aim: lane.limits.map(|limits| limits.0),
            must: lane.limits.map(|limits| limits.1),
            ..Figure::told(&lane.name, outcome)
        };
        match &lane.footing {
            Some(footing) => stand(figure, footing, lanes, first),
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

fn stand(
    figure: Figure,
    footing: &Footing,
    lanes: &[Lane],
    samples: &[Result<Vec<f64>>],
) -> Figure {
    let step = lanes.iter().position(|lane| lane.name == footing.step);
    let Some(Ok(samples)) = step.map(|index| &samples[index]) else {
        let why = format!("{} was not measured", footing.step);
        return Figure { outcome: Outcome::Invalid(why), ..figure };
    };
    let cost = Estimate::of(samples.clone()).median;
    figure.upon(Floor { steps: footing.step.clone(), cost, anchor: footing.anchor })
}

fn check(datapath: &Datapath, end: End, run: Option<Run>, before: &mut Vec<u64>) -> Result<()> {
    const SHOT: i32 = 2;
    let (hook, reason) = match end {
        End::Step => {
            ensure!(run.is_none_or(|run| run.returned != SHOT), "the step failed");
            return Ok(());
        }
        End::Counted(hook, reason) => (hook, reason),
    };
    let now = datapath.counters.sums()?;
    if let Some(run) = run {
        let expected = hook.counter(reason) as usize;
        let met = now[expected] - before[expected];
        let all = now.iter().sum::<u64>() - before.iter().sum::<u64>();
        let (name, packets) = (reason.name(), u64::from(run.packets));
        ensure!(
            met == packets && all == packets,
            "{met} of {packets} packets ended as {name}, {all} were counted"
        );
    }
    *before = now;
    Ok(())
}
