//! Calls that reach a backend: rows 3.1 to 3.3 of docs/semantics.md.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;

use super::report::Table;
use super::scene::{CLIENT, FAR, NEAR, Number, Path};
use super::stop::Stop;
use crate::harness::echo::{Answer, Probe, Transport};
use crate::harness::netns::actors::host::Host;
use crate::harness::netns::topology::plan::{Family, cluster_ip};
use crate::harness::netns::words::scenario::{PORT, Scenario, expect};

/// A ClusterIP with its port.
pub(super) fn address(number: Number, family: Family) -> SocketAddr {
    (cluster_ip(number as u8).get(family), PORT).into()
}

/// One call, and the answer that is promised.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) client: &'a Host,
    pub(super) to: SocketAddr,
    pub(super) backend: &'static str,
    /// The client's address that the backend must see.
    pub(super) seen: IpAddr,
}

/// The result of one call, or of a TCP and a UDP call with equal results.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) protocol: &'static str,
    pub(super) answered: String,
    pub(super) backend_saw: String,
    pub(super) is_as_promised: bool,
}

impl Call<'_> {
    /// Calls by TCP and by UDP; one outcome if both have the same result.
    pub(super) fn outcomes(&self) -> Result<Vec<Outcome>> {
        let tcp = self.outcome("TCP", &self.client.ask(Probe::new(Transport::Tcp, self.to))?);
        let udp = self.outcome("UDP", &self.client.ask(Probe::new(Transport::Udp, self.to))?);
        let same = (&tcp.answered, &tcp.backend_saw, tcp.is_as_promised)
            == (&udp.answered, &udp.backend_saw, udp.is_as_promised);
        Ok(if same { vec![Outcome { protocol: "TCP+UDP", ..tcp }] } else { vec![tcp, udp] })
    }

    fn outcome(&self, protocol: &'static str, answer: &Answer) -> Outcome {
        let expected = expect("call", answer, self.to, &[self.backend], &[self.seen]);
        let (answered, backend_saw) = match answer.reached() {
            Some(reached) => {
                (reached.greeting.name.clone(), reached.greeting.client_address.to_string())
            }
            None => (answer.error().unwrap_or_default().to_owned(), "-".to_owned()),
        };
        Outcome { protocol, answered, backend_saw, is_as_promised: expected.is_ok() }
    }
}

/// The result of a case on one path.
#[derive(Debug)]
pub(super) struct Row {
    case: usize,
    to: IpAddr,
    path: Path,
    promised: &'static str,
    outcome: Outcome,
}

/// A client and a Service.
struct Case<'a> {
    client: &'a Host,
    number: Number,
    backend: &'static str,
    promised: &'static str,
    seen: fn(&Scenario, Family) -> IpAddr,
}

const CASES: [&str; 5] =
    ["pod, same node", "pod, other node", "pod, hairpin", "node, same node", "node, other node"];

fn pod_ip(world: &Scenario, family: Family) -> IpAddr {
    world.cluster.pod(CLIENT).ip(family)
}

fn node_ip(world: &Scenario, family: Family) -> IpAddr {
    world.cluster.node(1).ip(family)
}

/// Makes every call on this path.
pub(super) fn rows(world: &Scenario, path: Path, stop: Stop) -> Result<Vec<Row>> {
    let pod = world.cluster.pod(CLIENT);
    let node = world.cluster.node(1);
    let case = |client, number, backend, (promised, seen)| Case {
        client,
        number,
        backend,
        promised,
        seen,
    };
    type Promise = (&'static str, fn(&Scenario, Family) -> IpAddr);
    let pods: Promise = ("pod's IP", pod_ip);
    let nodes: Promise = ("node's IP", node_ip);
    // A pod drops packets that arrive with its own address as their source.
    let hairpin = if path == Path::Connect { pods } else { nodes };
    let cases: [Case<'_>; CASES.len()] = [
        case(&pod, Number::Near, NEAR, pods),
        case(&pod, Number::Far, FAR, pods),
        case(&pod, Number::Own, CLIENT, hairpin),
        case(&node, Number::Near, NEAR, nodes),
        case(&node, Number::Far, FAR, nodes),
    ];
    let mut rows = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        for family in Family::ALL {
            stop.check()?;
            let Case { client, number, backend, promised, seen } = *case;
            let to = address(number, family);
            let call = Call { client, to, backend, seen: seen(world, family) };
            let row = |outcome| Row { case: index, to: to.ip(), path, promised, outcome };
            rows.extend(call.outcomes()?.into_iter().map(row));
        }
    }
    Ok(rows)
}

/// The rows of all paths, by case and family.
pub(super) fn table(mut rows: Vec<Row>) -> Table {
    let mut table = Table::new(&[
        "client, backend",
        "ClusterIP",
        "path",
        "protocol",
        "answered by",
        "backend saw",
        "promised",
    ]);
    // The sort is stable: paths keep the order in which they were tried.
    rows.sort_by_key(|row| (row.case, row.to.is_ipv6()));
    for row in rows {
        let cells = [
            CASES[row.case],
            &row.to.to_string(),
            row.path.name(),
            row.outcome.protocol,
            &row.outcome.answered,
            &row.outcome.backend_saw,
            row.promised,
        ];
        table.row(&cells, row.outcome.is_as_promised);
    }
    table
}
