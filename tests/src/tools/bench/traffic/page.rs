//! The report as Markdown.

use std::fmt::Write as _;

use super::case::Proxy;
use super::exchange::Load;
use super::judge::{Level, Measure, Report};
use super::plots::Plot;
use super::scaling::Axis;
use super::scaling::curve::Curve;
use super::scaling::removal::Removal;
use super::tools::Measured;
use crate::tools::bench::report::Verdict;
use crate::tools::bench::stats::Estimate;

/// The directory of the plots, beside the page.
pub const PLOTS: &str = "traffic";

impl Report {
    /// The report in Markdown, with references to these plots.
    pub fn markdown(&self, plots: &[Plot]) -> String {
        let mut text = String::new();
        self.write_ratios(&mut text);
        self.write_levels(&mut text);
        self.write_tools(&mut text);
        self.write_curves(&mut text);
        self.write_removals(&mut text);
        for Plot { name, title, .. } in plots {
            text += &format!("\n![{title}]({PLOTS}/{name}.svg)\n");
        }
        text += &format!("\n{}\n{}\n", self.plan.title(), self.machine.title());
        if !self.invalid.is_empty() {
            text += "\nINVALID RUN: other work disturbed it, and its figures cannot be trusted; \
                     measure again on a quiet machine\n";
            self.invalid.iter().for_each(|why| text += &format!("- {why}\n"));
        }
        text
    }

    fn write_ratios(&self, text: &mut String) {
        if self.ratios.is_empty() && self.controls.is_empty() {
            return;
        }
        *text += "| row | load, route | ratio | aim | must | measured | 95 % | verdict |\n";
        *text += "|---|---|---|---|---|---|---|---|\n";
        for ratio in self.ratios.iter().chain(&self.controls) {
            let row = if ratio.row == 0 { String::new() } else { ratio.row.to_string() };
            let sign = if ratio.is_more_better { ">=" } else { "<=" };
            let limit = |limit: Option<f64>| limit.map(|it| format!("{sign} {it}"));
            let [aim, must] = [ratio.aim, ratio.must].map(|it| limit(it).unwrap_or_default());
            let Estimate { median, low, high } = ratio.measured;
            let measure = match ratio.measure {
                Measure::P50 => "p50",
                Measure::Rate => "rate",
                Measure::Above => "p50 above direct",
            };
            let verdict = match ratio.of {
                Proxy::Control => "control",
                _ => shown_verdict(ratio.verdict()),
            };
            let (of, to) = (ratio.of.title(), ratio.to.title());
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "| {row} | {} | {measure}: {of} / {to} | {aim} | {must} | {median:.3} | \
                 {low:.3} to {high:.3} | {verdict} |",
                ratio.case.title()
            );
        }
    }

    fn write_levels(&self, text: &mut String) {
        if self.levels.is_empty() {
            return;
        }
        *text += "\n| load, route |";
        Proxy::ALL.iter().for_each(|proxy| *text += &format!(" {} |", proxy.title()));
        *text += &format!("\n|---|{}\n", "---|".repeat(Proxy::ALL.len()));
        let mut cases: Vec<_> = self.levels.iter().map(|level| level.case).collect();
        cases.dedup();
        for case in cases {
            *text += &format!("| {}, {} |", case.title(), unit(case.load));
            for proxy in Proxy::ALL {
                let mut levels = self.levels.iter();
                let level = levels.find(|level| level.case == case && level.lane == proxy);
                let cell = level.map(shown).unwrap_or_default();
                *text += &format!(" {cell} |");
            }
            text.push('\n');
        }
    }

    fn write_tools(&self, text: &mut String) {
        let Measured { rates, missing } = &self.tools;
        if !rates.is_empty() {
            *text += "\n| tool | lane | measured | 95 % | against no proxy | 95 % |\n";
            *text += "|---|---|---|---|---|---|\n";
        }
        for rate in rates {
            let (Estimate { median, low, high }, scale) = (rate.ratio, rate.scale());
            let _ = writeln!(
                text,
                "| {} | {} | {:.1} {} | {:.1} to {:.1} | {median:.3} | {low:.3} to {high:.3} |",
                rate.tool.title(),
                rate.lane.title(),
                rate.rate.median * scale,
                rate.tool.unit(),
                rate.rate.low * scale,
                rate.rate.high * scale,
            );
        }
        missing.iter().for_each(|why| *text += &format!("\nNot measured: {why}\n"));
    }

    fn write_curves(&self, text: &mut String) {
        for axis in Axis::ALL {
            let curves = self.scaling.curves.iter().filter(|curve| curve.axis == axis);
            let curves: Vec<_> = curves.collect();
            if curves.is_empty() {
                continue;
            }
            let _ = write!(text, "\n{}, us\n\n| {} | lane |", axis.title(), axis.unit());
            *text += " p50 | 95 % | p99 | p50, growth | p99, growth | verdict |\n";
            *text += "|---|---|---|---|---|---|---|---|\n";
            for curve in curves {
                write_points(curve, text);
            }
        }
    }

    fn write_removals(&self, text: &mut String) {
        if self.scaling.removals.is_empty() {
            return;
        }
        *text += "\n| row | removed endpoint | removals | last new connection after the event, p50, \
                  ms | p99, ms | established connections that survive: endpoint terminating | \
                  endpoint gone | verdict |\n|---|---|---|---|---|---|---|---|\n";
        for removal in &self.scaling.removals {
            let Removal { removals, established, .. } = removal;
            let ([p50, p99], [terminating, gone]) = (removal.last_ms, removal.survived);
            let _ = writeln!(
                text,
                "| 22 | {} | {removals} | {p50:.2} | {p99:.2} | {terminating} of {established} | \
                 {gone} of {established} | {} |",
                removal.lane.title(),
                shown_verdict(removal.verdict())
            );
        }
    }
}

fn write_points(curve: &Curve, text: &mut String) {
    for point in &curve.points {
        let Estimate { median, low, high } = point.p50_us;
        let is_last = curve.points.last().is_some_and(|last| last.size == point.size);
        let verdicts = curve.verdicts().map(shown_verdict);
        let verdicts: Vec<_> =
            verdicts.into_iter().filter(|it| is_last && !it.is_empty()).collect();
        let verdict = verdicts.join("; ");
        let _ = writeln!(
            text,
            "| {} | {} | {median:.1} | {low:.1} to {high:.1} | {:.1} | {:.3} | {:.3} | {verdict} |",
            grouped(point.size),
            curve.lane.title(),
            point.p99_us.median,
            point.p50_growth.median,
            point.p99_growth.median,
        );
    }
}

fn shown_verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Ok => "ok",
        Verdict::MissedAim => "aim missed",
        Verdict::FailedMust => "**must missed**",
        Verdict::Unjudged | Verdict::Invalid => "",
    }
}

/// A number with commas.
pub(super) fn grouped(number: u32) -> String {
    match number {
        0..1_000 => number.to_string(),
        _ => format!("{},{:03}", grouped(number / 1_000), number % 1_000),
    }
}

/// What [`shown`] shows.
fn unit(load: Load) -> &'static str {
    match load {
        Load::Request | Load::Connect | Load::Datagram | Load::Forward => "p50, us",
        Load::Burst => "thousand/s",
        Load::Bulk => "Gbit/s",
    }
}

fn shown(level: &Level) -> String {
    let value = match level.case.load {
        Load::Request | Load::Connect | Load::Datagram | Load::Forward => level.p50_us.median,
        Load::Burst => level.rate.median / 1e3,
        Load::Bulk => level.rate.median * 8.0 / 1e9,
    };
    if level.case.load == Load::Forward {
        // A few microseconds.
        return format!("{value:.2}");
    }
    format!("{value:.1}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_commas() {
        let shown = [0, 999, 1_000, 60_004, 1_000_000].map(grouped);
        assert_eq!(shown, ["0", "999", "1,000", "60,004", "1,000,000"]);
    }
}
