//! A pod that terminates: who is sent to it until it is gone, by each way to its Service, with
//! a real API server. The test is the kubelet.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_tests::harness::controlplane::Options;
use lb_tests::harness::controlplane::live::exposed::{Policy, exposed, wait_endpoints};
use lb_tests::harness::controlplane::live::{LiveCluster, PORT};
use lb_tests::harness::echo::{Answer, Probe};
use lb_tests::harness::netns::actors::client::Connection;
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, balancer_ip, cluster_ip};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::wait::PATIENCE;

/// The pod that terminates, on node 1, the one that takes over, and the clients' own.
const OLD: &str = "old";
const NEW: &str = "new";
const CLIENT: &str = "client";
/// The Service, and one that is made to see that an agent has seen all before it.
const NUMBER: u8 = 20;
const MARK: u8 = 30;
/// Longer than the test takes.
const GRACE: Duration = Duration::from_secs(600);
/// New connections over each way.
const TRIES: usize = 6;
/// Where the next datagram to be the first of its flow comes from; the kernel gives no such
/// ports by itself.
static NEXT_PORT: AtomicU16 = AtomicU16::new(20_000);
/// More than a packet holds.
const LONG: usize = 20_000;

/// A way to the Service.
struct Way<'a> {
    what: String,
    from: &'a Host,
    tcp: SocketAddr,
    udp: SocketAddr,
}

/// A connection and a flow over a way, as long as there is somebody at its end.
struct Held {
    what: String,
    tcp: Connection,
    udp: Connection,
}

impl Way<'_> {
    fn open(&self) -> Result<Held> {
        let context = || format!("{} cannot be opened", self.what);
        let tcp = self.from.open(Probe::tcp(self.tcp).timeout(PATIENCE)).with_context(context)?;
        let udp = self.from.open(Probe::udp(self.udp).timeout(PATIENCE)).with_context(context)?;
        Ok(Held { what: self.what.clone(), tcp, udp })
    }

    /// New connections and flows are answered by this pod.
    fn check_new(&self, server: &str) -> Result<()> {
        for _ in 0..TRIES {
            // A datagram from a port that was used before may belong to the flow of then, which
            // keeps its backend: the kernel draws ports by chance, and repeats itself.
            let port = NEXT_PORT.fetch_add(1, Ordering::Relaxed);
            for probe in [Probe::tcp(self.tcp), Probe::udp(self.udp).source_port(port)] {
                let answer = self.from.ask(probe)?;
                ensure!(answer.name() == Some(server), "{answer:?} instead of {server}");
            }
        }
        Ok(())
    }
}

fn by(answer: &Answer, server: &str) -> Result<()> {
    ensure!(answer.name() == Some(server), "{answer:?} instead of {server}");
    Ok(())
}

impl Held {
    fn check_tcp(&self, server: &str) -> Result<()> {
        by(&self.tcp.exchange(&"x".repeat(LONG), PATIENCE)?, server)
    }

    fn check_udp(&self, server: &str) -> Result<()> {
        by(&self.udp.exchange("again", PATIENCE)?, server)
    }

    /// Waits until the flow is answered by another pod; until then it is by the old one.
    fn wait_moved(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            let answer = self.udp.exchange("again", PATIENCE)?;
            if answer.name() == Some(NEW) {
                return Ok(());
            }
            by(&answer, OLD)?;
            ensure!(start.elapsed() < PATIENCE, "still {answer:?}");
        }
    }
}

/// Every way to the Service that leads to the old pod; outside clients come to `entries`.
fn ways<'a>(live: &'a LiveCluster, client: &'a Host, entries: &[u8]) -> Result<Vec<Way<'a>>> {
    let outside = live.cluster.outside();
    let (tcp, udp) = (live.node_port("web", "tcp")?, live.node_port("web", "udp")?);
    let mut ways = Vec::new();
    for family in Family::ALL {
        let both = |what: &str, from: &'a Host, tcp: SocketAddr, udp: u16| {
            let udp = SocketAddr::new(tcp.ip(), udp);
            Way { what: format!("{what} {tcp}"), from, tcp, udp }
        };
        let inside = SocketAddr::new(cluster_ip(NUMBER).get(family), PORT);
        ways.push(both("ClusterIP", client, inside, PORT));
        let balanced = SocketAddr::new(balancer_ip(NUMBER).get(family), PORT);
        ways.push(both("LoadBalancer", outside, balanced, PORT));
        for node in entries {
            let at = live.cluster.node(*node).at(family, tcp);
            ways.push(both("NodePort", outside, at, udp));
        }
    }
    Ok(ways)
}

/// Waits until every agent has seen what the API server says of endpoints now.
fn settle(live: &LiveCluster) -> Result<()> {
    live.plane.apply(&exposed("mark", MARK, "ClusterIP", "web").to_string())?;
    live.wait_backends("mark", Some(1))
}

/// The old pod is deleted, with nobody beside it.
fn terminate_alone(live: &mut LiveCluster) -> Result<()> {
    live.plane.delete_pod("default", OLD, GRACE)?;
    live.plane.wait_for_slice("default", "web", PATIENCE, |endpoints| {
        let mut conditions = endpoints.iter().map(|one| (one.ready, one.serving, one.terminating));
        endpoints.len() == Family::ALL.len() && conditions.all(|all| all == (false, true, true))
    })?;
    settle(live)?;
    live.wait_members("web", &[OLD])
}

fn check_each<T>(
    expectations: &mut Expectations,
    when: &str,
    each: &[T],
    what: impl Fn(&T) -> (&str, Result<()>),
) {
    for one in each {
        let (what, outcome) = what(one);
        expectations.check(format!("{when}: {what}"), outcome);
    }
}

fn start(policy: Policy, arguments: &[&str]) -> Result<LiveCluster> {
    // With the policy Local, the old pod's node is the only one that answers.
    let second = if policy == Policy::Local { 1 } else { 2 };
    let builder = Cluster::builder().pod(1, CLIENT).pod(1, OLD).pod(second, NEW);
    let mut live = LiveCluster::start(builder, Options::default())?;
    live.serve(&[OLD, NEW])?;
    live.start_agents(arguments)?;
    live.create_pods("web", &[OLD])?;
    live.plane.apply(&exposed("web", NUMBER, "LoadBalancer", "web").to_string())?;
    live.set_ingress("web", balancer_ip(NUMBER))?;
    live.set_external_policy("web", policy)?;
    live.set_internal_policy("web", policy)?;
    live.wait_members("web", &[OLD])?;
    Ok(live)
}

fn check_all(policy: Policy, arguments: &[&str]) -> Result<()> {
    let mut live = start(policy, arguments)?;
    // With the policy Cluster, the old pod is elsewhere for those that come to node 2.
    let entries: &[u8] = if policy == Policy::Local { &[1] } else { &[1, 2] };
    live.cluster.fabric().route_external_to(entries[entries.len() - 1])?;
    let client = live.cluster.pod(CLIENT);
    let mut expectations = Expectations::default();

    let held = ways(&live, &client, entries)?.iter().map(Way::open).collect::<Result<Vec<_>>>()?;
    terminate_alone(&mut live)?;
    let ways = ways(&live, &client, entries)?;
    let node1 = live.cluster.node(1);
    let health = match policy {
        Policy::Cluster => None,
        Policy::Local => Some(node1.at(Family::V4, live.health_check_port("web")?)),
    };
    let check_health = |expectations: &mut Expectations, when: &str, endpoints| {
        if let Some(at) = health {
            expectations.check(when, wait_endpoints(live.cluster.outside(), at, endpoints));
        }
    };
    check_health(&mut expectations, "a terminating pod is not healthy", 0);
    check_each(&mut expectations, "alone, new", &ways, |way| (&way.what, way.check_new(OLD)));
    check_each(&mut expectations, "alone, tcp", &held, |held| (&held.what, held.check_tcp(OLD)));
    check_each(&mut expectations, "alone, udp", &held, |held| (&held.what, held.check_udp(OLD)));

    live.create_pods("web", &[NEW])?;
    live.wait_members("web", &[NEW])?;
    check_health(&mut expectations, "the second one is healthy", 1);
    check_each(&mut expectations, "two, new", &ways, |way| (&way.what, way.check_new(NEW)));
    check_each(&mut expectations, "two, tcp", &held, |held| (&held.what, held.check_tcp(OLD)));
    check_each(&mut expectations, "two, udp", &held, |held| (&held.what, held.check_udp(OLD)));

    live.plane.set_ready("default", OLD, false)?;
    live.plane.delete_pod("default", OLD, Duration::ZERO)?;
    check_each(&mut expectations, "gone, udp", &held, |held| (&held.what, held.wait_moved()));
    check_each(&mut expectations, "gone, tcp", &held, |held| (&held.what, held.check_tcp(OLD)));
    check_each(&mut expectations, "gone, new", &ways, |way| (&way.what, way.check_new(NEW)));
    expectations.finish().with_context(|| format!("{policy:?} {arguments:?}"))
}

#[test]
fn a_terminating_pod_drains_where_every_endpoint_serves() -> Result<()> {
    check_all(Policy::Cluster, &[])
}

#[test]
fn a_terminating_pod_drains_where_those_of_the_node_serve() -> Result<()> {
    check_all(Policy::Local, &[])
}

#[test]
fn and_by_packets_alone() -> Result<()> {
    check_all(Policy::Cluster, &["--socket-lb", "off"])?;
    check_all(Policy::Local, &["--socket-lb", "off"])
}
