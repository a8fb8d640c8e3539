//! Real sockets through ClusterIPs: who answers, and which client it sees.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::topology::cluster::{Builder, Cluster};
use lb_tests::harness::netns::topology::cni::Cni;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::words::frontends::kinds;
use lb_tests::harness::netns::words::scenario::{PORT, Scenario, expect};

const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Udp];

fn pods(cni: Cni) -> Builder {
    Cluster::builder().cni(cni).pod(1, "a").pod(1, "b").pod(2, "c")
}

/// Rows 3.1 to 3.3 and 3.11 of docs/contract.md.
fn check_table_3(scenario: &mut Scenario) -> Result<()> {
    check_clients(scenario, false)
}

/// The same; with `masqueraded` pods are to be seen as their node.
fn check_clients(scenario: &mut Scenario, masqueraded: bool) -> Result<()> {
    scenario.serve(&["a", "b", "c"])?;
    scenario.serve_node(1)?;
    let near = scenario.service("near", 1);
    scenario.publish(&near, &scenario.endpoints(&["b"]))?;
    let far = scenario.service("far", 2);
    scenario.publish(&far, &scenario.endpoints(&["c"]))?;
    let own = scenario.service("own", 3);
    scenario.publish(&own, &scenario.endpoints(&["a"]))?;
    let host = scenario.service("host", 4);
    scenario.publish(&host, &scenario.node_endpoints(1))?;
    let a = scenario.cluster.pod("a");
    let [node1, node2] = [1, 2].map(|node| scenario.cluster.node(node));
    let mut failures = Vec::new();
    for kind @ (_, family) in kinds() {
        let node1_ips = node1.source_addresses(family);
        let pod_ip: &[IpAddr] = if masqueraded { &node1_ips } else { &[a.ip(family)] };
        // By connect() the pod sees itself, per packet an address of its node.
        let own_ips = [&node1_ips[..], pod_ip].concat();
        let node2_ips = node2.source_addresses(family);
        let rows: [(&lb_tests::harness::netns::actors::host::Host, u8, &[&str], &[IpAddr]); 9] = [
            (&a, 1, &["b"], pod_ip),
            (&a, 2, &["c"], pod_ip),
            (&a, 3, &["a"], &own_ips),
            (&a, 4, &["node1"], pod_ip),
            (&node1, 1, &["b"], &node1_ips),
            (&node1, 2, &["c"], &node1_ips),
            (&node1, 4, &["node1"], &node1_ips),
            (&node2, 1, &["b"], &node2_ips),
            (&node2, 4, &["node1"], &node2_ips),
        ];
        for (client, number, servers, seen) in rows {
            if let Err(error) = scenario.check(client, kind, number, servers, seen) {
                failures.push(format!("{kind:?} {error:#}"));
            }
        }
    }
    for node in [1, 2] {
        let leaked = scenario.cluster.fabric().service_packets_from(node)?;
        if leaked > 0 {
            failures.push(format!("{leaked} packets to ClusterIPs left node{node}"));
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

#[test]
fn packets_of_point_to_point_pods_are_balanced() -> Result<()> {
    check_table_3(&mut Scenario::start(pods(Cni::PointToPoint), &["--socket-lb", "off"])?)
}

#[test]
fn packets_of_bridged_pods_are_balanced() -> Result<()> {
    check_table_3(&mut Scenario::start(pods(Cni::Bridge), &["--socket-lb", "off"])?)
}

#[test]
fn packets_between_nodes_with_an_overlay_are_balanced() -> Result<()> {
    for mode in ["off", "node", "tcp"] {
        check_table_3(&mut Scenario::start(pods(Cni::Vxlan), &["--socket-lb", mode])?)
            .with_context(|| format!("--socket-lb {mode}"))?;
    }
    Ok(())
}

#[test]
fn connects_are_translated_and_datagrams_balanced() -> Result<()> {
    check_table_3(&mut Scenario::start(pods(Cni::PointToPoint), &["--socket-lb", "tcp"])?)
}

#[test]
fn only_connects_of_the_node_are_translated() -> Result<()> {
    check_table_3(&mut Scenario::start(pods(Cni::PointToPoint), &["--socket-lb", "node"])?)
}

#[test]
fn connects_and_datagrams_are_translated() -> Result<()> {
    check_table_3(&mut Scenario::start(pods(Cni::PointToPoint), &["--socket-lb", "all"])?)
}

#[test]
fn pods_are_seen_as_their_node_where_all_are_masqueraded() -> Result<()> {
    for cni in Cni::ALL {
        let builder = pods(cni).rp_filter(1).masquerade().drop_invalid().forward_policy();
        let mut scenario = Scenario::start(builder, &["--masquerade-all"])?;
        check_clients(&mut scenario, true).with_context(|| format!("{cni:?}"))?;
    }
    Ok(())
}

#[test]
fn services_work_beside_what_other_software_sets_up() -> Result<()> {
    for cni in Cni::ALL {
        for rp_filter in [0, 1, 2] {
            let builder =
                pods(cni).rp_filter(rp_filter).masquerade().drop_invalid().forward_policy();
            let mut scenario = Scenario::start(builder, &["--socket-lb", "off"])?;
            check_table_3(&mut scenario)
                .with_context(|| format!("{cni:?}, rp_filter {rp_filter}"))?;
        }
    }
    Ok(())
}

#[test]
fn v4_mapped_addresses_are_ipv4() -> Result<()> {
    for mode in ["off", "tcp", "all"] {
        let mut scenario = Scenario::start(pods(Cni::PointToPoint), &["--socket-lb", mode])?;
        scenario.serve(&["c"])?;
        scenario.publish(&scenario.service("far", 1), &scenario.endpoints(&["c"]))?;
        let a = scenario.cluster.pod("a");
        let to = (cluster_ip(1).v4, PORT).into();
        for transport in TRANSPORTS {
            let answer = a.ask(Probe::new(transport, to).v4_mapped())?;
            expect(&format!("{mode} {transport:?}"), &answer, to, &["c"], &[a.ip(Family::V4)])?;
            let reached = answer.reached().context("answered")?;
            ensure!(reached.peer.is_ipv6(), "the socket is told a plain IPv4 peer: {reached:?}");
        }
    }
    Ok(())
}
