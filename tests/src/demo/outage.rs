//! An agent that is killed in mid-traffic and comes back.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::report::Table;
use super::stop::Stop;
use super::{CLIENT, Number, Report, access};
use crate::echo::load::Report as Outcome;
use crate::echo::{Probe, Transport};
use crate::netns::plan::Family;
use crate::netns::world::World;

/// Connections, and datagrams, per second.
const RATE: u64 = 1000;
/// How long both streams run.
const RUN: Duration = Duration::from_millis(3200);
/// When the agent is killed.
const KILL_AT: Duration = Duration::from_millis(800);
/// How long it is away.
const AWAY: Duration = Duration::from_secs(1);

/// Kills the agent of the client's node under traffic to `web`, starts it again, and counts.
pub(super) fn show(world: &mut World, report: &mut Report, stop: Stop) -> Result<()> {
    let client = world.cluster.pod(CLIENT);
    let to = access::address(Number::Web, Family::V4);
    let tcp = client.load(&Probe::new(Transport::Tcp, to), RATE, RUN)?;
    let udp = client.load(&Probe::new(Transport::Udp, to), RATE, RUN)?;
    let start = Instant::now();
    pass(KILL_AT, stop)?;
    let killed = start.elapsed();
    world.take_agent(1)?.kill9()?;
    pass(AWAY, stop)?;
    let started = Instant::now();
    world.start_agent(1)?;
    let healthy = started.elapsed();
    let still_ran = start.elapsed() < RUN;
    let mut table = Table::new(&[
        "traffic of client to web",
        "sent",
        "answered",
        "lost",
        "longest gap",
        "promised",
    ]);
    for (name, load) in [
        (format!("{RATE} TCP connections/s"), tcp),
        (format!("{RATE} UDP datagrams/s, one flow"), udp),
    ] {
        stop.check()?;
        let outcome = load.finish()?;
        add(&mut table, &name, &outcome, still_ran);
    }
    report.title("node1's agent killed in mid-traffic, and started again");
    report.line(&format!(
        "SIGKILL at {:.1} s, away for {:.1} s, healthy {:.2} s after its start; traffic ran {:.1} s",
        killed.as_secs_f64(),
        AWAY.as_secs_f64(),
        healthy.as_secs_f64(),
        RUN.as_secs_f64(),
    ));
    report.table(table);
    Ok(())
}

fn add(table: &mut Table, name: &str, outcome: &Outcome, still_ran: bool) {
    let failures: Vec<_> =
        outcome.failed.iter().map(|(error, count)| format!("{count} {error}")).collect();
    let lost = if failures.is_empty() { "0".to_owned() } else { failures.join(", ") };
    let cells = [
        name,
        &outcome.sent.to_string(),
        &outcome.ok.to_string(),
        &lost,
        &format!("{:.0} ms", outcome.longest_gap_ms),
        "0 lost",
    ];
    // Numbers of traffic that was over before the agent was back would prove nothing.
    table.row(&cells, outcome.ok > 0 && outcome.failures() == 0 && still_ran);
}

/// Lets time pass, unless the user stops it.
fn pass(time: Duration, stop: Stop) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        stop.check()?;
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
