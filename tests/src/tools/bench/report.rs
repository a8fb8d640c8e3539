//! The report: targets, measurements and verdicts.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets::NOTHING};
use serde::Serialize;

use super::stats::Estimate;

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// The number of the target that it belongs to; 0 for none.
    pub row: u8,
    /// What was measured.
    pub name: String,
    /// Its unit.
    pub unit: &'static str,
    /// The limit that a change should stay below, as docs/performance.md has it.
    pub aim: Option<f64>,
    /// The limit that must not be exceeded, as docs/performance.md has it.
    pub must: Option<f64>,
    /// The measurement, or why it is void.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The floor that was measured with it.
    pub floor: Option<Floor>,
    /// What `aim` and `must` are multiplied by, at least 1.
    pub scale: f64,
    /// What is subtracted from the measurement before it is judged, ns: the cost of measuring
    /// packets one by one, for figures that cannot be measured otherwise.
    pub single: f64,
}

/// The kernel's part of a figure, which no program can avoid; measured in turn with it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Floor {
    /// What it consists of.
    pub steps: String,
    /// What it costs here, ns.
    pub cost: f64,
    /// What it costs on the reference machine of docs/performance.md, ns.
    pub anchor: f64,
}

impl Floor {
    /// How much slower it is here; 1 where it is faster, because limits never shrink.
    pub fn scale(&self) -> f64 {
        (self.cost / self.anchor).max(1.0)
    }
}

/// A measurement, or why there is none.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// What was measured.
    Measured(Estimate),
    /// Why the measurement is void.
    Invalid(String),
}

/// How a figure is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The figure has no target.
    Unjudged,
    /// The figure is within its aim.
    Ok,
    /// The figure is within its must, but above its aim.
    MissedAim,
    /// The figure is above its must.
    FailedMust,
    /// The measurement is void.
    Invalid,
}

impl Figure {
    /// A figure without a target, in nanoseconds.
    pub fn unjudged(name: &str, outcome: Outcome) -> Self {
        let name = name.to_owned();
        Self {
            row: 0,
            name,
            unit: "ns",
            aim: None,
            must: None,
            outcome,
            floor: None,
            scale: 1.0,
            single: 0.0,
        }
    }

    /// The same figure, with limits raised as much as `floor` is slower here.
    #[must_use]
    pub fn with_floor(self, floor: Floor) -> Self {
        Self { scale: floor.scale(), floor: Some(floor), ..self }
    }

    /// The must on this machine.
    fn scaled_must(&self) -> Option<f64> {
        self.must.map(|must| must * self.scale)
    }

    /// The aim on this machine.
    fn scaled_aim(&self) -> Option<f64> {
        self.aim.map(|aim| aim * self.scale)
    }

    /// How the figure is judged.
    pub fn verdict(&self) -> Verdict {
        let Outcome::Measured(estimate) = &self.outcome else { return Verdict::Invalid };
        let judged = estimate.median - self.single;
        let above = |limit: Option<f64>| limit.is_some_and(|limit| judged > limit);
        match (self.aim, self.must) {
            (None, None) => Verdict::Unjudged,
            _ if above(self.scaled_must()) => Verdict::FailedMust,
            _ if above(self.scaled_aim()) => Verdict::MissedAim,
            _ => Verdict::Ok,
        }
    }

    /// Whether the whole report fails because of this figure.
    pub fn fails(&self) -> bool {
        matches!(self.verdict(), Verdict::FailedMust | Verdict::Invalid)
    }
}

/// How far a control may differ from itself, percent, before the run is void.
const CONTROL_MUST: f64 = 5.0;

/// Compares the cost of `name` in its first and its second turn of the same rounds: only noise
/// may make them differ.
pub fn control(name: &str, once: &[f64], again: &[f64]) -> Figure {
    let base = Estimate::of(once.to_vec()).median;
    let percents = again.iter().map(|again| (again / base - 1.0) * 100.0);
    let estimate = Estimate::of(percents.collect());
    let outcome = if estimate.median.abs() <= CONTROL_MUST {
        Outcome::Measured(estimate)
    } else {
        Outcome::Invalid(format!("off by {:.1} %", estimate.median))
    };
    let name = format!("{CONTROL}{name} against itself");
    Figure { unit: "%", must: Some(CONTROL_MUST), ..Figure::unjudged(&name, outcome) }
}

const CONTROL: &str = "control: ";

/// Whether a control makes the whole run void.
pub fn is_void(figures: &[Figure]) -> bool {
    figures
        .iter()
        .any(|figure| figure.name.starts_with(CONTROL) && figure.verdict() == Verdict::Invalid)
}

/// The figures as an aligned table.
pub fn table(figures: &[Figure]) -> String {
    const HEADER: [&str; 11] = [
        "row", "figure", "measured", "95 %", "", "floor", "steps", "x floor", "aim", "must",
        "verdict",
    ];
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(HEADER);
    for figure in figures {
        table.add_row(cells(figure));
    }
    for column in [0, 2, 3, 5, 7, 8, 9] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

fn cells(figure: &Figure) -> [String; 11] {
    let (measured, interval) = match &figure.outcome {
        Outcome::Measured(it) if it.low == it.high => (number(it.median), String::new()),
        Outcome::Measured(it) => {
            (number(it.median), format!("{} .. {}", number(it.low), number(it.high)))
        }
        Outcome::Invalid(_) => ("-".to_owned(), String::new()),
    };
    let row = if figure.row == 0 { String::new() } else { figure.row.to_string() };
    let [floor, steps, factor] = match (&figure.floor, &figure.outcome) {
        (Some(floor), Outcome::Measured(it)) => {
            let factor = format!("{:.2}", it.median / floor.cost);
            [number(floor.cost), steps(floor), factor]
        }
        _ => [const { String::new() }; 3],
    };
    let limit = |limit: Option<f64>| limit.map_or_else(String::new, number);
    let (aim, must) = (limit(figure.scaled_aim()), limit(figure.scaled_must()));
    let (name, unit) = (figure.name.clone(), figure.unit.to_owned());
    [row, name, measured, interval, unit, floor, steps, factor, aim, must, verdict(figure)]
}

fn steps(floor: &Floor) -> String {
    format!("{} (reference {})", floor.steps, number(floor.anchor))
}

fn number(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

fn verdict(figure: &Figure) -> String {
    let word = match (figure.verdict(), &figure.outcome) {
        (_, Outcome::Invalid(why)) => return format!("INVALID: {why}"),
        (Verdict::Unjudged | Verdict::Invalid, _) => return String::new(),
        (Verdict::Ok, _) => "ok",
        (Verdict::MissedAim, _) => "MISSED aim",
        (Verdict::FailedMust, _) => "FAILED must",
    };
    let mut text = word.to_owned();
    if figure.single > 0.0 {
        text += &format!(" (less {:.1} for one packet a call)", figure.single);
    }
    if figure.scale > 1.0 {
        text += &format!(" (limits x {:.2})", figure.scale);
    }
    text
}

/// Writes the figures as JSON.
///
/// # Errors
/// The file cannot be written.
pub fn write<T: Serialize + ?Sized>(figures: &T, path: &Path) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    let text = serde_json::to_string_pretty(figures)?;
    fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_judged_by_its_median() {
        let figure = |median| Figure {
            aim: Some(10.0),
            must: Some(30.0),
            ..Figure::unjudged("x", Outcome::Measured(Estimate { median, low: 0.0, high: 99.0 }))
        };
        let verdicts = [10.0, 10.1, 30.0, 30.1].map(|median| figure(median).verdict());
        use Verdict::{FailedMust, MissedAim, Ok};
        assert_eq!(verdicts, [Ok, MissedAim, MissedAim, FailedMust]);
        assert!(Figure::unjudged("x", Outcome::Invalid(String::new())).fails());
        let upon = |cost, median| {
            figure(median).with_floor(Floor { steps: "x".to_owned(), cost, anchor: 40.0 }).verdict()
        };
        assert_eq!([20.0, 20.1, 60.0, 60.1].map(|median| upon(80.0, median)), verdicts);
        assert_eq!(
            [10.0, 10.1, 30.0, 30.1].map(|median| upon(20.0, median)),
            verdicts,
            "a fast floor lowers no limit"
        );
        let less = |median| Figure { single: 29.0, ..figure(median) }.verdict();
        assert_eq!([39.0, 39.1, 59.0, 59.1].map(less), verdicts);
    }

    #[test]
    fn a_control_that_differs_from_itself_voids_the_run() {
        let off = |again| [control("x", &[100.0], &[again])];
        assert_eq!(
            [94.0, 96.0, 104.0, 106.0].map(|it| is_void(&off(it))),
            [true, false, false, true]
        );
        assert!(off(106.0)[0].fails());
        assert!(!is_void(&[Figure::unjudged("x", Outcome::Invalid(String::new()))]));
    }
}
