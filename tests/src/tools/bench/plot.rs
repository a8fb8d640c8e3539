//! Plots as SVG: estimates in rows ([`Rows`]), and curves ([`Curves`]).
//!
//! A plot has a light background of its own, so that it can be read on a dark page as well, and
//! colours that people with impaired colour vision can tell apart. Text stays text.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::stats::Estimate;

const WIDTH: u32 = 900;
const BACKGROUND: RGBColor = RGBColor(255, 255, 255);
const TEXT: RGBColor = RGBColor(36, 41, 47);
const LINES: RGBColor = RGBColor(208, 215, 222);
const FONT: &str = "sans-serif";
/// The height of a row of [`Rows`], pixels.
const ROW: u32 = 21;
/// The height of the plotting area of [`Curves`], pixels.
const CURVES: u32 = 420;
/// The width of the names of rows, pixels.
const NAMES: u32 = 300;
/// The colours of Okabe and Ito, without their yellow.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
];

/// Estimates below each other, each a dot on the interval that holds it.
#[derive(Clone, Debug)]
pub struct Rows {
    /// Above the plot.
    pub title: String,
    /// What is measured, and in which direction it is better.
    pub axis: String,
    /// A value that all others are compared with: a line across the rows.
    pub reference: Option<f64>,
    /// From top to bottom.
    pub rows: Vec<Row>,
}

/// A line of [`Rows`].
#[derive(Clone, Debug)]
pub enum Row {
    /// A heading.
    Heading(String),
    /// A dot, with its name and the number of its colour.
    Dot(String, usize, Estimate),
}

/// Values of several series at the same steps, which have the same distance from each other.
#[derive(Clone, Debug)]
pub struct Curves {
    /// Above the plot.
    pub title: String,
    /// What grows from step to step.
    pub x_axis: String,
    /// What is measured.
    pub y_axis: String,
    /// The names of the steps.
    pub steps: Vec<String>,
    /// What is measured at each step.
    pub series: Vec<Series>,
}

/// A line of [`Curves`].
#[derive(Clone, Debug)]
pub struct Series {
    /// In the legend.
    pub name: String,
    /// The number of its colour.
    pub colour: usize,
    /// The number of a step and the estimate there.
    pub points: Vec<(usize, Estimate)>,
}

impl Rows {
    /// Draws it.
    ///
    /// # Errors
    /// There is no row with an estimate.
    pub fn svg(&self) -> Result<String> {
        let estimates = self.rows.iter().filter_map(|row| match row {
            Row::Heading(_) => None,
            Row::Dot(_, _, estimate) => Some(estimate),
        });
        let (least, most) = bounds(estimates, self.reference)?;
        let count = self.rows.len();
        let mut svg = String::new();
        {
            let height = ROW * u32::try_from(count)? + 110;
            let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
            root.fill(&BACKGROUND).map_err(drawing)?;
            let mut chart = ChartBuilder::on(&root)
                .caption(&self.title, (FONT, 21).into_font().color(&TEXT))
                .margin(10)
                .margin_right(25)
                .x_label_area_size(48)
                .margin_left(i32::try_from(NAMES)?)
                .build_cartesian_2d(least..most, 0.0..count as f64)
                .map_err(drawing)?;
            chart
                .configure_mesh()
                .disable_y_mesh()
                .disable_y_axis()
                .x_labels(8)
                .x_max_light_lines(0)
                .bold_line_style(LINES)
                .axis_style(LINES)
                .label_style((FONT, 15).into_font().color(&TEXT))
                .x_desc(&self.axis)
                .draw()
                .map_err(drawing)?;
            if let Some(at) = self.reference {
                let ends = [(at, 0.0), (at, count as f64)];
                chart.draw_series([PathElement::new(ends, TEXT.mix(0.6))]).map_err(drawing)?;
            }
            for (number, row) in self.rows.iter().enumerate() {
                let y = count as f64 - number as f64 - 0.5;
                let font = (FONT, 15).into_font();
                let (name, font, side, indent) = match row {
                    Row::Heading(name) => {
                        (name, font.style(FontStyle::Bold), HPos::Left, 15 - i32::try_from(NAMES)?)
                    }
                    Row::Dot(name, ..) => (name, font, HPos::Right, -10),
                };
                let style = font.color(&TEXT).pos(Pos::new(side, VPos::Center));
                let label = Text::new(name.clone(), (indent, 0), style);
                chart.draw_series([EmptyElement::at((least, y)) + label]).map_err(drawing)?;
                let Row::Dot(_, colour, estimate) = row else { continue };
                draw_interval(&mut chart, *colour, [(estimate.low, y), (estimate.high, y)])?;
                draw_dot(&mut chart, *colour, (estimate.median, y))?;
            }
            root.present().map_err(drawing)?;
        }
        Ok(svg)
    }
}

impl Curves {
    /// Draws it; the vertical axis begins at zero.
    ///
    /// # Errors
    /// There is no point.
    pub fn svg(&self) -> Result<String> {
        let points = self.series.iter().flat_map(|series| &series.points);
        let (_, most) = bounds(points.map(|(_, estimate)| estimate), Some(0.0))?;
        let last = self.steps.len() as f64 - 0.5;
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, (WIDTH, CURVES + 110)).into_drawing_area();
            root.fill(&BACKGROUND).map_err(drawing)?;
            let mut chart = ChartBuilder::on(&root)
                .caption(&self.title, (FONT, 21).into_font().color(&TEXT))
                .margin(10)
                .margin_right(230)
                .x_label_area_size(48)
                .y_label_area_size(75)
                .build_cartesian_2d(-0.5..last, 0.0..most)
                .map_err(drawing)?;
            // The only labels are those of whole numbers, which are steps.
            let step = |x: &f64| {
                let is_step = x.fract() == 0.0 && *x >= 0.0;
                self.steps.get(*x as usize).filter(|_| is_step).cloned().unwrap_or_default()
            };
            chart
                .configure_mesh()
                .disable_x_mesh()
                .x_labels(self.steps.len() + 1)
                .x_label_formatter(&step)
                .y_max_light_lines(0)
                .bold_line_style(LINES)
                .axis_style(LINES)
                .label_style((FONT, 15).into_font().color(&TEXT))
                .x_desc(&self.x_axis)
                .y_desc(&self.y_axis)
                .draw()
                .map_err(drawing)?;
            for (number, series) in self.series.iter().enumerate() {
                let colour = series.colour;
                let at = |(step, estimate): &(usize, Estimate)| (*step as f64, estimate.median);
                let line = LineSeries::new(
                    series.points.iter().map(at),
                    colour_of(colour).stroke_width(2),
                );
                chart.draw_series(line).map_err(drawing)?;
                for point in &series.points {
                    let (x, Estimate { low, high, .. }) = (point.0 as f64, point.1);
                    draw_interval(&mut chart, colour, [(x, low), (x, high)])?;
                    draw_dot(&mut chart, colour, at(point))?;
                }
                let (x, y) = (WIDTH as i32 - 215, 70 + 24 * number as i32);
                root.draw(&Circle::new((x, y), 5, colour_of(colour).filled())).map_err(drawing)?;
                let style = (FONT, 15).into_font().color(&TEXT);
                let style = style.pos(Pos::new(HPos::Left, VPos::Center));
                root.draw(&Text::new(series.name.clone(), (x + 14, y), style)).map_err(drawing)?;
            }
            root.present().map_err(drawing)?;
        }
        Ok(svg)
    }
}

type Chart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

fn draw_interval(chart: &mut Chart<'_, '_>, colour: usize, ends: [(f64, f64); 2]) -> Result<()> {
    let line = PathElement::new(ends, colour_of(colour).stroke_width(2));
    chart.draw_series([line]).map(drop).map_err(drawing)
}

fn draw_dot(chart: &mut Chart<'_, '_>, colour: usize, at: (f64, f64)) -> Result<()> {
    let dot = Circle::new(at, 5, colour_of(colour).filled());
    chart.draw_series([dot]).map(drop).map_err(drawing)
}

fn colour_of(number: usize) -> RGBColor {
    COLOURS[number % COLOURS.len()]
}

/// An error of the backend, whose type has a lifetime of its own.
fn drawing(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw the plot: {error}")
}

/// What an axis must hold, with some room at both ends, but nothing below zero.
fn bounds<'a>(
    estimates: impl Iterator<Item = &'a Estimate>,
    reference: Option<f64>,
) -> Result<(f64, f64)> {
    let values: Vec<f64> = estimates
        .flat_map(|estimate| [estimate.low, estimate.median, estimate.high])
        .filter(|value| value.is_finite())
        .collect();
    if values.is_empty() {
        return Err(anyhow!("a plot without a value"));
    }
    let values = values.into_iter().chain(reference);
    let (least, most) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), value| {
        (least.min(value), most.max(value))
    });
    let room = ((most - least) * 0.06).max(most.abs() * 0.005).max(1e-9);
    Ok(((least - room).max(0.0_f64.min(least)), most + room))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate(median: f64) -> Estimate {
        Estimate { median, low: median * 0.9, high: median * 1.1 }
    }

    #[test]
    fn rows_have_their_names_a_dot_and_the_line_of_the_reference() {
        let rows = vec![
            Row::Heading("same node & more".to_owned()),
            Row::Dot("lb tc".to_owned(), 1, estimate(1.05)),
            Row::Dot("kube-proxy".to_owned(), 2, estimate(1.2)),
        ];
        let plot = Rows {
            title: "A title".to_owned(),
            axis: "ratio".to_owned(),
            reference: Some(1.0),
            rows,
        };
        let svg = plot.svg().expect("a plot");
        for text in ["A title", "ratio", "same node &amp; more", "lb tc", "kube-proxy"] {
            assert!(svg.contains(text), "{text} is not in {svg}");
        }
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("#FFFFFF"), "no background of its own");
    }

    #[test]
    fn curves_name_their_steps_and_series() {
        let series = |name: &str, colour| Series {
            name: name.to_owned(),
            colour,
            points: vec![(0, estimate(10.0)), (2, estimate(40.0))],
        };
        let plot = Curves {
            title: "A title".to_owned(),
            x_axis: "Services".to_owned(),
            y_axis: "time, us".to_owned(),
            steps: ["1", "1,000", "10,000"].map(str::to_owned).to_vec(),
            series: vec![series("lb tc", 1), series("iptables", 2)],
        };
        let svg = plot.svg().expect("a plot");
        for text in ["1,000", "10,000", "Services", "time, us", "lb tc", "iptables"] {
            assert!(svg.contains(text), "{text} is not in {svg}");
        }
        // A dot for each point and one for each line of the legend.
        assert_eq!(svg.matches("<circle").count(), 6);
        let empty = Curves { series: Vec::new(), ..plot };
        assert!(empty.svg().expect_err("no point").to_string().contains("without a value"));
    }

    #[test]
    fn axes_hold_what_is_measured_and_nothing_below_zero() {
        let (least, most) = bounds([estimate(1.0)].iter(), Some(1.3)).expect("a value");
        assert!(least < 0.9 && least > 0.8 && most > 1.3 && most < 1.4, "{least} {most}");
        assert_eq!(bounds([estimate(5.0)].iter(), Some(0.0)).expect("a value").0, 0.0);
    }
}
