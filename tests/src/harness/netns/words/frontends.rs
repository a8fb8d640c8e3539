//! Which client asks a Service at which frontend, and the answer that is expected.

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

/// How long an answer is awaited that must not come.
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
pub enum Frontend {
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

impl Frontend {
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

/// The answer that a client gets.
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
        "node1" => scenario.cluster.node(1).source_addresses(family),
        "node2" => scenario.cluster.node(2).source_addresses(family),
        pod => vec![scenario.cluster.pod(pod).ip(family)],
    }
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

/// A case: the client, the number of the Service, and the answer at each frontend in question.
pub type Case<'a> = (&'a str, u8, Got<'a>);

/// Tries every case of a table at every one of these frontends, over both transports and
/// families.
pub fn try_cases(
    scenario: &Scenario,
    expectations: &mut Expectations,
    frontends: &[Frontend],
    table: &[Case<'_>],
) {
    for kind @ (transport, family) in kinds() {
        for front in frontends {
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
