//! Row 22 of docs/performance.md: what becomes of an endpoint that is removed. How long after the
//! event new connections still reach it, and whether connections that it had survive.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;

use super::super::case::Proxy;
use super::objects::{First, Used};
use super::site::Site;
use super::work::{REACHED, Work, micros};
use crate::harness::echo::Probe;
use crate::harness::netns::actors::process::Process;
use crate::harness::wait::{PATIENCE, within};
use crate::tools::bench::report::Verdict;
use crate::tools::bench::scale::report::percentile;

/// Connections to a Service of two endpoints.
const HELD: usize = 200;
/// How long a client watches at most.
const LIMIT: Duration = Duration::from_secs(600);
/// What the last new connection should and must stay below, ms.
const LIMITS: (f64, f64) = (2.0, 10.0);

/// What became of removed endpoints.
#[derive(Clone, Debug, Serialize)]
pub struct Removal {
    /// The proxy.
    pub lane: Proxy,
    /// How many endpoints were removed one after another.
    pub removals: usize,
    /// From the event of the API server to the last connection that began and reached the endpoint,
    /// ms: the median and the 99th percentile.
    pub last_ms: [f64; 2],
    /// Established connections, and how many of them still worked when one of two endpoints was
    /// terminating, and when it was gone.
    pub established: u64,
    /// See `established`.
    pub survived: [u64; 2],
}

impl Removal {
    /// How lb is judged; kube-proxy is not.
    pub fn verdict(&self) -> Verdict {
        let [_, p99] = self.last_ms;
        let is_lost = self.survived.iter().any(|survived| *survived < self.established);
        match self.lane.agent_modes() {
            None => Verdict::Unjudged,
            Some(_) if p99 > LIMITS.1 || is_lost => Verdict::FailedMust,
            Some(_) if p99 > LIMITS.0 => Verdict::MissedAim,
            Some(_) => Verdict::Ok,
        }
    }
}

/// Removes an endpoint many times, and once terminates one that has connections.
///
/// # Errors
/// A connection fails, or the proxy does not notice.
pub fn measure(site: &Site, removals: usize) -> Result<Removal> {
    let mut times = last_connections(site, removals)?;
    let last_ms = [50, 99].map(|percent| percentile(&mut times, percent));
    let survived = survivors(site)?;
    Ok(Removal { lane: site.proxy, removals, last_ms, established: HELD as u64, survived })
}

/// For each removal how long after it the last connection to the endpoint began, ms.
fn last_connections(site: &Site, removals: usize) -> Result<Vec<f64>> {
    let limit = u64::try_from(LIMIT.as_millis())?;
    let mut watch = Watch { client: site.spawn(Work::Watch, Used::Named, limit)?, lines: 0 };
    let mut times = Vec::new();
    for _ in 0..removals {
        let line = watch.line()?;
        ensure!(line == REACHED, "{}: {line:?} instead of {REACHED:?}", site.title());
        let removed = micros(SystemTime::now())?;
        site.change(Used::Named, First::Gone)?;
        let line = watch.line().with_context(|| format!("{}: a removal", site.title()))?;
        let last: u64 = line.parse().with_context(|| format!("the client says {line:?}"))?;
        times.push(last.saturating_sub(removed) as f64 / 1e3);
        site.change(Used::Named, First::Ready)?;
    }
    Ok(times)
}

/// The client that connects all the time.
struct Watch {
    client: Process,
    lines: usize,
}

impl Watch {
    /// Waits for what the client says next.
    fn line(&mut self) -> Result<String> {
        let number = self.lines;
        self.lines += 1;
        within(PATIENCE, || {
            let said = self.client.stdout();
            let complete = said.rsplit_once('\n').map_or("", |(lines, _)| lines);
            let line = complete.lines().nth(number).map(str::to_owned);
            line.with_context(|| format!("the client says no more\n{}", self.client.tail()))
        })
    }
}

/// How many connections work when one of two endpoints is terminating, and when it is gone.
fn survivors(site: &Site) -> Result<[u64; 2]> {
    let probe = Probe::tcp(Used::Held.address(site.size.services)).timeout(PATIENCE);
    let pod = site.cluster.pod(super::super::case::CLIENT);
    let held = pod.crowd(&probe, HELD)?;
    let opened = held.ask()?;
    ensure!(opened.ok == HELD as u64, "{}: not all connections: {opened:?}", site.title());
    let mut survived = [0; 2];
    for (survived, first) in survived.iter_mut().zip([First::Terminating, First::Gone]) {
        site.change(Used::Held, first)?;
        // The proxy gets this change after the other one.
        site.change(Used::Named, first)?;
        within(PATIENCE, || {
            let reached = site.said(Work::Endpoints, Used::Named, 40, 1)?;
            ensure!(reached == json!([2]), "{}: new connections reach {reached}", site.title());
            Ok(())
        })?;
        *survived = held.ask()?.ok;
    }
    for used in [Used::Held, Used::Named] {
        site.change(used, First::Ready)?;
    }
    Ok(survived)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_or_broken_connection_fails_lb_alone() {
        let removal = |lane, p99, survived| {
            let last_ms = [0.0, p99];
            Removal { lane, removals: 1, last_ms, established: 10, survived: [10, survived] }
                .verdict()
        };
        assert_eq!(removal(Proxy::LbTc, 2.0, 10), Verdict::Ok);
        assert_eq!(removal(Proxy::LbTc, 2.1, 10), Verdict::MissedAim);
        assert_eq!(removal(Proxy::LbTc, 10.1, 10), Verdict::FailedMust);
        assert_eq!(removal(Proxy::LbTc, 0.0, 9), Verdict::FailedMust);
        assert_eq!(removal(Proxy::Iptables, 1_000.0, 9), Verdict::Unjudged);
    }
}
