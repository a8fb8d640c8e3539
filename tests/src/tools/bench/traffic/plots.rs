//! The plots of the report, one for each family of figures.

use anyhow::{Context, Result};

use super::case::{Case, Proxy};
use super::exchange::Load;
use super::judge::{Measure, Relative, Report};
use super::page::grouped;
use super::scaling::Axis;
use super::scaling::curve::Point;
use super::tools::Tool;
use crate::tools::bench::plot::{Curves, Row, Rows, Series};
use crate::tools::bench::stats::Estimate;

/// A plot and its file.
#[derive(Clone, Debug)]
pub struct Plot {
    /// The name of its file, without `.svg`.
    pub name: &'static str,
    /// What it shows.
    pub title: String,
    /// The file.
    pub svg: String,
}

/// All plots that the report has figures for.
///
/// # Errors
/// One cannot be drawn.
pub fn all(report: &Report) -> Result<Vec<Plot>> {
    let loads = Load::ALL.into_iter().filter_map(|load| of_load(report, load));
    let tools = [true, false].into_iter().filter_map(|is_iperf3| of_tool(report, is_iperf3));
    let mut plots = loads
        .chain(tools)
        .map(|(name, rows)| {
            let svg = rows.svg().with_context(|| format!("plot {name}"))?;
            Ok(Plot { name, title: rows.title, svg })
        })
        .collect::<Result<Vec<_>>>()?;
    for (axis, is_p99) in Axis::ALL.into_iter().flat_map(|axis| [(axis, false), (axis, true)]) {
        if let Some((name, curves)) = of_axis(report, axis, is_p99) {
            let svg = curves.svg().with_context(|| format!("plot {name}"))?;
            plots.push(Plot { name, title: curves.title, svg });
        }
    }
    Ok(plots)
}

/// The same colour in all plots.
fn colour(lane: Proxy) -> usize {
    match lane {
        Proxy::Direct | Proxy::Control | Proxy::Relayed => 0,
        Proxy::LbTc => 1,
        Proxy::Iptables => 2,
        Proxy::LbConnect => 3,
        Proxy::Nftables => 4,
        Proxy::LbDsr | Proxy::Empty => 5,
        Proxy::LbXdp => 6,
    }
}

fn of_load(report: &Report, load: Load) -> Option<(&'static str, Rows)> {
    let name = match load {
        Load::Request => "request",
        Load::Connect => "connect",
        Load::Datagram => "datagram",
        Load::Burst => "burst",
        Load::Forward => "forward",
        Load::Bulk => "bulk",
    };
    let (axis, reference) = match (load, Measure::usual(load)) {
        (Load::Forward, _) => ("median time that the first node spends on a datagram, us", 0.0),
        (_, Measure::Rate) => ("rate against no proxy (more is better)", 1.0),
        _ => ("median time against no proxy (less is better)", 1.0),
    };
    let mut rows = Vec::new();
    let mut last: Option<Case> = None;
    for Relative { case, lane, value } in &report.relative {
        if case.load != load {
            continue;
        }
        if last != Some(*case) {
            let family = if case.is_v6 { ", IPv6" } else { "" };
            rows.push(Row::Heading(format!("{}{family}", case.route.title())));
            last = Some(*case);
        }
        rows.push(Row::Dot(lane.title().to_owned(), colour(*lane), *value));
    }
    last?;
    let title = load.title().to_owned();
    Some((name, Rows { title, axis: axis.to_owned(), reference: Some(reference), rows }))
}

fn of_tool(report: &Report, is_iperf3: bool) -> Option<(&'static str, Rows)> {
    let mut rows = Vec::new();
    let mut last: Option<Tool> = None;
    for rate in &report.tools.rates {
        if matches!(rate.tool, Tool::Iperf3(_)) != is_iperf3 || rate.lane == Proxy::Direct {
            continue;
        }
        if last != Some(rate.tool) {
            rows.push(Row::Heading(rate.tool.title()));
            last = Some(rate.tool);
        }
        rows.push(Row::Dot(rate.lane.title().to_owned(), colour(rate.lane), rate.ratio));
    }
    last?;
    let (name, title) = if is_iperf3 {
        ("iperf3", "iperf3, pod to ClusterIP, other node")
    } else {
        ("wrk", "wrk and nginx, pod to ClusterIP, other node")
    };
    let axis = "rate against no proxy (more is better)".to_owned();
    Some((name, Rows { title: title.to_owned(), axis, reference: Some(1.0), rows }))
}

fn of_axis(report: &Report, axis: Axis, is_p99: bool) -> Option<(&'static str, Curves)> {
    let name = match (axis, is_p99) {
        (Axis::Services, false) => "services",
        (Axis::Services, true) => "services-p99",
        (Axis::Flows, false) => "flows",
        (Axis::Flows, true) => "flows-p99",
        (Axis::Endpoints, false) => "endpoints",
        (Axis::Endpoints, true) => "endpoints-p99",
        (Axis::Changes, false) => "changes",
        (Axis::Changes, true) => "changes-p99",
    };
    let curves: Vec<_> = report.scaling.curves.iter().filter(|curve| curve.axis == axis).collect();
    let mut sizes: Vec<u32> =
        curves.iter().flat_map(|curve| curve.points.iter().map(|point| point.size)).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let step = |size: u32| sizes.binary_search(&size).unwrap_or_default();
    let figure: fn(&Point) -> Estimate =
        if is_p99 { |point| point.p99_us } else { |point| point.p50_us };
    let series = curves.iter().map(|curve| Series {
        name: curve.lane.title().to_owned(),
        colour: colour(curve.lane),
        points: curve.points.iter().map(|point| (step(point.size), figure(point))).collect(),
    });
    let series: Vec<_> = series.collect();
    if series.is_empty() {
        return None;
    }
    let percentile = if is_p99 { "99th percentile of the time, us" } else { "median time, us" };
    let title = axis.title();
    let (_, what) = title.split_once(": ").unwrap_or(("", title));
    let curves = Curves {
        title: format!("{what}{}", if is_p99 { ", 99th percentile" } else { "" }),
        x_axis: axis.unit().to_owned(),
        y_axis: percentile.to_owned(),
        steps: sizes.iter().map(|size| grouped(*size)).collect(),
        series,
    };
    Some((name, curves))
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::tools::bench::traffic::case::Route;
    use crate::tools::bench::traffic::exchange::Sample;
    use crate::tools::bench::traffic::machine::Machine;
    use crate::tools::bench::traffic::scaling::curve::Curve;
    use crate::tools::bench::traffic::{Measured, Plan, Samples, scaling};

    /// A report with one load and one curve.
    pub(in super::super) fn report() -> Report {
        let sample = |p50_us| Sample { p50_us, p99_us: 2.0 * p50_us, rate: 1e6 / p50_us };
        let case = Case { route: Route::ClusterIpFar, load: Load::Connect, is_v6: false };
        let lanes = [(Proxy::Direct, 80.0), (Proxy::Control, 80.0), (Proxy::LbTc, 88.0)];
        let lanes: BTreeMap<_, _> =
            lanes.into_iter().map(|(lane, time)| (lane, vec![sample(time); 3])).collect();
        let sizes = [(1, 30.0), (1_000, 30.0), (100_000, 30.3)];
        let curves =
            sizes.map(|(size, time)| ((Axis::Services, Proxy::LbTc, size), vec![sample(time); 3]));
        let curves = Curve::all(&BTreeMap::from(curves));
        let scaling = scaling::Measured { curves, ..Default::default() };
        let samples = Samples::from([(case, lanes)]);
        let measured = Measured { samples, scaling, ..Default::default() };
        Report::of(measured, &Plan::default(), Machine::default())
    }

    #[test]
    fn each_family_of_figures_has_a_plot_that_the_page_refers_to() {
        let report = report();
        let plots = all(&report).expect("plots");
        let names: Vec<_> = plots.iter().map(|plot| plot.name).collect();
        assert_eq!(names, ["connect", "services", "services-p99"]);
        assert!(plots[0].svg.contains("pod to ClusterIP, other node"));
        assert!(plots[1].svg.contains("100,000"));
        let page = report.markdown(&plots);
        for name in names {
            assert!(page.contains(&format!("(traffic/{name}.svg)")), "{page}");
        }
        assert!(page.contains("| 100,000 | lb tc | 30.3 |"), "{page}");
    }
}
