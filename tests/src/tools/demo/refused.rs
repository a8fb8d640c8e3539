//! Calls that reach no backend: table 4 of docs/semantics.md, as pods and clients outside see
//! it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;

use super::access;
use super::outside::Frontend;
use super::report::Table;
use super::scene::{CLIENT, Number, Path};
use super::stop::Stop;
use crate::harness::echo::{Answer, Probe, Transport};
use crate::harness::netns::actors::host::Host;
use crate::harness::netns::topology::plan::Family;
use crate::harness::netns::words::scenario::Scenario;

/// "At once": far below the second after which TCP would send its SYN again.
const AT_ONCE_MS: f64 = 200.0;
/// How long a call waits for an answer.
const PATIENCE: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub(super) struct Row {
    case: usize,
    path: Path,
    protocol: &'static str,
    saw: String,
    after_ms: Option<f64>,
}

struct Case {
    name: &'static str,
    called: Called,
    number: Number,
    promised: &'static str,
    error: &'static str,
}

/// Who calls, and which address.
#[derive(Clone, Copy)]
enum Called {
    /// A pod, at the ClusterIP.
    ClusterIp,
    /// A pod, at this port of the ClusterIP.
    Port(u16),
    /// A client outside.
    Outside(Frontend),
}

const fn refused(name: &'static str, called: Called, number: Number) -> Case {
    Case { name, called, number, promised: "refused at once", error: "ECONNREFUSED" }
}

const fn dropped(name: &'static str, called: Called, number: Number) -> Case {
    Case { name, called, number, promised: "dropped on the node", error: "timeout" }
}

const CASES: [Case; 7] = [
    refused("Service without endpoints", Called::ClusterIp, Number::Empty),
    refused("port that the Service does not have", Called::Port(4242), Number::Near),
    dropped("ClusterIP that no Service has", Called::ClusterIp, Number::NoService),
    refused(
        "outside: NodePort without endpoints",
        Called::Outside(Frontend::NodePort(1)),
        Number::Empty,
    ),
    dropped(
        "outside: NodePort, Local, node without endpoint",
        Called::Outside(Frontend::NodePort(2)),
        Number::Local,
    ),
    dropped(
        "outside: LB, Local, node without endpoint",
        Called::Outside(Frontend::Balancer),
        Number::Local,
    ),
    dropped(
        "outside: LB, client not in loadBalancerSourceRanges",
        Called::Outside(Frontend::Balancer),
        Number::Private,
    ),
];

/// Makes the calls of a pod on this path.
pub(super) fn rows(world: &Scenario, path: Path, stop: Stop) -> Result<Vec<Row>> {
    ask_all(world, path, false, stop)
}

/// Makes the calls from outside. Load balancer addresses are routed to node2.
pub(super) fn outside_rows(world: &Scenario, stop: Stop) -> Result<Vec<Row>> {
    world.cluster.fabric().route_external_to(2)?;
    ask_all(world, Path::Packet, true, stop)
}

fn ask_all(world: &Scenario, path: Path, from_outside: bool, stop: Stop) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (index, case) in CASES.iter().enumerate() {
        if matches!(case.called, Called::Outside(_)) != from_outside {
            continue;
        }
        stop.check()?;
        let row = |protocol, (saw, after_ms)| Row { case: index, path, protocol, saw, after_ms };
        let tcp = row("TCP", case.ask(world, Transport::Tcp)?);
        let udp = row("UDP", case.ask(world, Transport::Udp)?);
        if tcp.saw == udp.saw {
            let after_ms = tcp.after_ms.into_iter().chain(udp.after_ms).reduce(f64::max);
            rows.push(Row { protocol: "TCP+UDP", after_ms, ..tcp });
        } else {
            rows.extend([tcp, udp]);
        }
    }
    Ok(rows)
}

impl Case {
    /// What the client saw, and after how many milliseconds.
    fn ask(&self, world: &Scenario, transport: Transport) -> Result<(String, Option<f64>)> {
        let cluster_ip = access::address(self.number, Family::V4);
        let pod = world.cluster.pod(CLIENT);
        let (client, to): (&Host, _) = match self.called {
            Called::ClusterIp => (&pod, cluster_ip),
            Called::Port(port) => (&pod, SocketAddr::new(cluster_ip.ip(), port)),
            Called::Outside(frontend) => {
                (world.cluster.outside(), frontend.address(world, self.number, Family::V4))
            }
        };
        // The kernel reports ICMP errors only to connected sockets.
        Ok(match client.ask(Probe::new(transport, to).connected().timeout(PATIENCE))? {
            Answer::Failed(failed) => (failed.error, Some(failed.elapsed_ms)),
            Answer::Reached(reached) => (reached.greeting.name, None),
        })
    }
}

/// The rows of all paths, by case.
pub(super) fn table(mut rows: Vec<Row>) -> Table {
    let mut table =
        Table::new(&["called", "path", "protocol", "the client saw", "after", "promised"]);
    rows.sort_by_key(|row| row.case);
    for row in rows {
        let case = &CASES[row.case];
        let is_prompt = row.after_ms.is_some_and(|after| after < AT_ONCE_MS);
        let is_as_promised = row.saw == case.error && (is_prompt || case.error == "timeout");
        let saw = if row.saw == "timeout" { "no answer" } else { &row.saw };
        let after = row.after_ms.map_or_else(String::new, |after| format!("{after:.1} ms"));
        let cells = [case.name, row.path.name(), row.protocol, saw, &after, case.promised];
        table.row(&cells, is_as_promised);
    }
    table
}
