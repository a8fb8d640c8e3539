//! Direct server return with real sockets: a backend on another node sees its client, whom that
//! node answers itself.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use lb_common::packet::SYN;
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::actors::agent;
use lb_tests::harness::netns::topology::cluster::{Builder, Cluster};
use lb_tests::harness::netns::topology::cni::Cni;
use lb_tests::harness::netns::topology::plan::{Family, cidr};
use lb_tests::harness::netns::traffic::capture::{Capture, Captured};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::frontends::{Frontend, Got, kinds, try_cases};
use lb_tests::harness::netns::words::scenario::{SMALL_MAPS, Scenario};

/// The Services of the tests by number: what their addresses and node ports end with.
const NEAR: u8 = 1;
const FAR: u8 = 2;
const HOST: u8 = 3;
const NONE: u8 = 4;
const FAR_LOCAL: u8 = 5;
/// As [`FAR`], each with an annotation.
const FAR_DSR: u8 = 6;
const FAR_SNAT: u8 = 7;

/// Addresses that a client outside reaches node 1 by.
const FRONTENDS: [Frontend; 3] = [Frontend::NodePort(1), Frontend::Balancer, Frontend::External];

/// Node 1 is asked; `b` serves there, `c` and a process of node 2 on node 2; `a` and `d` ask.
fn pods(cni: Cni) -> Builder {
    Cluster::builder().any_source().cni(cni).pod(1, "a").pod(1, "b").pod(2, "c").pod(2, "d")
}

/// Starts agents with these modes, node by node, and publishes the Services of the tests.
fn start(builder: Builder, modes: [&str; 2], more: &[&str]) -> Result<Scenario> {
    let cluster = cidr::cluster();
    let arguments = |mode| {
        let mine = ["--socket-lb", "off", "--cluster-cidr", &cluster, "--external-mode", mode];
        [&mine[..], more, &SMALL_MAPS].concat()
    };
    let mut scenario = Scenario::start(builder, &arguments(modes[0]))?;
    if modes[1] != modes[0] {
        scenario.set_arguments(&arguments(modes[1]));
        scenario.take_agent(2)?.terminate()?;
        scenario.start_agent(2)?;
    }
    publish(&mut scenario)?;
    Ok(scenario)
}

fn publish(scenario: &mut Scenario) -> Result<()> {
    scenario.serve(&["b", "c"])?;
    scenario.serve_node(2)?;
    let host = scenario.node_endpoints(2);
    let (near, far) = (scenario.endpoints(&["b"]), scenario.endpoints(&["c"]));
    scenario.publish(&scenario.exposed("near", NEAR), &near)?;
    scenario.publish(&scenario.exposed("far", FAR), &far)?;
    scenario.publish(&scenario.exposed("host", HOST), &host)?;
    scenario.publish(&scenario.exposed("none", NONE), &[])?;
    scenario.publish(&scenario.exposed("far-local", FAR_LOCAL).external_local(), &far)?;
    scenario.publish(&scenario.exposed("far-dsr", FAR_DSR).external_mode("dsr"), &far)?;
    scenario.publish(&scenario.exposed("far-snat", FAR_SNAT).external_mode("snat"), &far)?;
    scenario.cluster.fabric().route_external_to(1)?;
    scenario.cluster.fabric().route_services_to(1)
}

/// Row 3.7 of docs/contract.md and its neighbours: every backend sees the address of a client
/// outside. It sees a node's address in place of a pod's or a node's if the packet was routed
/// through another node. `modes`: of the agents, node by node; `masqueraded`: pods reach the
/// addresses of other nodes with the address of their own.
fn check(scenario: &Scenario, modes: [&str; 2], masqueraded: bool) -> Result<()> {
    use Got::{Answer, Refusal, Silence};
    let mut expectations = Expectations::default();
    let (from_client, from_node) = (&["outside"][..], &["node1"][..]);
    let [by_node1, by_node2] = [(modes[0], from_node), (modes[1], &["node2"])]
        .map(|(mode, node)| if mode == "dsr" { from_client } else { node });
    let outside = [
        ("outside", FAR, Answer("c", by_node1)),
        ("outside", FAR_DSR, Answer("c", from_client)),
        ("outside", FAR_SNAT, Answer("c", from_node)),
        ("outside", HOST, Answer("node2", by_node1)),
        ("outside", NEAR, Answer("b", from_client)),
        ("outside", NONE, Refusal),
        ("outside", FAR_LOCAL, Silence),
    ];
    try_cases(scenario, &mut expectations, &FRONTENDS, &outside);
    let routed =
        [("outside", FAR, Answer("c", from_node)), ("outside", HOST, Answer("node2", from_node))];
    try_cases(scenario, &mut expectations, &[Frontend::ClusterIp], &routed);
    let inside = [
        ("a", FAR, Answer("c", &["a"])),
        ("a", HOST, Answer("node2", if masqueraded { from_node } else { &["a"] })),
        ("node1", FAR, Answer("c", from_node)),
        ("node1", HOST, Answer("node2", from_node)),
    ];
    try_cases(scenario, &mut expectations, &FRONTENDS, &inside);
    let at_node1 = [
        ("d", FAR, Answer("c", from_node)),
        ("d", HOST, Answer("node2", from_node)),
        ("node2", FAR, Answer("c", from_node)),
        ("node2", HOST, Answer("node2", from_node)),
    ];
    try_cases(scenario, &mut expectations, &[Frontend::NodePort(1)], &at_node1);
    let at_node2 = [
        ("outside", FAR, Answer("c", from_client)),
        ("outside", FAR_LOCAL, Answer("c", from_client)),
        ("outside", HOST, Answer("node2", from_client)),
        ("outside", NEAR, Answer("b", by_node2)),
    ];
    try_cases(scenario, &mut expectations, &[Frontend::NodePort(2)], &at_node2);
    expectations.finish()
}

/// The frames between a node and the network, as that sees them.
fn wire(scenario: &Scenario, node: u8) -> Result<Capture> {
    Capture::on(scenario.cluster.fabric().netns(), &format!("node{node}"))
}

/// A client outside asks at node 1, to which nothing comes back: its only frames are the
/// client's, as they came and in tunnels to node 2.
fn check_ways(scenario: &Scenario, number: u8) -> Result<()> {
    let mut expectations = Expectations::default();
    let outside = scenario.cluster.outside();
    for (transport, family) in kinds() {
        for front in FRONTENDS {
            let to = front.at(scenario, number, family);
            let wires = [wire(scenario, 1)?, wire(scenario, 2)?];
            let probe = Probe::new(transport, to);
            let answer = outside.ask(probe)?;
            let frames: Result<Vec<_>> = wires.iter().map(Capture::take).collect();
            let outcome = frames.and_then(|frames| {
                ensure!(answer.reached().is_some(), "{answer:?}");
                check_frames(scenario, &frames, to)
            });
            expectations.check(format!("{front:?} {transport:?} {family:?}"), outcome);
        }
    }
    expectations.finish()
}

fn check_frames(scenario: &Scenario, frames: &[Vec<Captured>], to: SocketAddr) -> Result<()> {
    let family = Family::of(to.ip());
    let nodes = [1, 2].map(|node| scenario.cluster.node(node).ip(family));
    // The fabric sends out what a node gets.
    let count = |node: usize, is_from_node: bool, is_it: &dyn Fn(&Captured) -> bool| {
        let of_node = frames[node].iter().filter(|frame| frame.is_outgoing != is_from_node);
        of_node.filter(|frame| is_it(frame)).count()
    };
    let is_tunnel = |frame: &Captured| frame.ends().is_none() && frame.addresses() == Some(nodes);
    let is_at = |frame: &Captured, side: usize, end: (IpAddr, u16)| {
        frame.ends().is_some_and(|(_, ends)| ends[side] == end)
    };
    let front = (to.ip(), to.port());
    let asked = count(0, false, &|frame| is_at(frame, 1, front));
    ensure!(asked > 0, "nothing was asked");
    let tunnelled = count(0, true, &is_tunnel);
    ensure!(tunnelled == asked, "{tunnelled} of {asked} requests were tunnelled");
    let answered = count(1, true, &|frame| is_at(frame, 0, front));
    ensure!(answered > 0, "node 2 answered nothing");
    let client = scenario.cluster.outside().ip(family);
    let back = count(0, true, &|frame| frame.addresses().is_some_and(|ends| ends[1] == client));
    ensure!(back == 0, "{back} packets left node 1 for the client");
    // The last packets of an earlier connection may come late; an answer by way of node 1 would
    // be a datagram or begin with a SYN.
    let is_new = |frame: &Captured| frame.tcp_flags().is_none_or(|flags| flags & SYN != 0);
    let is_other =
        |frame: &Captured| frame.ends().is_some() && is_new(frame) && !is_at(frame, 1, front);
    let others = count(0, false, &is_other);
    ensure!(others == 0, "{others} other packets came to node 1");
    Ok(())
}

/// How often XDP of a node's device ended with this reason.
fn taken_by_xdp(scenario: &Scenario, node: u8, reason: &str) -> Result<u64> {
    let counters = agent::get(&scenario.cluster.node(node), "counters")?;
    let rows = counters.as_array().context("no list of counters")?;
    let row = rows.iter().find(|row| row["hook"] == "xdp_device" && row["reason"] == reason);
    Ok(row.and_then(|row| row["count"].as_u64()).unwrap_or(0))
}

/// Agents of one mode, and no rules of others.
fn check_all(builder: Builder, xdp: &str) -> Result<Scenario> {
    const MODES: [&str; 2] = ["dsr", "dsr"];
    let scenario = start(builder, MODES, &["--xdp", xdp])?;
    check(&scenario, MODES, false)?;
    check_ways(&scenario, FAR)?;
    Ok(scenario)
}

#[test]
fn backends_elsewhere_see_the_client_by_tc() -> Result<()> {
    check_all(pods(Cni::PointToPoint), "off").map(drop)
}

fn check_xdp(cni: Cni, xdp: &str) -> Result<()> {
    let scenario = check_all(pods(cni).no_tx_checksum_offload(), xdp)?;
    for node in [1, 2] {
        let count = taken_by_xdp(&scenario, node, "request")?;
        ensure!(count > 0, "{cni:?}: XDP of node {node} took no request");
    }
    Ok(())
}

#[test]
fn backends_elsewhere_see_the_client_by_xdp_in_the_driver() -> Result<()> {
    check_xdp(Cni::PointToPoint, "native")
}

#[test]
fn backends_elsewhere_see_the_client_by_xdp_in_the_stack() -> Result<()> {
    check_xdp(Cni::Bridge, "generic")
}

/// A Service's annotation has the last word. Nodes whose modes differ need it, because a node accepts
/// encapsulated packets only for a Service that uses direct server return there.
#[test]
fn the_annotation_of_a_service_has_the_last_word_beside_other_software() -> Result<()> {
    for (rp_filter, cni, modes, number) in [
        (0, Cni::PointToPoint, ["dsr", "dsr"], FAR),
        (1, Cni::Bridge, ["dsr", "dsr"], FAR),
        (2, Cni::PointToPoint, ["snat", "snat"], FAR_DSR),
    ] {
        let builder = pods(cni).rp_filter(rp_filter).masquerade().drop_invalid().forward_policy();
        let scenario = start(builder, modes, &[])?;
        check(&scenario, modes, true)
            .and_then(|()| check_ways(&scenario, number))
            .with_context(|| format!("{cni:?}, rp_filter {rp_filter}, {modes:?}"))?;
    }
    Ok(())
}
