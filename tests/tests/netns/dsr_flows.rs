//! Direct server return over time: backends that go, agents that are killed, and encapsulated
//! packets of other senders.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_common::abi::address::{Be16, Ipv4, Ipv6};
use lb_common::abi::frontend::UDP;
use lb_common::balance::Endpoint as End;
use lb_testing::family::TestFamily;
use lb_testing::frame::{ETHERNET, Frame};
use lb_testing::tunnel::encapsulated;
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::actors::client::{Connection, stop_without_loss};
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::cluster::{Builder, Cluster};
use lb_tests::harness::netns::topology::plan::{Family, cidr};
use lb_tests::harness::netns::traffic::ipip::Tunnel;
use lb_tests::harness::netns::traffic::raw;
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::frontends::{Frontend, Got, SILENT, kinds, try_cases};
use lb_tests::harness::netns::words::manifests::Endpoint;
use lb_tests::harness::netns::words::scenario::{SMALL_MAPS, Scenario, TARGET};
use lb_tests::harness::wait::{PATIENCE, eventually};

/// The Services of the tests by number: of pods that come and go, of a pod on node 2, and of
/// the same pod by `snat`.
const MOVING: u8 = 1;
const FAR: u8 = 2;
const FAR_SNAT: u8 = 3;

const ANSWER: Duration = Duration::from_secs(1);
const AFFINITY: Duration = Duration::from_secs(300);
const FRONTENDS: [Frontend; 2] = [Frontend::NodePort(1), Frontend::Balancer];

/// Node 1 is asked; `b` serves there, `c` and `e` on node 2; `a` and `d` ask.
fn start(builder: Builder, xdp: &str) -> Result<Scenario> {
    let cluster = cidr::cluster();
    let fixed = ["--socket-lb", "off", "--external-mode", "dsr", "--cluster-cidr", &cluster];
    let builder = builder.any_source().pod(1, "a").pod(1, "b").pod(2, "c").pod(2, "d").pod(2, "e");
    let arguments = [&fixed[..], &["--xdp", xdp], &SMALL_MAPS].concat();
    let mut scenario = Scenario::start(builder, &arguments)?;
    scenario.serve(&["b", "c", "d", "e"])?;
    scenario.publish(&scenario.exposed("moving", MOVING), &scenario.endpoints(&["c"]))?;
    scenario.publish(&scenario.exposed("far", FAR), &scenario.endpoints(&["c"]))?;
    let by_snat = scenario.exposed("far-snat", FAR_SNAT).external_mode("snat");
    scenario.publish(&by_snat, &scenario.endpoints(&["c"]))?;
    scenario.cluster.fabric().route_external_to(1)?;
    Ok(scenario)
}

/// Connections and sockets of a client outside that stay.
struct Held {
    tcp: Vec<(SocketAddr, Connection)>,
    udp: Vec<(SocketAddr, Connection)>,
}

impl Held {
    /// Opens one of each kind; all are with `server`.
    fn open(scenario: &Scenario, server: &str) -> Result<Self> {
        let mut held = Self { tcp: Vec::new(), udp: Vec::new() };
        for family in Family::ALL {
            for front in FRONTENDS {
                let to = front.at(scenario, MOVING, family);
                let outside = scenario.cluster.outside();
                held.tcp.push((to, outside.open(Probe::tcp(to))?));
                held.udp.push((to, outside.open(Probe::udp(to).connected())?));
            }
        }
        let mut expectations = Expectations::default();
        held.check(scenario, &mut expectations, "at first", [server; 3])?;
        expectations.finish()?;
        Ok(held)
    }

    /// Who serves the connections, the sockets, and new connections.
    fn check(
        &self,
        scenario: &Scenario,
        expectations: &mut Expectations,
        when: &str,
        [tcp, udp, new]: [&str; 3],
    ) -> Result<()> {
        let own = scenario.cluster.outside();
        for (kind, all, server) in [("TCP", &self.tcp, tcp), ("UDP", &self.udp, udp)] {
            for (to, connection) in all {
                let answer = connection.exchange(when, ANSWER)?;
                let is_it = answer.name() == Some(server)
                    && answer.client_address() == Some(own.ip(Family::of(to.ip())));
                expectations.is_true(format!("{when}: {kind} of {to}: {answer:?}"), is_it);
            }
        }
        for (to, _) in &self.tcp {
            for probe in [Probe::tcp(*to), Probe::udp(*to)] {
                let answer = own.ask(probe)?;
                expectations
                    .is_true(format!("{when}: new: {answer:?}"), answer.name() == Some(new));
            }
        }
        Ok(())
    }
}

/// What becomes of one endpoint.
type Change = fn(Endpoint) -> Endpoint;

fn changed(scenario: &Scenario, pods: &[(&str, Change)]) -> Vec<Endpoint> {
    let of_pod = |(pod, change): &(&str, Change)| {
        scenario.endpoints(&[pod]).into_iter().map(*change).collect::<Vec<_>>()
    };
    pods.iter().flat_map(of_pod).collect()
}

#[test]
fn connections_stay_and_datagrams_move_as_backends_go() -> Result<()> {
    const READY: Change = |endpoint| endpoint;
    const TERMINATING: Change = Endpoint::terminating;
    /// When, what becomes of the endpoints then, and who serves the connections, the sockets
    /// and what is new.
    type Step<'a> = (&'a str, &'a [(&'a str, Change)], [&'a str; 3]);
    const STEPS: [Step<'_>; 6] = [
        ("only c, terminating", &[("c", TERMINATING)], ["c", "c", "c"]),
        ("c terminating", &[("c", TERMINATING), ("e", READY)], ["c", "c", "e"]),
        ("c removed", &[("e", READY)], ["c", "e", "e"]),
        ("another node's", &[("b", READY)], ["c", "b", "b"]),
        ("back again", &[("c", READY)], ["c", "c", "c"]),
        (
            "not ready beside another node's",
            &[("c", Endpoint::not_ready), ("b", READY)],
            ["c", "b", "b"],
        ),
    ];
    let mut scenario = start(Cluster::builder(), "auto")?;
    let service = scenario.exposed("moving", MOVING);
    let mut expectations = Expectations::default();
    let held = Held::open(&scenario, "c")?;
    for (when, endpoints, servers) in STEPS {
        let endpoints = changed(&scenario, endpoints);
        scenario.publish(&service, &endpoints).context(when)?;
        held.check(&scenario, &mut expectations, when, servers)?;
    }
    scenario.publish(&service, &scenario.endpoints(&["c"]))?;
    for node in [1, 2] {
        scenario.take_agent(node)?.kill9()?;
        held.check(&scenario, &mut expectations, &format!("agent {node} killed"), ["c"; 3])?;
        scenario.start_agent(node)?;
        held.check(&scenario, &mut expectations, &format!("agent {node} again"), ["c"; 3])?;
    }
    expectations.finish()
}

/// A client that asks at several frontends from one port, at the same time, of one backend.
#[test]
fn one_client_port_works_at_many_frontends() -> Result<()> {
    let scenario = start(Cluster::builder(), "auto")?;
    let outside = scenario.cluster.outside();
    let mut expectations = Expectations::default();
    for (transport, family) in kinds() {
        let frontends =
            [Frontend::NodePort(1), Frontend::Balancer, Frontend::External, Frontend::NodePort(2)];
        let mut open = Vec::new();
        for front in frontends {
            let to = front.at(&scenario, FAR, family);
            let probe = Probe::new(transport, to).source_port(40_000).connected();
            // A port that is in use at the backend is recognised when the SYN is repeated, a
            // second after the first.
            open.push((to, outside.open(probe.timeout(PATIENCE))?));
        }
        for when in ["once", "twice"] {
            for (to, connection) in &open {
                let answer = connection.exchange(when, ANSWER)?;
                let is_it = answer.reached().is_some_and(|it| it.peer == *to);
                expectations.is_true(format!("{to} {transport:?}: {answer:?}"), is_it);
            }
        }
    }
    expectations.finish()
}

/// Backends of one node share its new flows; with session affinity a client keeps its backend.
#[test]
fn backends_of_a_node_take_turns_or_keep_their_client() -> Result<()> {
    let scenario = start(Cluster::builder(), "auto")?;
    let endpoints = scenario.endpoints(&["b", "c", "e"]);
    let service = scenario.exposed("moving", MOVING);
    let mut expectations = Expectations::default();
    for (service, expected) in [(service.clone(), 3), (service.affinity(AFFINITY), 1)] {
        scenario.publish(&service, &endpoints)?;
        for family in Family::ALL {
            for front in FRONTENDS {
                let to = front.at(&scenario, MOVING, family);
                let mut servers = BTreeSet::new();
                for _ in 0..30 {
                    let answer = scenario.cluster.outside().tcp(to)?;
                    servers.insert(answer.name().unwrap_or("nobody").to_owned());
                }
                let what = format!("{to}: {servers:?} instead of {expected}");
                expectations
                    .is_true(what, servers.len() == expected && !servers.contains("nobody"));
            }
        }
    }
    expectations.finish()
}

/// Either agent is killed and comes back, again and again, under load.
#[test]
fn a_killed_and_restarted_agent_loses_no_packet() -> Result<()> {
    const RATE: u64 = 200;
    const TRAFFIC: Duration = Duration::from_secs(60);
    let mut scenario = start(Cluster::builder(), "auto")?;
    let mut loads = Vec::new();
    for family in Family::ALL {
        let to = Frontend::NodePort(1).at(&scenario, FAR, family);
        loads.extend(scenario.cluster.outside().loads(to, RATE, TRAFFIC)?);
    }
    let start = Instant::now();
    for node in [1, 2, 1, 2] {
        scenario.take_agent(node)?.kill9()?;
        std::thread::sleep(Duration::from_millis(200));
        scenario.start_agent(node)?;
    }
    stop_without_loss(loads, start.elapsed().as_secs() * RATE / 2)
}

fn family<F: TestFamily>() -> Family {
    if F::NUMBER == 4 { Family::V4 } else { Family::V6 }
}

fn address<F: TestFamily>(ip: IpAddr) -> F::Address {
    match ip {
        IpAddr::V4(ip) => F::address(&ip.octets()),
        IpAddr::V6(ip) => F::address(&ip.octets()),
    }
}

/// The sender of an encapsulated datagram, its number of outer headers, and how long an answer
/// is awaited.
struct Sent<'a> {
    by: &'a Host,
    tunnels: usize,
    patience: Duration,
}

/// Sends a datagram of the client outside to `to` in a tunnel to node 2; returns whether the
/// client is answered.
fn is_answered<F: TestFamily>(
    scenario: &Scenario,
    to: SocketAddr,
    sent: &Sent<'_>,
) -> Result<bool> {
    let (outside, node2) = (scenario.cluster.outside(), scenario.cluster.node(2));
    let own = outside.ip(family::<F>());
    let socket = outside.netns().run(|| Ok(UdpSocket::bind((own, 0))?))?;
    socket.set_read_timeout(Some(sent.patience))?;
    let end = |at: SocketAddr| End { address: address::<F>(at.ip()), port: Be16::new(at.port()) };
    let mut frame = Frame::<F>::of(UDP, end(socket.local_addr()?), end(to), 0).bytes();
    let ends = [sent.by, &**node2].map(|host| address::<F>(host.ip(family::<F>())));
    for _ in 1..sent.tunnels {
        frame = encapsulated::<F>(&frame, ends);
    }
    raw::tunnel(sent.by, node2.ip(family::<F>()), &frame[ETHERNET..])?;
    let mut buffer = [0; 2048];
    match socket.recv_from(&mut buffer) {
        Ok((_, from)) => {
            ensure!(from == to, "answered by {from}");
            Ok(true)
        }
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// How many flows a node has.
fn flows(scenario: &mut Scenario, node: u8) -> Result<usize> {
    let flows = scenario.agent(node)?.get("flows")?;
    Ok(flows.as_array().context("no list of flows")?.len())
}

fn check_strangers<F: TestFamily>(
    scenario: &mut Scenario,
    expectations: &mut Expectations,
) -> Result<()> {
    let (node1, node3) = (scenario.cluster.node(1), scenario.cluster.node(3));
    let (a, d) = (scenario.cluster.pod("a"), scenario.cluster.pod("d"));
    for front in FRONTENDS {
        let to = front.at(scenario, FAR, family::<F>());
        let by = |by, tunnels| Sent { by, tunnels, patience: SILENT };
        for known in [&node1, &node3] {
            let is_taken =
                is_answered::<F>(scenario, to, &Sent { patience: ANSWER, ..by(known, 1) })?;
            expectations.is_true(format!("{to} by {}", known.name()), is_taken);
        }
        let before = flows(scenario, 2)?;
        for (what, sent) in [
            ("a stranger's", by(scenario.cluster.outside(), 1)),
            ("a pod's", by(&a, 1)),
            ("that of a pod there", by(&d, 1)),
            ("a tunnel in a tunnel", by(&node1, 2)),
            ("a stranger's in a tunnel", by(scenario.cluster.outside(), 2)),
        ] {
            let is_taken = is_answered::<F>(scenario, to, &sent)?;
            expectations.is_true(format!("{to}: {what} was taken"), !is_taken);
        }
        let after = flows(scenario, 2)?;
        expectations.is_true(format!("{to}: {before} flows, then {after}"), before == after);
    }
    Ok(())
}

/// A packet is decapsulated if a node of the cluster encapsulated it.
#[test]
fn encapsulated_packets_of_strangers_reach_no_backend() -> Result<()> {
    for (xdp, builder) in
        [("off", Cluster::builder()), ("native", Cluster::builder().no_tx_checksum_offload())]
    {
        let mut scenario = start(builder.nodes(3), xdp)?;
        let mut expectations = Expectations::default();
        check_strangers::<Ipv4>(&mut scenario, &mut expectations)?;
        check_strangers::<Ipv6>(&mut scenario, &mut expectations)?;
        expectations.finish().with_context(|| format!("--xdp {xdp}"))?;
        check_left::<Ipv4>(&scenario)?;
        check_left::<Ipv6>(&scenario)?;
    }
    Ok(())
}

/// Packets of a node that has left the cluster are soon no longer decapsulated.
fn check_left<F: TestFamily>(scenario: &Scenario) -> Result<()> {
    let file = "node-node3.json";
    if scenario.manifests.path().join(file).exists() {
        scenario.manifests.remove(file)?;
    }
    let to = Frontend::NodePort(1).at(scenario, FAR, family::<F>());
    let (node1, node3) = (scenario.cluster.node(1), scenario.cluster.node(3));
    let by = |by, patience| Sent { by, tunnels: 1, patience };
    eventually(|| {
        let is_taken = is_answered::<F>(scenario, to, &by(&node3, SILENT))?;
        ensure!(!is_taken, "{to}: packets of node3 are still decapsulated");
        Ok(())
    })?;
    ensure!(
        is_answered::<F>(scenario, to, &by(&node1, ANSWER))?,
        "a packet of node1 was not decapsulated"
    );
    Ok(())
}

/// A container network that puts what pods say to each other into the very tunnels that
/// requests go by, between the same nodes.
#[test]
fn the_tunnels_of_a_container_network_work_too() -> Result<()> {
    for (xdp, builder) in
        [("off", Cluster::builder()), ("native", Cluster::builder().no_tx_checksum_offload())]
    {
        let scenario = start(builder, xdp)?;
        let (node1, node2) = (scenario.cluster.node(1), scenario.cluster.node(2));
        let tunnels = [Tunnel::start(&node1, &node2)?, Tunnel::start(&node2, &node1)?];
        let mut expectations = Expectations::default();
        let (a, d) = (scenario.cluster.pod("a"), scenario.cluster.pod("d"));
        for (transport, family) in kinds() {
            let answer = a.ask(Probe::new(transport, d.at(family, TARGET)))?;
            let is_it = answer.client_address() == Some(a.ip(family));
            expectations.is_true(format!("pod to pod: {answer:?}"), is_it);
        }
        let carried = tunnels.each_ref().map(Tunnel::carried);
        expectations
            .is_true(format!("carried: {carried:?}"), carried.iter().all(|count| *count > 0));
        let table = [
            ("outside", FAR, Got::Answer("c", &["outside"])),
            ("outside", FAR_SNAT, Got::Answer("c", &["node1"])),
        ];
        try_cases(&scenario, &mut expectations, &FRONTENDS, &table);
        let inside =
            [("a", FAR, Got::Answer("c", &["a"])), ("node1", FAR, Got::Answer("c", &["node1"]))];
        try_cases(&scenario, &mut expectations, &[Frontend::ClusterIp], &inside);
        expectations.finish().with_context(|| format!("--xdp {xdp}"))?;
    }
    Ok(())
}
