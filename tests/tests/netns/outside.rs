//! Real sockets through node ports, load balancer addresses and external IPs: who answers,
//! which client it sees, and which clients are rejected.

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::agent;
use lb_tests::harness::netns::actors::host::{Host, Serve};
use lb_tests::harness::netns::topology::cluster::{Builder, Cluster};
use lb_tests::harness::netns::topology::cni::Cni;
use lb_tests::harness::netns::topology::plan::{Family, balancer_ip, cidr};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::frontends::{Frontend, Got, SILENT, ask, kinds, try_cases};
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario, TARGET, expect};
use lb_tests::harness::wait::eventually;

/// The Services of the tests by number: what their addresses and node ports end with.
const NEAR: u8 = 1;
const FAR: u8 = 2;
const HOST: u8 = 3;
const OWN: u8 = 4;
const NONE: u8 = 5;
const NEAR_LOCAL: u8 = 6;
const FAR_LOCAL: u8 = 7;
const CLIENT: u8 = 8;
const NODE: u8 = 9;

fn pods(cni: Cni) -> Builder {
    Cluster::builder().cni(cni).pod(1, "a").pod(1, "b").pod(2, "c").pod(2, "d")
}

/// Publishes the Services of the tests: near and far are served from node 1 and node 2.
fn publish(scenario: &mut Scenario) -> Result<()> {
    scenario.serve(&["a", "b", "c"])?;
    scenario.serve_node(1)?;
    let host = scenario.node_endpoints(1);
    let (near, far) = (scenario.endpoints(&["b"]), scenario.endpoints(&["c"]));
    scenario.publish(&scenario.exposed("near", NEAR), &near)?;
    scenario.publish(&scenario.exposed("far", FAR), &far)?;
    scenario.publish(&scenario.exposed("host", HOST), &host)?;
    scenario.publish(&scenario.exposed("own", OWN), &scenario.endpoints(&["a"]))?;
    scenario.publish(&scenario.exposed("none", NONE), &[])?;
    scenario.publish(&scenario.exposed("near-local", NEAR_LOCAL).external_local(), &near)?;
    scenario.publish(&scenario.exposed("far-local", FAR_LOCAL).external_local(), &far)?;
    scenario.cluster.fabric().route_external_to(1)?;
    scenario.cluster.fabric().route_services_to(1)
}

/// Rows 3.4 to 3.11 of docs/contract.md without 3.7, and those of its table 4 for clients
/// outside. `masqueraded`: pods reach the addresses of other nodes with the address of their own,
/// as they do with an overlay.
fn check(scenario: &Scenario, masqueraded: bool) -> Result<()> {
    let masqueraded = masqueraded || !scenario.cluster.cni().is_routed();
    use Frontend::{Balancer, ClusterIp, External, Loopback, NodePort};
    use Got::{Answer, Refusal, Silence};
    let mut expectations = Expectations::default();
    let from_node = Answer("c", &["node1"]);
    let outside = [
        ("outside", NEAR, Answer("b", &["outside"])),
        ("outside", FAR, from_node),
        ("outside", HOST, Answer("node1", &["outside"])),
        ("outside", NONE, Refusal),
        ("outside", NEAR_LOCAL, Answer("b", &["outside"])),
        ("outside", FAR_LOCAL, Silence),
    ];
    try_cases(scenario, &mut expectations, &[NodePort(1), Balancer, External], &outside);
    let routed = [
        ("outside", NEAR, Answer("b", &["outside"])),
        ("outside", FAR, from_node),
        ("outside", HOST, Answer("node1", &["outside"])),
        ("outside", NONE, Refusal),
        ("outside", FAR_LOCAL, from_node),
    ];
    try_cases(scenario, &mut expectations, &[ClusterIp], &routed);
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
    try_cases(scenario, &mut expectations, &[NodePort(1), Balancer, External], &inside);
    try_cases(scenario, &mut expectations, &[Loopback], &inside[7..]);
    let other_node = [
        ("node2", NEAR, Answer("b", &["node2"])),
        ("node2", FAR, from_node),
        ("node2", HOST, Answer("node1", &["node2"])),
        ("node2", NONE, Refusal),
        ("node2", FAR_LOCAL, Silence),
    ];
    try_cases(scenario, &mut expectations, &[NodePort(1)], &other_node);
    let shown: &[&str] = if masqueraded { &["node2"] } else { &["d"] };
    let other_pod = [
        ("d", NEAR, Answer("b", shown)),
        ("d", FAR, from_node),
        ("d", HOST, Answer("node1", shown)),
        ("d", NONE, Refusal),
        ("d", FAR_LOCAL, Silence),
    ];
    try_cases(scenario, &mut expectations, &[NodePort(1)], &other_pod);
    // Addresses that every node serves: these clients never reach node 1.
    let at_home = [
        ("d", NEAR, Answer("b", &["d"])),
        ("d", FAR_LOCAL, Answer("c", &["d"])),
        ("d", NONE, Refusal),
        ("node2", HOST, Answer("node1", &["node2"])),
        ("node2", NEAR_LOCAL, Answer("b", &["node2"])),
        ("node2", FAR_LOCAL, Answer("c", &["node2"])),
        ("node2", NONE, Refusal),
    ];
    try_cases(scenario, &mut expectations, &[Balancer, External], &at_home);
    expectations.finish()
}

fn arguments(mode: &str) -> Vec<String> {
    let fixed = ["--socket-lb", mode, "--cluster-cidr"].map(str::to_owned);
    fixed.into_iter().chain([cidr::cluster()]).collect()
}

fn start(builder: Builder, mode: &str) -> Result<Scenario> {
    start_with(builder, mode, &[])
}

fn start_with(builder: Builder, mode: &str, more: &[&str]) -> Result<Scenario> {
    let arguments = arguments(mode);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut scenario = Scenario::start(builder, &[&arguments[..], more, &SMALL_MAPS].concat())?;
    publish(&mut scenario)?;
    Ok(scenario)
}

#[test]
fn point_to_point_pods_serve_clients_outside() -> Result<()> {
    check(&start(pods(Cni::PointToPoint), "off")?, false)
}

/// How often XDP of a node's device ended with this reason.
fn taken_by_xdp(scenario: &Scenario, node: u8, reason: &str) -> Result<u64> {
    let counters = agent::get(&scenario.cluster.node(node), "counters")?;
    let rows = counters.as_array().context("no list of counters")?;
    let row = rows.iter().find(|row| row["hook"] == "xdp_device" && row["reason"] == reason);
    Ok(row.and_then(|row| row["count"].as_u64()).unwrap_or(0))
}

/// Every row with XDP before tc, in both modes that a device can have.
fn check_xdp(xdp: &str) -> Result<()> {
    for cni in Cni::ALL {
        let builder = pods(cni).no_tx_checksum_offload();
        let scenario = start_with(builder, "off", &["--xdp", xdp])?;
        check(&scenario, false).with_context(|| format!("{cni:?}"))?;
        // Replies behind a VXLAN come in encapsulated, and the driver of its device has no XDP.
        let sees_replies = cni != Cni::Vxlan || xdp == "generic";
        for reason in ["request", "reply"].into_iter().take(1 + usize::from(sees_replies)) {
            let count = taken_by_xdp(&scenario, 1, reason)?;
            ensure!(count > 0, "{cni:?}: XDP took no {reason}");
        }
    }
    Ok(())
}

#[test]
fn xdp_in_the_driver_serves_clients_outside() -> Result<()> {
    check_xdp("native")
}

#[test]
fn xdp_in_the_stack_serves_clients_outside() -> Result<()> {
    check_xdp("generic")
}

#[test]
fn bridged_pods_serve_clients_outside() -> Result<()> {
    check(&start(pods(Cni::Bridge), "off")?, false)
}

#[test]
fn pods_behind_an_overlay_or_a_second_network_serve_clients_outside() -> Result<()> {
    for mode in ["off", "node"] {
        for rp_filter in [1, 2] {
            for cni in [Cni::Vxlan, Cni::TwoNetworks] {
                let builder = pods(cni).rp_filter(rp_filter);
                check(&start(builder, mode)?, false).with_context(|| {
                    format!("{cni:?}, --socket-lb {mode}, rp_filter {rp_filter}")
                })?;
            }
        }
    }
    Ok(())
}

/// A node whose pods are on a bridge redirects them: their neighbour is nearer to them than
/// the node: what it says of the backend must not be taken for the node port's address.
#[test]
fn redirects_of_a_node_lead_no_pod_astray() -> Result<()> {
    let scenario = start(pods(Cni::Bridge), "off")?;
    let mut expectations = Expectations::default();
    // A pod believes that only of a neighbour whom it knows.
    let (a, b) = (scenario.cluster.pod("a"), scenario.cluster.pod("b"));
    a.udp(b.at(Family::V4, TARGET))?;
    for _ in 0..5 {
        for (number, server) in [(NEAR, "b"), (FAR, "c")] {
            let table = [("a", number, Got::Answer(server, &["a"]))];
            try_cases(
                &scenario,
                &mut expectations,
                &[Frontend::NodePort(1), Frontend::Balancer],
                &table,
            );
        }
    }
    expectations.finish()
}

#[test]
fn connects_are_translated() -> Result<()> {
    check(&start(pods(Cni::PointToPoint), "tcp")?, false)
}

#[test]
fn clsact_filters_do_the_same_as_tcx_programs() -> Result<()> {
    let more = ["--tc-attach", "clsact"];
    check(&start_with(pods(Cni::PointToPoint), "off", &more)?, false)
}

/// Without `--cluster-cidr` a pod of another node is a client as any other.
#[test]
fn pods_of_other_nodes_are_outside_unless_they_are_known() -> Result<()> {
    let mut scenario = Scenario::start(pods(Cni::PointToPoint), &SMALL_MAPS)?;
    publish(&mut scenario)?;
    let mut expectations = Expectations::default();
    let table = [
        ("d", NEAR, Got::Answer("b", &["d"])),
        ("d", FAR, Got::Answer("c", &["node1"])),
        ("d", FAR_LOCAL, Got::Silence),
    ];
    try_cases(&scenario, &mut expectations, &[Frontend::NodePort(1)], &table);
    expectations.finish()
}

/// The address of a load balancer that a node holds itself, and a program there at a port of
/// it that no Service has.
#[test]
fn other_ports_of_an_address_are_left_alone() -> Result<()> {
    const OTHER: u16 = 81;
    let mut scenario = start(pods(Cni::PointToPoint), "off")?;
    let node1 = scenario.cluster.node(1);
    for own in [NEAR, FAR, HOST].map(balancer_ip) {
        for address in [format!("{}/32", own.v4), format!("{}/128", own.v6)] {
            node1.netns().ip(&format!("address add {address} dev lo"))?;
        }
    }
    let own = balancer_ip(FAR);
    scenario.serve_node_these(1, &Serve::on(OTHER))?;
    let mut expectations = Expectations::default();
    let (outside, a) = (scenario.cluster.outside(), scenario.cluster.pod("a"));
    let clients: [(&Host, &str); 3] = [(outside, "outside"), (&a, "a"), (&node1, "node1")];
    for (transport, family) in kinds() {
        // The kernel takes the address itself as the source of the node's own packets to it.
        for (number, server) in [(NEAR, "b"), (HOST, "node1")] {
            let to = Frontend::Balancer.at(&scenario, number, family);
            let source = [node1.ip(family), balancer_ip(number).get(family)];
            let outcome = node1
                .ask(Probe::new(transport, to))
                .and_then(|answer| expect("the node", &answer, to, &[server], &source).map(drop));
            expectations.check("the node at its own address", outcome);
        }
        let [served, other] = [PORT, OTHER].map(|port| (own.get(family), port).into());
        for (client, name) in clients {
            let elsewhere: &[&str] = if name == "outside" { &["node1"] } else { &[name] };
            let probe = Probe::new(transport, served);
            expectations
                .check("a Service", ask(&scenario, client, probe, Got::Answer("c", elsewhere)));
            if name != "node1" {
                let probe = Probe::new(transport, other);
                expectations.check(
                    "the node",
                    ask(&scenario, client, probe, Got::Answer("node1", &[name])),
                );
            }
        }
    }
    expectations.finish()
}

/// `refused`: the error for a process of a node that is not in the ranges.
fn check_ranges(mode: &str, refused: &str) -> Result<()> {
    use Frontend::{Balancer, External, NodePort};
    use Got::{Answer, Error, Silence};
    let scenario = start(pods(Cni::PointToPoint), mode)?;
    let cluster = &scenario.cluster;
    let [outside4, outside6] = Family::ALL.map(|family| cluster.outside().ip(family));
    let [node4, node6] = Family::ALL.map(|family| cluster.node(1).ip(family));
    let far = scenario.endpoints(&["c"]);
    let client = scenario.exposed("client", CLIENT).source_range(format!(" {outside4}/32 "));
    scenario.publish(&client.source_range(format!("{outside6}/128")), &far)?;
    let node = scenario.exposed("node", NODE).source_range(format!("{node4}/32"));
    scenario.publish(&node.source_range(format!("{node6}/128")), &far)?;
    let mut expectations = Expectations::default();
    let table = [
        ("outside", CLIENT, Answer("c", &["node1"])),
        ("outside", NODE, Silence),
        ("a", CLIENT, Silence),
        ("a", NODE, Silence),
        ("node1", NODE, Answer("c", &["node1"])),
        ("d", NODE, Silence),
    ];
    try_cases(&scenario, &mut expectations, &[Balancer], &table);
    let open = [
        ("outside", NODE, Answer("c", &["node1"])),
        ("a", CLIENT, Answer("c", &["a"])),
        ("node1", CLIENT, Answer("c", &["node1"])),
    ];
    try_cases(&scenario, &mut expectations, &[NodePort(1), External], &open);
    for (transport, family) in kinds() {
        // A datagram that the node's own hook drops is known to its sender.
        let error = Error(if transport == Transport::Tcp { refused } else { "ENOBUFS" });
        let probe = Probe::new(transport, Balancer.at(&scenario, CLIENT, family)).timeout(SILENT);
        expectations.check("a stranger", ask(&scenario, &scenario.cluster.node(1), probe, error));
    }
    expectations.finish()?;
    // Ranges of one family say nothing about the other.
    let client = scenario.exposed("client", CLIENT).source_range(format!("{outside4}/32"));
    scenario.publish(&client, &far)?;
    let a = scenario.cluster.pod("a");
    let ask_at = |family, got| {
        eventually(|| {
            let probe = Probe::tcp(Balancer.at(&scenario, CLIENT, family)).timeout(SILENT);
            ask(&scenario, &a, probe, got)
        })
    };
    ask_at(Family::V6, Answer("c", &["a"]))?;
    ask_at(Family::V4, Silence)
}

#[test]
fn clients_outside_the_source_ranges_are_dropped() -> Result<()> {
    check_ranges("off", "timeout").context("packets")?;
    check_ranges("tcp", "EPERM").context("connects")
}

#[test]
fn services_work_beside_what_other_software_sets_up() -> Result<()> {
    for cni in Cni::ALL {
        for rp_filter in [0, 1, 2] {
            let builder =
                pods(cni).rp_filter(rp_filter).masquerade().drop_invalid().forward_policy();
            let scenario = start(builder, "off")?;
            check(&scenario, true).with_context(|| format!("{cni:?}, rp_filter {rp_filter}"))?;
        }
    }
    Ok(())
}
