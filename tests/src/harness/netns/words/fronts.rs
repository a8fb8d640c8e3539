//! Who asks a Service at which front end, and what it is to get.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};

use super::expectations::Expectations;
use super::scenario::{PORT, Scenario, expect};
use crate::harness::echo::{Answer, Probe, Transport};
use crate::harness::netns::actors::host::Host;
use crate::harness::netns::topology::plan::{
    Family, balancer_ip, cluster_ip, external_ip, node_port,
};
use crate::harness::wait::patiently;

/// How long is waited for what is not to come.
pub const SILENT: Duration = Duration::from_millis(150);
/// How soon a refusal must come: before TCP sends its SYN again, which takes a second.
const AT_ONCE: Duration = Duration::from_millis(900);

/// Both transports in both families.
pub fn kinds() -> impl Iterator<Item = (Transport, Family)> {
    let transports = [Transport::Tcp, Transport::Udp];
    transports.into_iter().flat_map(|transport| Family::ALL.map(|family| (transport, family)))
}

/// Where a client asks.
#[derive(Clone, Copy, Debug)]
pub enum Front {
    /// The node port, at the address of this node.
    NodePort(u8),
    /// The node port, at the loopback address.
    Loopback,
    /// The load balancer's address.
    Balancer,
    /// The external IP.
    External,
    /// The ClusterIP.
    ClusterIp,
}

impl Front {
    /// Its address and port for the Service of this number.
    pub fn at(self, scenario: &Scenario, number: u8, family: Family) -> SocketAddr {
        let (ip, port) = match self {
            Self::NodePort(node) => (scenario.cluster.node(node).ip(family), node_port(number)),
            Self::Loopback => (loopback(family), node_port(number)),
            Self::Balancer => (balancer_ip(number).get(family), PORT),
            Self::External => (external_ip(number).get(family), PORT),
            Self::ClusterIp => (cluster_ip(number).get(family), PORT),
        };
        (ip, port).into()
    }
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => std::net::Ipv4Addr::LOCALHOST.into(),
        Family::V6 => std::net::Ipv6Addr::LOCALHOST.into(),
    }
}

/// What a client gets.
#[derive(Clone, Copy, Debug)]
pub enum Got<'a> {
    /// An answer of this server, which saw one of these hosts' addresses.
    Answer(&'a str, &'a [&'a str]),
    /// A refusal, at once.
    Refusal,
    /// Another error of the call, by its name.
    Error(&'a str),
    /// Nothing.
    Silence,
}

/// The address that a host has, by its name.
fn address_of(scenario: &Scenario, host: &str, family: Family) -> Vec<IpAddr> {
    match host {
        "outside" => vec![scenario.cluster.outside().ip(family)],
        "node1" => node_addresses(scenario, 1, family),
        "node2" => node_addresses(scenario, 2, family),
        pod => vec![scenario.cluster.pod(pod).ip(family)],
    }
}

/// Every address of a node that a backend may see: its own and, under a bridge, the
/// gateway's of its pods.
fn node_addresses(scenario: &Scenario, node: u8, family: Family) -> Vec<IpAddr> {
    let host = scenario.cluster.node(node);
    let gateway = host.pod_cidrs().into_iter().find(|cidr| Family::of(cidr.addr()) == family);
    let first = gateway.and_then(|cidr| cidr.hosts().find(|ip| *ip != cidr.network()));
    std::iter::once(host.ip(family)).chain(first).collect()
}

/// Asks once and compares.
///
/// # Errors
/// Anything else came.
pub fn ask(scenario: &Scenario, client: &Host, probe: Probe, got: Got<'_>) -> Result<()> {
    let to = probe.to;
    let family = Family::of(to.ip());
    let what = format!("{} -> {to} {:?}", client.name(), probe.transport);
    let probe = if matches!(got, Got::Silence) { probe.timeout(SILENT) } else { probe };
    let answer = client.ask(probe)?;
    match got {
        Got::Answer(server, seen) => {
            let seen: Vec<_> =
                seen.iter().flat_map(|host| address_of(scenario, host, family)).collect();
            expect(&what, &answer, to, &[server], &seen).map(drop)
        }
        Got::Refusal => {
            let refused = answer.error() == Some("ECONNREFUSED");
            ensure!(refused, "{what}: not refused: {answer:?}");
            let Answer::Failed(failed) = &answer else { return Ok(()) };
            let at_once = patiently(AT_ONCE).as_millis() as f64;
            ensure!(failed.elapsed_ms < at_once, "{what}: refused late: {answer:?}");
            Ok(())
        }
        Got::Error(name) => {
            ensure!(answer.error() == Some(name), "{what}: not {name}: {answer:?}");
            Ok(())
        }
        Got::Silence => {
            ensure!(answer.error() == Some("timeout"), "{what}: no silence: {answer:?}");
            Ok(())
        }
    }
}

/// A row: who asks which Service, and what it gets at every front end in question.
pub type Row<'a> = (&'a str, u8, Got<'a>);

/// Tries every row of a table at every one of these front ends, over both transports and
/// families.
pub fn try_rows(
    scenario: &Scenario,
    expectations: &mut Expectations,
    fronts: &[Front],
    table: &[Row<'_>],
) {
    for kind @ (transport, family) in kinds() {
        for front in fronts {
            for (client, number, got) in table {
                let probe = Probe::new(transport, front.at(scenario, *number, family));
                let outcome = match *client {
                    "outside" => ask(scenario, scenario.cluster.outside(), probe, *got),
                    "node1" => ask(scenario, &scenario.cluster.node(1), probe, *got),
                    "node2" => ask(scenario, &scenario.cluster.node(2), probe, *got),
                    pod => ask(scenario, &scenario.cluster.pod(pod), probe, *got),
                };
                expectations.check(format!("{front:?} {kind:?}"), outcome);
            }
        }
    }
}
