//! The report: what was to be reached, what was measured, and whether it suffices.

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
    /// In which unit.
    pub unit: &'static str,
    /// What it should not exceed.
    pub aim: Option<f64>,
    /// What it must not exceed.
    pub must: Option<f64>,
    /// The measurement, or why it is void.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// What the limits are raised by: how much more the floor cost in the same rounds than on
    /// the machine that they are from. Caches that others use too make a table's memory slow,
    /// and no program can help it.
    pub allowance: f64,
    /// What the steps that cannot be left out cost in the same run, and which they are.
    pub floor: Option<(f64, String)>,
}

/// A measurement, or why there is none.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// What was measured.
    Measured(Estimate),
    /// Why there is no measurement that can be trusted.
    Invalid(String),
}

/// What a figure says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There was nothing to reach.
    Told,
    /// The aim is reached.
    Ok,
    /// What must be reached is, the aim is not.
    MissedAim,
    /// What must be reached is not.
    FailedMust,
    /// There is no measurement that can be trusted.
    Invalid,
}

impl Figure {
    /// A figure that nothing is asked of, in nanoseconds.
    pub fn told(name: &str, outcome: Outcome) -> Self {
        let name = name.to_owned();
        Self {
            row: 0,
            name,
            unit: "ns",
            aim: None,
            must: None,
            outcome,
            allowance: 0.0,
            floor: None,
        }
    }

    /// Whether the figure suffices.
    pub fn verdict(&self) -> Verdict {
        let Outcome::Measured(estimate) = &self.outcome else { return Verdict::Invalid };
        let measured = estimate.median - self.allowance;
        let above = |limit: Option<f64>| limit.is_some_and(|limit| measured > limit);
        match (self.aim, self.must) {
            (None, None) => Verdict::Told,
            _ if above(self.must) => Verdict::FailedMust,
            _ if above(self.aim) => Verdict::MissedAim,
            _ => Verdict::Ok,
        }
    }

    /// Whether the figure is let pass only because its limit was raised.
    pub fn leans_on_allowance(&self) -> bool {
        let strict = Self { allowance: 0.0, ..self.clone() };
        strict.verdict() == Verdict::FailedMust && self.verdict() != Verdict::FailedMust
    }

    /// Whether the report as a whole fails by this figure.
    pub fn fails(&self) -> bool {
        matches!(self.verdict(), Verdict::FailedMust | Verdict::Invalid)
    }
}

/// The figures as an aligned table.
pub fn table(figures: &[Figure]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["row", "figure", "aim", "must", "measured", "95 %", "", "floor", "verdict"]);
    for figure in figures {
        let (measured, interval) = match &figure.outcome {
            Outcome::Measured(it) if it.low == it.high => (number(it.median), String::new()),
            Outcome::Measured(it) => {
                (number(it.median), format!("{} .. {}", number(it.low), number(it.high)))
            }
            Outcome::Invalid(_) => ("-".to_owned(), String::new()),
        };
        let limit = |limit: Option<f64>| limit.map_or_else(String::new, number);
        let row = if figure.row == 0 { String::new() } else { figure.row.to_string() };
        let floor = figure
            .floor
            .as_ref()
            .map_or_else(String::new, |(cost, steps)| format!("{} ({steps})", number(*cost)));
        table.add_row([
            row,
            figure.name.clone(),
            limit(figure.aim),
            limit(figure.must),
            measured,
            interval,
            figure.unit.to_owned(),
            floor,
            verdict(figure),
        ]);
    }
    for column in [0, 2, 3, 4, 5] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

fn number(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

fn verdict(figure: &Figure) -> String {
    let word = match (figure.verdict(), &figure.outcome) {
        (_, Outcome::Invalid(why)) => return format!("INVALID: {why}"),
        (Verdict::Told | Verdict::Invalid, _) => return String::new(),
        (Verdict::Ok, _) => "ok",
        (Verdict::MissedAim, _) => "MISSED aim",
        (Verdict::FailedMust, _) => "FAILED must",
    };
    if figure.allowance < 1.0 {
        return word.to_owned();
    }
    format!("{word} (limits + {:.0}, for slow memory)", figure.allowance)
}

/// Writes the figures as JSON.
///
/// # Errors
/// The file cannot be written.
pub fn write(figures: &[Figure], path: &Path) -> Result<()> {
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
            ..Figure::told("x", Outcome::Measured(Estimate { median, low: 0.0, high: 99.0 }))
        };
        let verdicts = [10.0, 10.1, 30.0, 30.1].map(|median| figure(median).verdict());
        use Verdict::{FailedMust, MissedAim, Ok};
        assert_eq!(verdicts, [Ok, MissedAim, MissedAim, FailedMust]);
        assert!(Figure::told("x", Outcome::Invalid(String::new())).fails());
        let raised = |median| Figure { allowance: 5.0, ..figure(median) };
        assert_eq!(
            [30.0, 35.0, 35.1].map(|it| raised(it).leans_on_allowance()),
            [false, true, false]
        );
    }
}
