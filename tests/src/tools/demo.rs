//! What `cargo xtask demo` shows: every kind of access to a Service, on two nodes.
//!
//! A row says what was promised and whether it came true. Every value that is printed was
//! measured in this run.

mod access;
pub mod keep;
mod outage;
mod outside;
mod refused;
mod report;
mod scene;
pub mod stop;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::harness::netns::actors::agent::lb_agent;
use crate::harness::netns::topology::cluster::Cluster;
use crate::harness::netns::topology::plan::Family;
use crate::harness::netns::words::scenario::Scenario;
pub use report::Report;
use report::Table;
use scene::{CLIENT, FAR, NEAR, Number, Path};
use stop::Stop;

/// Runs the demo; the nodes, pods and agents still run when it returns.
///
/// # Errors
/// Something could not be built or called, or the user stopped the demo. A broken promise is
/// a row of the report, not an error.
pub fn run(report: &mut Report, stop: Stop) -> Result<Scenario> {
    report.line(
        "lb: Kubernetes Services by eBPF, on two nodes made of network namespaces, with an\n\
         lb-agent on each. Pods `client` and `near` run on node1, pod `far` on node2; `outside`\n\
         is a client that is not in the cluster. Every row is measured now: who answered, which\n\
         client address the backend saw, what lb promises, and `ok` or `FAILED`.",
    );
    // Direct server return answers from another node with the address that the client called.
    let builder = Cluster::builder().any_source().pod(1, CLIENT).pod(1, NEAR).pod(2, FAR);
    let mut world = Scenario::start(builder, &Path::Connect.arguments())?;
    stop.check()?;
    world.serve(&[CLIENT, NEAR, FAR])?;
    scene::publish(&world, stop)?;

    let mut refusals = cluster_ips(&mut world, report, stop)?;
    // From here on the agents run without flags.
    restart(&mut world, &[])?;
    report.title("NodePorts, load balancer addresses and external IPs");
    report.line(
        "Called from outside the cluster, and by a process of node1 (`node`). LB: the load\n\
         balancer's address, routed to node1, as external IPs are. externalTrafficPolicy is\n\
         Cluster, except where the row says Local. A backend on node2 sees node1's address,\n\
         because its answers must return through node1. With dsr (annotation\n\
         lb-agent/external-mode) it sees the client's address and answers the client directly.",
    );
    report.table(outside::table(&world, stop)?);
    refusals.extend(refused::outside_rows(&world, stop)?);
    report.title("Calls that reach no backend");
    report.line(
        "refused at once: the client gets an error within 200 ms. dropped: it gets no answer. LB\n\
         addresses are now routed to node2, which has no endpoint of the Service with Local.",
    );
    report.table(refused::table(refusals));
    stop.check()?;

    report.title("Balancing and session affinity");
    report.table(affinity(&world)?);
    stop.check()?;

    report.title("lb-agent get services on node1 (only IPv4 and TCP port 80)");
    report.line(&services(&world)?);
    stop.check()?;

    outage::show(&mut world, report, stop)?;
    leaks(&world, report)?;
    Ok(world)
}

/// Calls ClusterIPs on both paths. Calls that reach no backend are returned: they are shown
/// with those of clients outside.
fn cluster_ips(world: &mut Scenario, report: &mut Report, stop: Stop) -> Result<Vec<refused::Row>> {
    let mut accesses = Vec::new();
    let mut refusals = Vec::new();
    for path in Path::ALL {
        if path != Path::Connect {
            restart(world, &path.arguments())?;
        }
        let calls = translated_calls(world)?;
        accesses.extend(access::rows(world, path, stop)?);
        refusals.extend(refused::rows(world, path, stop)?);
        let has_translated_calls = translated_calls(world)? > calls;
        ensure!(
            has_translated_calls == (path == Path::Connect),
            "calls did not take the path `{}`",
            path.name()
        );
    }
    report.title("ClusterIPs, called by pods and by processes of a node");
    report.line(
        "path: `connect` = translated once, when the socket connects or sends (--socket-lb all);\n\
         `packet` = translated packet by packet (--socket-lb off). node: a process of node1.\n\
         hairpin: the pod is its own backend; packet by packet it sees its node's address.",
    );
    report.table(access::table(accesses));
    Ok(refusals)
}

/// Replaces both agents. Maps and programs stay, and the new agents adopt them.
fn restart(world: &mut Scenario, arguments: &[&str]) -> Result<()> {
    world.set_arguments(arguments);
    for node in [1, 2] {
        world.take_agent(node)?.terminate()?;
        world.start_agent(node)?;
    }
    Ok(())
}

/// How many calls of sockets the hooks of node1 have handled: proves which path was taken.
fn translated_calls(world: &mut Scenario) -> Result<u64> {
    let counters = world.agent(1)?.get("counters")?;
    let rows = counters.as_array().map(Vec::as_slice).unwrap_or_default();
    let of_calls = rows.iter().filter(|row| {
        let hook = row["hook"].as_str().unwrap_or_default();
        hook.starts_with("connect") || hook.starts_with("sendmsg")
    });
    Ok(of_calls.filter_map(|row| row["count"].as_u64()).sum())
}

/// Many connections of one client: to all backends, and to a single one with affinity.
fn affinity(world: &Scenario) -> Result<Table> {
    const CONNECTIONS: usize = 40;
    let client = world.cluster.pod(CLIENT);
    let mut table = Table::new(&["Service", "connections", "answered by", "promised"]);
    for (name, number, promised, backends) in [
        ("web", Number::Web, "both backends", 2),
        ("sticky", Number::Sticky, "one backend (sessionAffinity: ClientIP)", 1),
    ] {
        let to = access::address(number, Family::V4);
        let mut answers = BTreeMap::<String, usize>::new();
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

/// Some rows of `lb-agent get services`.
fn services(world: &Scenario) -> Result<String> {
    let node = world.cluster.node(1);
    let mut command = lb_agent()?;
    command.args(["get", "services", "--bpf-dir"]).arg(node.bpf_dir());
    let all =
        node.output(command, Duration::from_secs(5)).context("lb-agent get services failed")?;
    let shown = all.lines().enumerate().filter(|(index, line)| {
        let mut cells = line.split_whitespace();
        let is_tcp = cells.next().is_some_and(|name| name.ends_with(":tcp-80"));
        *index == 0 || is_tcp && cells.next() == Some("4")
    });
    Ok(shown.map(|(_, line)| line).collect::<Vec<_>>().join("\n"))
}

/// Counts the packets to ClusterIPs that left a node.
fn leaks(world: &Scenario, report: &mut Report) -> Result<()> {
    let leaked = world.cluster.fabric().service_packets()?;
    let mut table = Table::new(&["packets", "seen", "promised"]);
    table.row(&["addressed to a ClusterIP", &leaked.to_string(), "0"], leaked == 0);
    report.title("The network between the nodes, during the whole demo");
    report.table(table);
    Ok(())
}
