//! Load from everywhere while something happens to the agents: new connections, connections that
//! stay, and datagrams, each of them counted.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::actors::client::Load;
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::plan::Family;
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::real::objects::{App, PORT, service};
use lb_tests::harness::wait::eventually;

use crate::world::{World, nodes};

/// New connections per second, of all clients together: 1,000.
const NEW_CONNECTIONS: [(Client, u64); 3] =
    [(Client::Pod, 400), (Client::Node, 300), (Client::Outside, 300)];
/// Requests per second on connections that stay, and datagrams per second, of each client.
const REQUESTS: u64 = 50;
const DATAGRAMS: u64 = 100;
/// The longest load; it ends when the test is done.
const LONGEST: Duration = Duration::from_secs(400);
/// How long an answer may take. A packet that is lost shows as an answer after a second or more,
/// for the kernel sends it again; a datagram has no second chance.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Servers and their Service.
pub(crate) const SERVERS: &str = "servers";
const CLIENT: &str = "client";

/// What a client does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    /// Opens connections, and ends each after an answer.
    NewConnections,
    /// Asks on connections that stay.
    Requests,
    /// Sends datagrams from one port.
    Datagrams,
}

impl Kind {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::NewConnections, Self::Requests, Self::Datagrams];
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Client {
    Pod,
    Node,
    Outside,
}

/// Running loads.
pub(crate) struct Traffic {
    loads: Vec<(String, Load)>,
    // Whom the loads run on.
    _hosts: Vec<Host>,
}

/// Makes servers on every node, and a client pod.
pub(crate) fn set_up(world: &World) -> Result<()> {
    world.apply(&[
        App::new(SERVERS, 3).grace(10).deployment(),
        App::new(CLIENT, 1).on(2).deployment(),
        service(SERVERS, SERVERS, "NodePort"),
    ])
}

impl Traffic {
    /// Loads of these kinds from each client.
    pub(crate) fn start(world: &World, kinds: &[Kind]) -> Result<Self> {
        let inside = world.cluster_ips(SERVERS)?;
        let ports = [world.node_port(SERVERS, "tcp")?, world.node_port(SERVERS, "udp")?];
        let mut traffic = Self { loads: Vec::new(), _hosts: Vec::new() };
        for (client, rate) in NEW_CONNECTIONS {
            let host = match client {
                Client::Pod => world.client(CLIENT)?,
                Client::Node => world.node(3)?,
                Client::Outside => world.outside()?,
            };
            // Half in each family, because the paths differ.
            for family in Family::ALL {
                let [tcp, udp] = match client {
                    Client::Outside => ports.map(|port| SocketAddr::new(world_entry(family), port)),
                    _ => [SocketAddr::new(inside.get(family), PORT); 2],
                };
                // The agent learns of a new pod's device by itself.
                eventually(|| {
                    let answer = host.ask(Probe::udp(udp))?;
                    ensure!(answer.reached().is_some(), "{client:?}, {udp}: {answer:?}");
                    Ok(())
                })?;
                let [tcp, udp] = [Probe::tcp(tcp), Probe::udp(udp)].map(|it| it.timeout(TIMEOUT));
                for kind in kinds {
                    let load = match kind {
                        Kind::NewConnections => host.load(&tcp, rate / 2, LONGEST)?,
                        Kind::Requests => host.load_keepalive(&tcp, REQUESTS / 2, LONGEST)?,
                        Kind::Datagrams => host.load(&udp, DATAGRAMS / 2, LONGEST)?,
                    };
                    traffic.loads.push((format!("{client:?} {family:?} {kind:?}"), load));
                }
            }
            traffic._hosts.push(host);
        }
        Ok(traffic)
    }

    /// Ends the loads. Nothing was lost and nothing reset; tells the longest gaps.
    pub(crate) fn finish(self, what: &str) -> Result<()> {
        let mut expectations = Expectations::default();
        let mut longest: f64 = 0.0;
        let (mut sent, mut connections) = (0, 0);
        for (name, load) in self.loads {
            let report = load.stop()?;
            longest = longest.max(report.longest_gap_ms);
            sent += report.sent;
            connections += report.connections;
            let whole = format!("{name}: {:?} of {} failed", report.failed, report.sent);
            expectations.is_true(whole, report.failures() == 0 && report.ok > 0);
            println!(
                "{what}, {name}: {} sent, {} failed, longest gap {:.0} ms, slowest answer {:.0} ms",
                report.sent,
                report.failures(),
                report.longest_gap_ms,
                report.slowest_ms
            );
        }
        println!("{what}: {sent} sent, {connections} connections, longest gap {longest:.0} ms");
        ensure!(sent > 0, "no load ran");
        expectations.finish()
    }
}

/// The node that the client outside comes to.
fn world_entry(family: Family) -> std::net::IpAddr {
    let first = nodes().next().unwrap_or(1);
    lb_tests::harness::real::plan::node(first).get(family)
}
