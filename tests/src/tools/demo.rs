//! What `cargo xtask demo` shows: every kind of access to a Service, on two nodes.
//!
//! A row says what was promised and whether it came true; nothing is shown that was not
//! measured in this run.

mod access;
pub mod keep;
mod outage;
mod outside;
mod refused;
mod report;
pub mod stop;

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::harness::netns::actors::agent::lb_agent;
use crate::harness::netns::topology::cluster::Cluster;
use crate::harness::netns::topology::plan::{Family, balancer_ip, cidr, cluster_ip, node_port};
use crate::harness::netns::words::manifests::{Endpoint, Service};
use crate::harness::netns::words::world::{PORT, TARGET, World};
pub use report::Report;
use report::Table;
use stop::Stop;

/// The pod that asks; it is also its own backend, for the hairpin.
const CLIENT: &str = "client";
/// The backend on the client's node.
const NEAR: &str = "near";
/// The backend on the other node.
const FAR: &str = "far";
/// The port of `web` that speaks HTTP.
const HTTP_PORT: u16 = 8000;

/// The Services of the demo; the number is the end of their addresses and node ports.
#[derive(Clone, Copy, Debug)]
enum Number {
    /// One backend, on the client's node.
    Near = 1,
    /// One backend, on the other node.
    Far = 2,
    /// One backend: the client.
    Own = 3,
    /// A backend on each node.
    Web = 4,
    /// As `web`, with session affinity.
    Sticky = 5,
    /// No endpoint.
    Empty = 6,
    /// One backend, on node1; `externalTrafficPolicy: Local`.
    Local = 7,
    /// One backend; its load balancer's address is for pods only.
    Private = 8,
    /// A backend on each node, at node ports too.
    Public = 9,
    /// One backend, on the other node, which answers clients outside itself.
    Direct = 10,
    /// No Service has these ClusterIPs.
    Nobody = 99,
}

/// How a call reaches its backend.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Path {
    /// connect() and sendmsg() are translated.
    Connect,
    /// Packets are.
    Packet,
}

impl Path {
    const ALL: [Self; 2] = [Self::Connect, Self::Packet];

    fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Packet => "packet",
        }
    }

    /// The agent's arguments under which every call takes this path.
    fn arguments(self) -> [&'static str; 2] {
        match self {
            Self::Connect => ["--socket-lb", "all"],
            Self::Packet => ["--socket-lb", "off"],
        }
    }
}

/// Runs the demo; what it built is still there when it returns.
///
/// # Errors
/// What could not be built or asked, or that the user stopped it. A broken promise is no
/// error but a row of the report.
pub fn run(report: &mut Report, stop: Stop) -> Result<World> {
    report.line(
        "lb: Services balanced by eBPF, on two nodes made of network namespaces, with an\n\
         lb-agent on each. Pod `client` runs on node1, beside backend `near`; backend `far`\n\
         runs on node2; `outside` is no part of the cluster. client_address is the client's\n\
         address as the backend saw it.",
    );
    let builder = Cluster::builder().pod(1, CLIENT).pod(1, NEAR).pod(2, FAR);
    let mut world = World::start(builder, &Path::Connect.arguments())?;
    stop.check()?;
    world.serve(&[CLIENT, NEAR, FAR])?;
    publish(&world, stop)?;

    let mut accesses = Vec::new();
    let mut refusals = Vec::new();
    for path in Path::ALL {
        if path != Path::Connect {
            restart(&mut world, &path.arguments())?;
        }
        let calls = translated_calls(&mut world)?;
        accesses.extend(access::rows(&world, path, stop)?);
        refusals.extend(refused::rows(&world, path, stop)?);
        let has_translated_calls = translated_calls(&mut world)? > calls;
        ensure!(
            has_translated_calls == (path == Path::Connect),
            "calls did not take the path `{}`",
            path.name()
        );
    }
    report.title("Who answers, and which client it sees");
    report.line(
        "path: `connect` = translated when the socket connects or sends (--socket-lb all),\n\
         `packet` = translated packet by packet (--socket-lb off); hairpin: a pod that is its\n\
         own backend, which sees the node when packets are translated",
    );
    report.table(access::table(accesses));

    // What follows is shown as an agent without flags does it.
    restart(&mut world, &[])?;
    report.title("From outside, and from node1 to its own node ports");
    report.line(
        "node: a process of node1. LB: the load balancer's address, routed to node1 as external\n\
         IPs are; Local: externalTrafficPolicy, which is Cluster elsewhere. The backend on the\n\
         other node sees node1, which is where its answers must go through, unless its Service\n\
         says dsr (lb-agent/external-mode): then it sees the client and answers it itself",
    );
    report.table(outside::table(&world, stop)?);
    refusals.extend(refused::outside_rows(&world, stop)?);
    report.title("Nobody to send to");
    report.table(refused::table(refusals));
    stop.check()?;

    report.title("Many connections, one client");
    report.table(affinity(&world)?);
    stop.check()?;

    report.title("lb-agent get services, on node1 (TCP port 80 with IPv4)");
    report.line(&services(&world)?);
    stop.check()?;

    outage::show(&mut world, report, stop)?;
    leaks(&world, report)?;
    Ok(world)
}

/// Replaces both agents; what is in the datapath stays, and the new ones take it over.
fn restart(world: &mut World, arguments: &[&str]) -> Result<()> {
    world.set_arguments(arguments);
    for node in [1, 2] {
        world.take_agent(node)?.terminate()?;
        world.start_agent(node)?;
    }
    Ok(())
}

/// How many calls of sockets node1's hooks have translated: proves which path was taken.
fn translated_calls(world: &mut World) -> Result<u64> {
    let counters = world.agent(1)?.get("counters")?;
    let rows = counters.as_array().map(Vec::as_slice).unwrap_or_default();
    let of_calls = rows.iter().filter(|row| {
        let hook = row["hook"].as_str().unwrap_or_default();
        hook.starts_with("connect") || hook.starts_with("sendmsg")
    });
    Ok(of_calls.filter_map(|row| row["count"].as_u64()).sum())
}

/// Every Service with its endpoints.
fn objects(world: &World) -> Vec<(Service, Vec<Endpoint>)> {
    let service = |name, number: Number| world.service(name, number as u8);
    let at_nodes = |name, number: Number| service(name, number).node_port(node_port(number as u8));
    let exposed = |name, number: Number| world.exposed(name, number as u8);
    let balancer = |number: Number| balancer_ip(number as u8);
    let (near, far) = (world.endpoints(&[NEAR]), world.endpoints(&[FAR]));
    let both = world.endpoints(&[NEAR, FAR]);
    let web = service("web", Number::Web).tcp(HTTP_PORT, TARGET + 1);
    let sticky = Service::new("sticky")
        .cluster_ips(cluster_ip(Number::Sticky as u8))
        .tcp(PORT, TARGET)
        .affinity(Duration::from_secs(10_800));
    let local = at_nodes("local", Number::Local).external_local();
    let private = service("private", Number::Private)
        .balancer(balancer(Number::Private))
        .source_range(cidr::PODS_V4.to_string())
        .source_range(cidr::PODS_V6.to_string());
    vec![
        (exposed("near", Number::Near), near.clone()),
        (exposed("far", Number::Far), far.clone()),
        (exposed("direct", Number::Direct).external_mode("dsr"), far),
        (service("own", Number::Own), world.endpoints(&[CLIENT])),
        (web.balancer(balancer(Number::Web)), both.clone()),
        (sticky, both.clone()),
        (at_nodes("empty", Number::Empty), Vec::new()),
        (local.balancer(balancer(Number::Local)), near.clone()),
        (private, near),
        (at_nodes("public", Number::Public), both),
    ]
}

/// Publishes all Services at once and waits until both agents have programmed them.
fn publish(world: &World, stop: Stop) -> Result<()> {
    let services = objects(world);
    let (mut ports, mut backends) = (0, 0);
    for (service, endpoints) in &services {
        world.manifests.publish(service, endpoints)?;
        let of_service = service.object()["spec"]["ports"].as_array().map_or(0, Vec::len);
        ports += of_service * Family::ALL.len();
        backends += of_service * endpoints.len();
    }
    world.wait(|agent| {
        stop.check()?;
        let shown = agent.get("services")?;
        let rows = shown.as_array().map(Vec::as_slice).unwrap_or_default();
        let found: u64 = rows.iter().filter_map(|row| row["cluster_backends"].as_u64()).sum();
        Ok((rows.len(), found) == (ports, backends as u64))
    })
}

/// The same client again and again: over all backends, and to one under affinity.
fn affinity(world: &World) -> Result<Table> {
    const CONNECTIONS: usize = 40;
    let client = world.cluster.pod(CLIENT);
    let mut table = Table::new(&["Service", "connections", "answered by", "promised"]);
    for (name, number, promised, backends) in [
        ("web", Number::Web, "both backends", 2),
        ("sticky", Number::Sticky, "one backend, by sessionAffinity: ClientIP", 1),
    ] {
        let to = access::address(number, Family::V4);
        let mut answers = std::collections::BTreeMap::<String, usize>::new();
        for _ in 0..CONNECTIONS {
            let answer = client.tcp(to)?;
            let who = answer.name().or(answer.error()).unwrap_or_default().to_owned();
            *answers.entry(who).or_default() += 1;
        }
        let is_as_promised =
            answers.len() == backends && answers.keys().all(|who| [NEAR, FAR].contains(&&**who));
        let answers: Vec<_> = answers.iter().map(|(who, count)| format!("{who} {count}")).collect();
        let cells = [name, &CONNECTIONS.to_string(), &answers.join(", "), promised];
        table.row(&cells, is_as_promised);
    }
    Ok(table)
}

fn services(world: &World) -> Result<String> {
    let node = world.cluster.node(1);
    let mut command = lb_agent()?;
    command.args(["get", "services", "--bpf-dir"]).arg(node.bpf_dir());
    let all = node.output(command, Duration::from_secs(5)).context("cannot show the services")?;
    let shown = all.lines().enumerate().filter(|(index, line)| {
        let mut cells = line.split_whitespace();
        let is_tcp = cells.next().is_some_and(|name| name.ends_with(":tcp-80"));
        *index == 0 || is_tcp && cells.next() == Some("4")
    });
    Ok(shown.map(|(_, line)| line).collect::<Vec<_>>().join("\n"))
}

fn leaks(world: &World, report: &mut Report) -> Result<()> {
    let leaked = world.cluster.fabric().service_packets()?;
    let mut table = Table::new(&["between the nodes", "seen", "promised"]);
    table.row(&["packets to a ClusterIP", &leaked.to_string(), "0"], leaked == 0);
    report.title("The network between the nodes, during all of this");
    report.table(table);
    Ok(())
}
