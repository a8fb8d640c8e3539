//! Counts that decide what a packet and a change cost, and that are the same on every machine: how
//! many programs a packet runs, and what an agent asks the API server. Time needs a quiet machine;
//! these do not.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::{Result, ensure};
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::actors::agent::{self, Agent, Options};
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::node::Node;
use lb_tests::harness::netns::topology::plan::cluster_ip;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario, TARGET};
use lb_tests::harness::wait::PATIENCE;
use lb_tests::tools::bench::scale;
use lb_tests::tools::bench::scale::api::{Usage, modified};
use lb_tests::tools::bench::scale::maps::Watcher;
use lb_tests::tools::bench::scale::objects::Size;

/// Requests with an answer.
const EXCHANGES: u64 = 500;
/// Packets of others, such as neighbour discovery, that may come in between.
const STRAY: u64 = 50;

/// How often the programs of each hook ended on a node: each packet counts once in each of them.
fn ended(node: &Node) -> Result<BTreeMap<String, u64>> {
    let mut ended = BTreeMap::new();
    for row in agent::get(node, "counters")?.as_array().into_iter().flatten() {
        let hook = row["hook"].as_str().unwrap_or_default().to_owned();
        *ended.entry(hook).or_default() += row["count"].as_u64().unwrap_or_default();
    }
    Ok(ended)
}

/// A datagram of a pod passes the pod's device and the node's: one program on each, both ways and on
/// both nodes. That holds for a Service and for a pod IP.
#[test]
fn a_packet_runs_one_program_on_each_device() -> Result<()> {
    let builder = Cluster::builder().pod(1, "client").pod(2, "server");
    let options = [&["--socket-lb", "off"][..], &SMALL_MAPS].concat();
    let mut scenario = Scenario::start(builder, &options)?;
    scenario.serve(&["server"])?;
    let server = scenario.cluster.pod("server").addresses().v4;
    let target = scenario.service("web", 1);
    scenario.publish(&target, &scenario.endpoints(&["server"]))?;
    let nodes = [1, 2].map(|number| scenario.cluster.node(number));
    for to in [SocketAddr::from((cluster_ip(1).v4, PORT)), SocketAddr::from((server, TARGET))] {
        let probe = Probe::udp(to).connected().timeout(PATIENCE);
        let connection = scenario.cluster.pod("client").open(probe)?;
        let before = [ended(&nodes[0])?, ended(&nodes[1])?];
        for _ in 0..EXCHANGES {
            let answer = connection.exchange("ping", PATIENCE)?;
            ensure!(answer.name() == Some("server"), "{to}: {answer:?}");
        }
        for (node, before) in nodes.iter().zip(before) {
            let after = ended(node)?;
            let runs = |counts: &BTreeMap<String, u64>| counts.values().sum::<u64>();
            let runs = runs(&after) - runs(&before);
            // Into and out of the node, with the request and with the answer.
            let wanted = 4 * EXCHANGES;
            ensure!(
                (wanted..wanted + STRAY).contains(&runs),
                "{to}, {}: {runs} programs ran, not {wanted}: {before:?} {after:?}",
                node.name()
            );
        }
    }
    Ok(())
}

/// What a change of an endpoint costs the API server: the event that it sends to the watch. The
/// agent asks for nothing, and opens no connection.
#[test]
fn a_change_of_an_endpoint_asks_nothing_of_the_api_server() -> Result<()> {
    const CHANGES: u32 = 50;
    let size = Size { services: 100, endpoints: 10 };
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    let (server, kubeconfig) = scale::serve(&cluster, size)?;
    let agent =
        Agent::start(&node, &Options::kubeconfig(kubeconfig.path()).arguments(&SMALL_MAPS))?;
    let mut watcher = Watcher::open(node.bpf_dir(), size.services)?;
    // The first change also ends what the agent has left to do of its start.
    let mut before = None;
    let mut sent = 0;
    for number in 0..=CHANGES {
        let is_ready = !number.is_multiple_of(2);
        let line = modified(&size.slice(7, is_ready));
        server.send("endpointslices", &line)?;
        watcher.wait(7, size.endpoints - u32::from(!is_ready))?;
        if before.is_none() {
            before = Some(server.usage());
        } else {
            // The head and the end of a chunk are as long as the length of its length.
            sent += line.len() as u64 + format!("{:x}", line.len()).len() as u64 + 4;
        }
    }
    let used = server.usage().since(before.unwrap_or_default());
    ensure!(used == Usage { connections: 0, requests: 0, bytes: sent }, "{used:?}, sent {sent}");
    agent.terminate()?;
    agent::cleanup(&node).map(drop)
}
