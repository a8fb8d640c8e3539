//! The figures and the table of them.

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;

/// A measurement, and what it should be at most; a rate, at least.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// The row of the table of targets in docs/performance.md; 0 = in none.
    pub row: u32,
    /// What was measured.
    pub name: String,
    /// How much it was.
    pub value: f64,
    /// Of what.
    pub unit: &'static str,
    /// The goal.
    pub aim: Option<f64>,
    /// The limit.
    pub must: Option<f64>,
    /// Above the limit the run fails. A time is not judged: the machine may be busy.
    pub is_judged: bool,
    /// The more, the better.
    pub is_rate: bool,
}

impl Figure {
    /// A count or an amount of memory, which does not depend on the machine.
    pub fn count(row: u32, name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        let name = name.into();
        Self { row, name, value, unit, aim: None, must: None, is_judged: true, is_rate: false }
    }

    /// A time on this machine.
    pub fn time(row: u32, name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { is_judged: false, ..Self::count(row, name, value, unit) }
    }

    /// What this machine does in a second.
    pub fn rate(row: u32, name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { is_rate: true, ..Self::time(row, name, value, unit) }
    }

    /// With a goal and a limit.
    #[must_use]
    pub fn limits(mut self, aim: f64, must: f64) -> Self {
        (self.aim, self.must) = (Some(aim), Some(must));
        self
    }

    /// With the name of what it is a figure of in front.
    #[must_use]
    pub fn of(mut self, what: &str) -> Self {
        self.name = format!("{what}: {}", self.name);
        self
    }

    /// Whether the run fails because of it.
    pub fn fails(&self) -> bool {
        self.is_judged && self.misses(self.must)
    }

    fn misses(&self, limit: Option<f64>) -> bool {
        limit.is_some_and(|limit| match self.is_rate {
            true => self.value < limit,
            false => self.value > limit,
        })
    }

    fn verdict(&self) -> &'static str {
        match (self.misses(self.must), self.misses(self.aim), self.is_judged) {
            (true, _, true) => "FAILED",
            (true, _, false) => "must missed",
            (false, true, _) => "aim missed",
            (false, false, _) if self.aim.is_some() => "ok",
            (false, false, _) => "",
        }
    }
}

/// All figures as a table.
pub fn table(figures: &[Figure]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["row", "figure", "measured", "", "aim", "must", "verdict"]);
    for figure in figures {
        let limit = |limit: Option<f64>| limit.map_or_else(String::new, |limit| limit.to_string());
        table.add_row([
            if figure.row == 0 { String::new() } else { figure.row.to_string() },
            figure.name.clone(),
            shown(figure.value),
            figure.unit.to_owned(),
            limit(figure.aim),
            limit(figure.must),
            figure.verdict().to_owned(),
        ]);
    }
    for column in [0, 2, 4, 5] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    format!("{table}\n")
}

/// A value with three digits that mean something.
fn shown(value: f64) -> String {
    match value {
        _ if value.fract() == 0.0 || value >= 100.0 => format!("{value:.0}"),
        _ if value >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The value that so many percent of `samples` do not exceed; 0 without samples.
pub fn percentile(samples: &mut [f64], percent: usize) -> f64 {
    samples.sort_by(f64::total_cmp);
    let rank = (samples.len() * percent).div_ceil(100).max(1) - 1;
    samples.get(rank).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_above_its_limit_fails_and_a_time_does_not() {
        let count = |value| Figure::count(1, "a", value, "").limits(10.0, 20.0);
        let time = |value| Figure::time(1, "a", value, "").limits(10.0, 20.0);
        let of = |figures: [Figure; 3]| figures.map(|one| (one.verdict(), one.fails()));
        assert_eq!(
            of([10.0, 20.0, 20.1].map(count)),
            [("ok", false), ("aim missed", false), ("FAILED", true)]
        );
        assert_eq!(
            of([10.0, 20.0, 20.1].map(time)),
            [("ok", false), ("aim missed", false), ("must missed", false)]
        );
        assert_eq!(Figure::count(0, "a", 5.0, "").verdict(), "");
        let rate = |value| Figure::rate(1, "a", value, "").limits(20.0, 10.0).verdict();
        assert_eq!([20.0, 10.0, 9.9].map(rate), ["ok", "aim missed", "must missed"]);
    }

    #[test]
    fn percentiles_are_samples() {
        let mut samples: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(
            [50, 99, 100].map(|percent| percentile(&mut samples, percent)),
            [100.0, 198.0, 200.0]
        );
        assert_eq!(percentile(&mut [], 50), 0.0);
    }
}
