//! An agent that is killed in mid-traffic and comes back.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::outside::Front;
use super::report::Table;
use super::stop::Stop;
use super::{CLIENT, Number, Report, access};
use crate::harness::echo::load::Report as Outcome;
use crate::harness::echo::{Probe, Transport};
use crate::harness::netns::actors::host::Host;
use crate::harness::netns::topology::plan::Family;
use crate::harness::netns::words::world::World;

/// Connections, and datagrams, per second.
const RATE: u64 = 1000;
/// Ways of asking, and what a second has of each.
const STREAMS: [(Transport, &str); 2] =
    [(Transport::Tcp, "TCP connections/s"), (Transport::Udp, "UDP datagrams/s, one flow")];
/// How long all streams run.
const RUN: Duration = Duration::from_millis(3500);
/// When the agent is killed.
const KILL_AT: Duration = Duration::from_millis(500);
/// How long it is away.
const AWAY: Duration = Duration::from_secs(1);

/// Kills node1's agent under traffic of a pod and of a client outside, starts it again, and
/// counts.
pub(super) fn show(world: &mut World, report: &mut Report, stop: Stop) -> Result<()> {
    let pod = world.cluster.pod(CLIENT);
    let web = access::address(Number::Web, Family::V4);
    let node_port = Front::NodePort(1).address(world, Number::Public, Family::V4);
    let clients: [(&str, &Host, _); 2] = [
        ("client to web", &pod, web),
        ("outside to node1's NodePort of public", world.cluster.outside(), node_port),
    ];
    let mut loads = Vec::new();
    for (name, client, to) in clients {
        for (transport, unit) in STREAMS {
            let load = client.load(&Probe::new(transport, to), RATE, RUN)?;
            loads.push((format!("{name}, {RATE} {unit}"), load));
        }
    }
    let start = Instant::now();
    pass(KILL_AT, stop)?;
    let killed = start.elapsed();
    world.take_agent(1)?.kill9()?;
    pass(AWAY, stop)?;
    let started = Instant::now();
    world.start_agent(1)?;
    let healthy = started.elapsed();
    let still_ran = start.elapsed() < RUN;
    let mut table = Table::new(&["traffic", "sent", "answered", "lost", "longest gap", "promised"]);
    for (name, load) in loads {
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
    if !still_ran {
        report.line("The traffic was over before the agent was healthy, so it proves nothing.");
    }
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
