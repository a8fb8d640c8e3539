//! An agent that is killed and restarted under traffic.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::access;
use super::outside::Frontend;
use super::report::{Report, Table};
use super::scene::{CLIENT, Number};
use super::stop::Stop;
use crate::harness::echo::load::Report as Outcome;
use crate::harness::echo::{Probe, Transport};
use crate::harness::netns::actors::host::Host;
use crate::harness::netns::topology::plan::Family;
use crate::harness::netns::words::scenario::Scenario;

/// Connections, and datagrams, per second.
const RATE: u64 = 1000;
/// Kinds of traffic, and the unit of [`RATE`].
const STREAMS: [(Transport, &str); 2] =
    [(Transport::Tcp, "TCP connections/s"), (Transport::Udp, "UDP datagrams/s, one flow")];
/// How long all streams run: longer than an agent takes to start on a busy machine.
const RUN: Duration = Duration::from_secs(6);
/// When the agent is killed.
const KILL_AT: Duration = Duration::from_millis(500);
/// How long no agent runs.
const DOWN: Duration = Duration::from_secs(1);

/// Kills node1's agent under traffic of a pod and of a client outside, starts it again, and
/// counts.
pub(super) fn show(world: &mut Scenario, report: &mut Report, stop: Stop) -> Result<()> {
    let pod = world.cluster.pod(CLIENT);
    let web = access::address(Number::Web, Family::V4);
    let node_port = Frontend::NodePort(1).address(world, Number::Public, Family::V4);
    let clients: [(&str, &Host, _); 2] = [
        ("client to web", &pod, web),
        ("outside to public, NodePort of node1", world.cluster.outside(), node_port),
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
    pass(DOWN, stop)?;
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
    report.title("The agent of node1 killed and restarted under traffic");
    report.line(&format!(
        "SIGKILL after {:.1} s, restarted {:.1} s later, healthy {:.2} s after that; traffic for {:.1} s",
        killed.as_secs_f64(),
        DOWN.as_secs_f64(),
        healthy.as_secs_f64(),
        RUN.as_secs_f64(),
    ));
    if !still_ran {
        report.line("The traffic ended before the agent was healthy, so these rows prove nothing.");
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
    table.row(&cells, outcome.ok > 0 && outcome.failures() == 0 && still_ran);
}

/// Waits, unless the user stops the demo.
fn pass(time: Duration, stop: Stop) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        stop.check()?;
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
