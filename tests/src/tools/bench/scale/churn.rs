//! An agent whose endpoints never rest: nothing of it may grow.
//!
//! A hundred times a second one endpoint is replaced by another, or a whole Service is deleted and
//! created again. What the agent uses is sampled, and a line through the samples says what an
//! hour of this adds.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::growth::Samples;
use super::objects::{Size, service};
use super::report::Figure;
use super::{Lab, MEGABYTE, Plan, SLICES, Server, Targets, api, process};

/// Changes a second.
const RATE: u32 = 100;
/// Every so many changes, one is that of a whole Service.
const SERVICE_EACH: u32 = 10;
/// The part of the time that counts as warm-up: caches and the allocator fill.
const WARM_UP: f64 = 0.2;
/// How many samples are taken.
const SAMPLES: u32 = 300;
/// Where the agent's metrics are.
const METRICS_PORT: u16 = 10249;
/// The growth in an hour that is taken for noise, and the limit, in parts of a hundred of what is
/// there; of few things, as many as [`FEW`].
const LIMITS: (f64, f64) = (2.0, 5.0);
const FEW: (f64, f64) = (0.5, 1.0);
/// From when on the growth is judged: in five minutes the allocator and threads that come and go
/// made 5 MB and 13 threads an hour.
const JUDGED: Duration = Duration::from_secs(1_800);
/// How long the last changes may take.
const SETTLED: Duration = Duration::from_secs(60);

/// Changes endpoints for this time.
///
/// # Errors
/// The node cannot be built, or the agent does not do what it should.
pub fn measure(size: Size, time: Duration) -> Result<Vec<Figure>> {
    let mut started = Vec::new();
    let mut lab = Lab::new(Plan { size, changes: 0, time })?;
    lab.start(&[], Targets::USUAL, &mut started)?;
    let before = metric(&lab, "lb_endpoints")?;
    let is_over = AtomicBool::new(false);
    let server = lab.server.clone();
    let (grown, changes) = thread::scope(|scope| {
        let changing = scope.spawn(|| change(&server, size, &is_over));
        let grown = sampled(&mut lab, time, || changing.is_finished());
        is_over.store(true, Ordering::Relaxed);
        let changes = changing.join().ok().context("the sender of changes panicked")?;
        anyhow::Ok((grown?, changes?))
    })?;
    let mut figures = vec![Figure::count(0, "churn: changes", f64::from(changes), "")];
    figures.push(settled(&lab, before)?);
    let is_judged = time >= JUDGED;
    figures.extend(grown.into_iter().flat_map(|(name, unit, samples)| {
        let (mean, growth) = (samples.mean(), samples.growth_per_hour());
        let (name, mean_name) = (format!("churn: {name}, growth"), format!("churn: {name}, mean"));
        let limit = |percent: f64, few: f64| (mean * percent / 100.0).max(few);
        let (aim, must) = (limit(LIMITS.0, FEW.0), limit(LIMITS.1, FEW.1));
        let growth = Figure::count(17, name, growth, unit.1);
        let growth = if is_judged { growth.limits(rounded(aim), rounded(must)) } else { growth };
        [Figure::count(17, mean_name, mean, unit.0), growth]
    }));
    Ok(figures)
}

fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// Sends changes at [`RATE`] until it is over. Returns how many.
fn change(server: &Server, size: Size, is_over: &AtomicBool) -> Result<u32> {
    let start = Instant::now();
    for number in 0.. {
        let due = start + Duration::from_secs(1) * number / RATE;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if is_over.load(Ordering::Relaxed) {
            return Ok(number);
        }
        let of = number % size.services;
        if number % SERVICE_EACH == 0 {
            server.send("services", &api::recreated(&service(of)))?;
        } else {
            server.send(SLICES, &api::modified(&size.slice_replaced(of, number)))?;
        }
    }
    bail!("there were too many changes to count")
}

/// A name, the units of its mean and of its growth, and what was sampled.
type Grown = (&'static str, (&'static str, &'static str), Samples);

/// Samples what the agent uses for this time, unless the changes end before.
fn sampled(lab: &mut Lab, time: Duration, has_ended: impl Fn() -> bool) -> Result<Vec<Grown>> {
    let pid = lab.pid()?;
    let mut grown: Vec<Grown> = [
        ("memory", ("MB", "MB/h")),
        ("memory, not shared with maps or files", ("MB", "MB/h")),
        ("file descriptors", ("", "1/h")),
        ("threads", ("", "1/h")),
        ("entries for Services, frontends and endpoints", ("", "1/h")),
    ]
    .map(|(name, units)| (name, units, Samples::default()))
    .into();
    let start = Instant::now();
    let warm_up = time.mul_f64(WARM_UP);
    let pause = (time / SAMPLES).max(Duration::from_secs(1));
    while start.elapsed() < time && !has_ended() {
        thread::sleep(pause);
        if start.elapsed() < warm_up {
            continue;
        }
        let (at, memory) = (start.elapsed().as_secs_f64(), process::memory(pid)?);
        let values = [
            memory.resident as f64 / MEGABYTE,
            memory.anonymous as f64 / MEGABYTE,
            entries_of(pid, "fd")?,
            entries_of(pid, "task")?,
            metric(lab, "lb_services")?
                + metric(lab, "lb_frontends")?
                + metric(lab, "lb_endpoints")?,
        ];
        grown.iter_mut().zip(values).for_each(|((_, _, samples), value)| samples.push(at, value));
    }
    Ok(grown)
}

/// How many entries a directory of `/proc` has.
fn entries_of(pid: u32, directory: &str) -> Result<f64> {
    let path = format!("/proc/{pid}/{directory}");
    let entries = fs::read_dir(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(entries.count() as f64)
}

/// Waits until the agent has as many endpoints as before. The figure is how many are missing.
fn settled(lab: &Lab, before: f64) -> Result<Figure> {
    let start = Instant::now();
    loop {
        let missing = before - metric(lab, "lb_endpoints")?;
        if missing == 0.0 || start.elapsed() > SETTLED {
            let name = "churn: endpoints that are missing, or too many, at the end";
            return Ok(Figure::count(17, name, missing.abs(), "").limits(0.0, 0.0));
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// The sum of a metric of the agent.
fn metric(lab: &Lab, name: &str) -> Result<f64> {
    let agent = lab.agent.as_ref().context("no agent")?;
    let (status, text) = agent.http(METRICS_PORT, "/metrics")?;
    sum(&text, name).with_context(|| format!("status {status}, and no metric {name}"))
}

fn sum(text: &str, name: &str) -> Option<f64> {
    let lines = text.lines().filter_map(|line| line.strip_prefix(name));
    let own = lines.filter(|rest| rest.starts_with([' ', '{']));
    own.filter_map(|rest| rest.rsplit(' ').next()?.parse::<f64>().ok()).reduce(|a, b| a + b)
}

#[cfg(test)]
mod tests {
    use super::sum;

    #[test]
    fn a_metric_is_the_sum_of_its_lines() {
        let text = "# HELP a x\na{map=\"S\"} 3\na{map=\"T\"} 4\nab 5\nb 2\n";
        assert_eq!(sum(text, "a"), Some(7.0));
        assert_eq!(sum(text, "b"), Some(2.0));
        assert_eq!(sum(text, "c"), None);
    }
}
