//! L3 devices, whose packets have no Ethernet header: a VPN by which clients come in, and a VPN
//! between the nodes. A pair of tun devices stands for WireGuard, tailscale and ipip.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::topology::cluster::{Builder, Cluster};
use lb_tests::harness::netns::topology::namespace::Netns;
use lb_tests::harness::netns::topology::plan::{
    Addresses, Family, balancer_ip, cidr, cluster_ip, external_ip, node_port,
};
use lb_tests::harness::netns::traffic::raw::{self, Outcome};
use lb_tests::harness::netns::traffic::tun::Tunnel;
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::frontends::kinds;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario, expect};
use lb_tests::harness::wait::{PATIENCE, eventually};

/// The Services by number: served on node 1, on node 2, by a process of node 1, by nobody.
const NEAR: u8 = 1;
const FAR: u8 = 2;
const HOST: u8 = 3;
const NONE: u8 = 4;
/// The device, in both namespaces.
const DEVICE: &str = "wg0";

/// The address of one end of the tunnel.
fn end(number: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(172, 30, 0, number),
        v6: Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, number.into()),
    }
}

fn hold(netns: &Netns, number: u8) -> Result<()> {
    let Addresses { v4, v6 } = end(number);
    netns.ip_lines(&[
        format!("addr add {v4}/24 dev {DEVICE}"),
        format!("addr add {v6}/64 dev {DEVICE} nodad"),
    ])
}

/// A route to an address by the device.
fn route(to: IpAddr) -> String {
    format!("route replace {to} dev {DEVICE}")
}

fn pods() -> Builder {
    Cluster::builder().pod(1, "a").pod(1, "b").pod(2, "c")
}

fn publish(scenario: &mut Scenario) -> Result<()> {
    scenario.serve(&["a", "b", "c"])?;
    scenario.serve_node(1)?;
    let host = scenario.node_endpoints(1);
    scenario.publish(&scenario.exposed("near", NEAR), &scenario.endpoints(&["b"]))?;
    scenario.publish(&scenario.exposed("far", FAR), &scenario.endpoints(&["c"]))?;
    scenario.publish(&scenario.exposed("host", HOST), &host)?;
    scenario.publish(&scenario.exposed("none", NONE), &[])
}

/// The frontends of a Service that are reached by node 1.
fn frontends(scenario: &Scenario, number: u8, family: Family) -> [SocketAddr; 4] {
    let node = scenario.cluster.node(1).ip(family);
    [
        (node, node_port(number)).into(),
        (balancer_ip(number).get(family), PORT).into(),
        (external_ip(number).get(family), PORT).into(),
        (cluster_ip(number).get(family), PORT).into(),
    ]
}

/// Waits until the device has its programs.
fn has_programs(scenario: &mut Scenario, node: u8) -> Result<()> {
    scenario.agent(node)?.wait_log(&["packets are handled by tc", DEVICE])
}

/// A client that comes in by the tunnel reaches everything that one at the uplink does.
#[test]
fn clients_that_come_by_a_vpn_are_served() -> Result<()> {
    let mut scenario =
        Scenario::start(pods(), &[&["--socket-lb", "off"], &SMALL_MAPS[..]].concat())?;
    publish(&mut scenario)?;
    let (node, outside) = (scenario.cluster.node(1), scenario.cluster.outside());
    let _tunnel = Tunnel::between([node.netns(), outside.netns()], DEVICE)?;
    hold(node.netns(), 1)?;
    hold(outside.netns(), 2)?;
    let numbers = [NEAR, FAR, HOST, NONE];
    for (family, number) in Family::ALL.into_iter().flat_map(|f| numbers.map(|n| (f, n))) {
        let to = frontends(&scenario, number, family).map(|at| route(at.ip()));
        outside.netns().ip_lines(&to)?;
    }
    has_programs(&mut scenario, 1)?;
    let (node, outside) = (scenario.cluster.node(1), scenario.cluster.outside());
    let mut expectations = Expectations::default();
    for (transport, family) in kinds() {
        let client = [end(2).get(family)];
        let here = [node.ip(family)];
        for (number, server, seen) in
            [(NEAR, "b", &client), (FAR, "c", &here), (HOST, "node1", &client)]
        {
            for to in frontends(&scenario, number, family) {
                // More than one segment, and an answer of as many.
                let probe = Probe::new(transport, to).payload("by the tunnel".repeat(90));
                let outcome = outside.ask(probe).and_then(|answer| {
                    expect(&format!("{transport:?}"), &answer, to, &[server], seen).map(drop)
                });
                expectations.check(format!("{transport:?} {to}"), outcome);
            }
        }
        for to in frontends(&scenario, NONE, family) {
            let answer = outside.ask(Probe::new(transport, to).connected())?;
            let refused = answer.error() == Some("ECONNREFUSED");
            expectations.is_true(format!("{transport:?} {to}: {answer:?}"), refused);
        }
    }
    for family in Family::ALL {
        let answered = raw::ping(outside, cluster_ip(NEAR).get(family), PATIENCE)?;
        expectations.is_true(format!("ping: {answered:?}"), answered == Outcome::Answered);
    }
    expectations.finish()
}

/// Node ports are served at a node's address in the VPN, and pods of the other node are reached by
/// it, from the address that the node has there.
#[test]
fn nodes_that_only_a_vpn_connects_are_served() -> Result<()> {
    let mut scenario =
        Scenario::start(pods(), &[&["--socket-lb", "off"], &SMALL_MAPS[..]].concat())?;
    publish(&mut scenario)?;
    let nodes = [scenario.cluster.node(1), scenario.cluster.node(2)];
    let _tunnel = Tunnel::between([nodes[0].netns(), nodes[1].netns()], DEVICE)?;
    for (node, number) in nodes.iter().zip(1u8..) {
        hold(node.netns(), number)?;
        let [v4, v6] = cidr::pods_of_node(3 - number);
        node.netns()
            .ip_lines(&[v4, v6].map(|pods| format!("route replace {pods} dev {DEVICE}")))?;
        scenario.manifests.node(&format!("node{number}"), end(number), None)?;
    }
    for node in [1, 2] {
        has_programs(&mut scenario, node)?;
    }
    for family in Family::ALL {
        // The agent learns the addresses of the Nodes and the sources of the routes.
        let to = (end(1).get(family), node_port(FAR)).into();
        let own = [end(1).get(family)];
        eventually(|| expect("a node port", &nodes[1].tcp(to)?, to, &["c"], &own))?;
    }
    let mut expectations = Expectations::default();
    let a = scenario.cluster.pod("a");
    for (transport, family) in kinds() {
        let vip = |number| SocketAddr::from((cluster_ip(number).get(family), PORT));
        let at_node1 = SocketAddr::from((end(1).get(family), node_port(NEAR)));
        let by_node1 = SocketAddr::from((end(1).get(family), node_port(FAR)));
        let vpn = |number: u8| [end(number).get(family)];
        for (what, client, to, server, seen) in [
            ("pod", &**a, vip(FAR), "c", [a.ip(family)]),
            ("node", &**nodes[0], vip(FAR), "c", vpn(1)),
            ("node 2", &**nodes[1], at_node1, "b", vpn(2)),
            ("node 2, and back to it", &**nodes[1], by_node1, "c", vpn(1)),
        ] {
            let probe = Probe::new(transport, to).payload("by the tunnel".repeat(90));
            let outcome = client
                .ask(probe)
                .and_then(|answer| expect(what, &answer, to, &[server], &seen).map(drop));
            expectations.check(format!("{what} {transport:?} {family:?}"), outcome);
        }
    }
    let foreign = scenario.cluster.fabric().foreign_packets_from(1)?;
    ensure!(foreign == 0, "{foreign} packets left node 1 by its uplink");
    expectations.finish()
}
