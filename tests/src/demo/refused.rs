//! Calls that reach nobody: table 4 of the Service contract, as far as pods see it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;

use super::report::Table;
use super::stop::Stop;
use super::{CLIENT, Number, Path, access};
use crate::echo::{Answer, Probe, Transport};
use crate::netns::plan::Family;
use crate::netns::world::World;

/// "At once": far below the second after which TCP would send its SYN again.
const AT_ONCE_MS: f64 = 200.0;
/// How long a call waits that nobody answers.
const PATIENCE: Duration = Duration::from_millis(400);

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
    number: Number,
    /// In place of the Service's own.
    port: Option<u16>,
    promised: &'static str,
    error: &'static str,
}

const CASES: [Case; 3] = [
    Case {
        name: "Service without endpoints",
        number: Number::Empty,
        port: None,
        promised: "refused at once",
        error: "ECONNREFUSED",
    },
    Case {
        name: "port that the Service has not",
        number: Number::Near,
        port: Some(4242),
        promised: "refused at once",
        error: "ECONNREFUSED",
    },
    Case {
        name: "ClusterIP that no Service has",
        number: Number::Nobody,
        port: None,
        promised: "dropped on the node",
        error: "timeout",
    },
];

/// Makes every call by this path.
pub(super) fn rows(world: &World, path: Path, stop: Stop) -> Result<Vec<Row>> {
    let client = world.cluster.pod(CLIENT);
    let mut rows = Vec::new();
    for (index, case) in CASES.iter().enumerate() {
        stop.check()?;
        let own = access::address(case.number, Family::V4);
        let to = SocketAddr::new(own.ip(), case.port.unwrap_or(own.port()));
        let ask = |transport, protocol| -> Result<Row> {
            // Only a connected socket is told of an ICMP error.
            let answer = client.ask(Probe::new(transport, to).connected().timeout(PATIENCE))?;
            let (saw, after_ms) = match answer {
                Answer::Failed(failed) => (failed.error, Some(failed.elapsed_ms)),
                Answer::Reached(reached) => (reached.greeting.name, None),
            };
            Ok(Row { case: index, path, protocol, saw, after_ms })
        };
        let (tcp, udp) = (ask(Transport::Tcp, "TCP")?, ask(Transport::Udp, "UDP")?);
        if tcp.saw == udp.saw {
            let after_ms = tcp.after_ms.into_iter().chain(udp.after_ms).reduce(f64::max);
            rows.push(Row { protocol: "TCP+UDP", after_ms, ..tcp });
        } else {
            rows.extend([tcp, udp]);
        }
    }
    Ok(rows)
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
