//! Real sockets through node ports, load balancer addresses and external IPs: who answers,
//! which client it sees, and who is turned away.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_tests::echo::{Probe, Transport};
use lb_tests::netns::cluster::{Builder, Cluster};
use lb_tests::netns::cni::Cni;
use lb_tests::netns::host::Host;
use lb_tests::netns::manifests::{Endpoint, Service};
use lb_tests::netns::plan::{Family, balancer_ip, cidr, cluster_ip, external_ip};
use lb_tests::netns::rows::Rows;
use lb_tests::netns::world::{PORT, SMALL_MAPS, World, expect};

const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Udp];
/// How long is waited for what is not to come.
const SILENT: Duration = Duration::from_millis(150);
/// How soon a refusal must come.
const AT_ONCE: f64 = 100.0;

/// The Services of the tests by number: what their addresses and node ports end with.
const NEAR: u8 = 1;
const FAR: u8 = 2;
const HOST: u8 = 3;
const OWN: u8 = 4;
const NONE: u8 = 5;
const NEAR_LOCAL: u8 = 6;
const FAR_LOCAL: u8 = 7;

fn kinds() -> impl Iterator<Item = (Transport, Family)> {
    TRANSPORTS.into_iter().flat_map(|transport| Family::ALL.map(|family| (transport, family)))
}

fn pods(cni: Cni) -> Builder {
    Cluster::builder().cni(cni).pod(1, "a").pod(1, "b").pod(2, "c").pod(2, "d")
}

fn node_port(number: u8) -> u16 {
    30_000 + u16::from(number)
}

fn exposed(world: &World, name: &str, number: u8) -> Service {
    world
        .service(name, number)
        .node_port(node_port(number))
        .balancer(balancer_ip(number))
        .external_ips(external_ip(number))
}

/// Where a client asks.
#[derive(Clone, Copy, Debug)]
enum Front {
    NodePort(u8),
    Loopback,
    Balancer,
    External,
    ClusterIp,
}

impl Front {
    fn at(self, world: &World, number: u8, family: Family) -> SocketAddr {
        let (ip, port) = match self {
            Self::NodePort(node) => (world.cluster.node(node).ip(family), node_port(number)),
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
enum Got<'a> {
    /// An answer of this server, which saw one of these hosts' addresses.
    Answer(&'a str, &'a [&'a str]),
    Refusal,
    Silence,
}

/// The address that a host has, by its name.
fn address_of(world: &World, host: &str, family: Family) -> Vec<IpAddr> {
    match host {
        "outside" => vec![world.cluster.outside().ip(family)],
        "node1" => node_addresses(world, 1, family),
        "node2" => node_addresses(world, 2, family),
        pod => vec![world.cluster.pod(pod).ip(family)],
    }
}

/// Every address of a node that a backend may see: its own and, under a bridge, the
/// gateway's of its pods.
fn node_addresses(world: &World, node: u8, family: Family) -> Vec<IpAddr> {
    let host = world.cluster.node(node);
    let gateway = host.pod_cidrs().into_iter().find(|cidr| Family::of(cidr.addr()) == family);
    let first = gateway.and_then(|cidr| cidr.hosts().find(|ip| *ip != cidr.network()));
    std::iter::once(host.ip(family)).chain(first).collect()
}

/// Asks once and compares.
fn ask(world: &World, client: &Host, probe: Probe, got: Got<'_>) -> Result<()> {
    let to = probe.to;
    let family = Family::of(to.ip());
    let what = format!("{} -> {to} {:?}", client.name(), probe.transport);
    let probe = if matches!(got, Got::Silence) { probe.timeout(SILENT) } else { probe };
    let answer = client.ask(probe)?;
    match got {
        Got::Answer(server, seen) => {
            let seen: Vec<_> =
                seen.iter().flat_map(|host| address_of(world, host, family)).collect();
            expect(&what, &answer, to, &[server], &seen).map(drop)
        }
        Got::Refusal => {
            let refused = answer.error() == Some("ECONNREFUSED");
            ensure!(refused, "{what}: not refused: {answer:?}");
            let lb_tests::echo::Answer::Failed(failed) = &answer else { return Ok(()) };
            ensure!(failed.elapsed_ms < AT_ONCE, "{what}: refused late: {answer:?}");
            Ok(())
        }
        Got::Silence => {
            ensure!(answer.error() == Some("timeout"), "{what}: no silence: {answer:?}");
            Ok(())
        }
    }
}

/// A row: who asks which Service, and what it gets at every front end in question.
type Row<'a> = (&'a str, u8, Got<'a>);

/// Publishes the Services of the tests: near and far are served from node 1 and node 2.
fn publish(world: &mut World) -> Result<()> {
    world.serve(&["a", "b", "c"])?;
    world.serve_node(1)?;
    let node1 = world.cluster.node(1);
    let host = Family::ALL.map(|family| Endpoint::at(node1.ip(family)).node("node1"));
    let (near, far) = (world.endpoints(&["b"]), world.endpoints(&["c"]));
    world.publish(&exposed(world, "near", NEAR), &near)?;
    world.publish(&exposed(world, "far", FAR), &far)?;
    world.publish(&exposed(world, "host", HOST), &host)?;
    world.publish(&exposed(world, "own", OWN), &world.endpoints(&["a"]))?;
    world.publish(&exposed(world, "none", NONE), &[])?;
    world.publish(&exposed(world, "near-local", NEAR_LOCAL).external_local(), &near)?;
    world.publish(&exposed(world, "far-local", FAR_LOCAL).external_local(), &far)?;
    world.cluster.fabric().route_external_to(1)?;
    world.cluster.fabric().route_services_to(1)
}

fn try_rows(world: &World, rows: &mut Rows, fronts: &[Front], table: &[Row<'_>]) {
    for kind @ (transport, family) in kinds() {
        for front in fronts {
            for (client, number, got) in table {
                let probe = Probe::new(transport, front.at(world, *number, family));
                let outcome = match *client {
                    "outside" => ask(world, world.cluster.outside(), probe, *got),
                    "node1" => ask(world, &world.cluster.node(1), probe, *got),
                    "node2" => ask(world, &world.cluster.node(2), probe, *got),
                    pod => ask(world, &world.cluster.pod(pod), probe, *got),
                };
                rows.row(format!("{front:?} {kind:?}"), outcome);
            }
        }
    }
}

/// The rows 3.4 to 3.11 of the contract but 3.7, and those of table 4 for clients outside.
/// `masqueraded`: pods reach other nodes' addresses with the address of theirs.
fn check(world: &World, masqueraded: bool) -> Result<()> {
    use Front::{Balancer, ClusterIp, External, Loopback, NodePort};
    use Got::{Answer, Refusal, Silence};
    let mut rows = Rows::default();
    let from_node = Answer("c", &["node1"]);
    let outside = [
        ("outside", NEAR, Answer("b", &["outside"])),
        ("outside", FAR, from_node),
        ("outside", HOST, Answer("node1", &["outside"])),
        ("outside", NONE, Refusal),
        ("outside", NEAR_LOCAL, Answer("b", &["outside"])),
        ("outside", FAR_LOCAL, Silence),
    ];
    try_rows(world, &mut rows, &[NodePort(1), Balancer, External], &outside);
    let routed = [
        ("outside", NEAR, Answer("b", &["node1"])),
        ("outside", FAR, from_node),
        ("outside", HOST, Answer("node1", &["node1"])),
        ("outside", NONE, Refusal),
        ("outside", FAR_LOCAL, from_node),
    ];
    try_rows(world, &mut rows, &[ClusterIp], &routed);
    let inside = [
        ("a", NEAR, Answer("b", &["a"])),
        ("a", FAR, Answer("c", &["a"])),
        ("a", HOST, Answer("node1", &["a"])),
        ("a", OWN, Answer("a", &["node1", "a"])),
        ("a", NONE, Refusal),
        ("a", NEAR_LOCAL, Answer("b", &["a"])),
        ("a", FAR_LOCAL, Answer("c", &["a"])),
        ("node1", NEAR, Answer("b", &["node1"])),
        ("node1", FAR, from_node),
        ("node1", HOST, Answer("node1", &["node1"])),
        ("node1", NONE, Refusal),
        ("node1", NEAR_LOCAL, Answer("b", &["node1"])),
        ("node1", FAR_LOCAL, from_node),
    ];
    try_rows(world, &mut rows, &[NodePort(1), Balancer, External], &inside);
    try_rows(world, &mut rows, &[Loopback], &inside[7..]);
    let other_node = [
        ("node2", NEAR, Answer("b", &["node2"])),
        ("node2", FAR, from_node),
        ("node2", HOST, Answer("node1", &["node2"])),
        ("node2", NONE, Refusal),
        ("node2", FAR_LOCAL, Silence),
    ];
    try_rows(world, &mut rows, &[NodePort(1)], &other_node);
    let shown: &[&str] = if masqueraded { &["node2"] } else { &["d"] };
    let other_pod = [
        ("d", NEAR, Answer("b", shown)),
        ("d", FAR, from_node),
        ("d", HOST, Answer("node1", shown)),
        ("d", NONE, Refusal),
        ("d", FAR_LOCAL, if masqueraded { Silence } else { from_node }),
    ];
    try_rows(world, &mut rows, &[NodePort(1)], &other_pod);
    rows.finish()
}

fn arguments(mode: &str) -> Vec<String> {
    let fixed = ["--socket-lb", mode, "--cluster-cidr"].map(str::to_owned);
    fixed.into_iter().chain([cidr::cluster()]).collect()
}

fn start(builder: Builder, mode: &str) -> Result<World> {
    let arguments = arguments(mode);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut world = World::start(builder, &[&arguments[..], &SMALL_MAPS].concat())?;
    publish(&mut world)?;
    Ok(world)
}

#[test]
fn packets_of_point_to_point_pods() -> Result<()> {
    check(&start(pods(Cni::PointToPoint), "off")?, false)
}

#[test]
fn packets_of_bridged_pods() -> Result<()> {
    check(&start(pods(Cni::Bridge), "off")?, false)
}

#[test]
fn connects_are_translated() -> Result<()> {
    check(&start(pods(Cni::PointToPoint), "tcp")?, false)
}

#[test]
fn it_works_beside_what_other_software_sets_up() -> Result<()> {
    for cni in Cni::ALL {
        for rp_filter in [0, 1, 2] {
            let builder =
                pods(cni).rp_filter(rp_filter).masquerade().drop_invalid().forward_policy();
            let world = start(builder, "off")?;
            check(&world, true).with_context(|| format!("{cni:?}, rp_filter {rp_filter}"))?;
        }
    }
    Ok(())
}
