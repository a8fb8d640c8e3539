//! Which frontends a node has for clients outside the cluster, as `get` shows them while
//! addresses and Services come and go.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::words::scenario::{SMALL_MAPS, Scenario};
use lb_tests::harness::wait::PATIENCE;
use serde_json::{Value, json};

const NUMBER: u8 = 1;
const NODE_PORT: u16 = 30_080;
/// An address that a device of node 1 gets later.
const ADDED: &str = "172.18.7.7";

fn run(scenario: &Scenario, program: &str, arguments: &str) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments.split(' '));
    scenario.cluster.node(1).output(command, PATIENCE)
}

/// A Service of both families with a node port, the address of a load balancer and an
/// external IP; `more` goes into its specification.
fn publish(scenario: &Scenario, more: Value) -> Result<()> {
    let service = scenario.service("web", NUMBER);
    let mut object = service.object();
    let spec = object["spec"].as_object_mut().context("no specification")?;
    spec.extend(
        json!({
            "type": "LoadBalancer",
            "externalIPs": ["198.51.100.9"],
            "ports": [{ "name": "http", "port": 80, "nodePort": NODE_PORT }],
        })
        .as_object()
        .context("no object")?
        .clone(),
    );
    spec.extend(more.as_object().context("no object")?.clone());
    object["status"] = json!({ "loadBalancer": { "ingress": [{ "ip": "203.0.113.9" }] } });
    scenario.manifests.write(&service.file(), &format!("{object:#}"))
}

/// The frontends that are not ClusterIPs, nor node ports of any node: address, kind, and
/// whether it is restricted.
fn outside(frontends: &Value) -> Vec<(String, String, bool)> {
    let rows = frontends.as_array().into_iter().flatten();
    let rows = rows.map(|row| {
        let text = |field: &str| row[field].as_str().unwrap_or_default().to_owned();
        (text("address"), text("kind"), row["restricted"] == true)
    });
    let others = ["any_node", "external_address"];
    rows.filter(|(_, kind, _)| !kind.starts_with("cluster_ip") && !others.contains(&&**kind))
        .collect()
}

/// Whether the addresses of load balancers and external IPs have an entry each, as a whole.
fn has_whole_addresses(frontends: &Value) -> bool {
    let rows = || frontends.as_array().into_iter().flatten();
    let of_kind = |kind| rows().filter(move |row| row["kind"] == kind);
    let address = |row: &Value| row["address"].as_str().unwrap_or_default().to_owned();
    let whole: BTreeSet<String> = of_kind("external_address").map(address).collect();
    let with_port = of_kind("external").filter_map(|row| address(row).parse().ok());
    whole == with_port.map(|at: SocketAddr| at.ip().to_string()).collect()
}

/// Waits until these are the node ports of any node.
fn wait_any_node(scenario: &Scenario, expected: &[&str]) -> Result<()> {
    scenario.wait_until(|agent| {
        let found = agent.get("frontends")?;
        let rows = found.as_array().into_iter().flatten();
        let rows = rows.filter(|row| row["kind"] == "any_node");
        let rows: Vec<_> = rows.filter_map(|row| row["address"].as_str()).collect();
        ensure!(rows == expected, "{rows:?} instead of {expected:?}");
        Ok(())
    })
}

/// Waits until a column of the Service's row has this value.
fn wait_column(scenario: &Scenario, column: &str, expected: &Value) -> Result<()> {
    scenario.wait_until(|agent| {
        let services = agent.get("services")?;
        ensure!(services[0][column] == *expected, "{services}");
        Ok(())
    })
}

/// Waits until the agent has exactly these, in the order of `get`.
fn wait(scenario: &Scenario, expected: &[(&str, &str, bool)]) -> Result<()> {
    let mut found = Vec::new();
    let is_met = |(found, expected): (&(String, String, bool), &(&str, &str, bool))| {
        (found.0.as_str(), found.1.as_str(), found.2) == *expected
    };
    scenario
        .wait(|agent| {
            let all = agent.get("frontends")?;
            found = outside(&all);
            let is_all = found.len() == expected.len() && found.iter().zip(expected).all(is_met);
            Ok(is_all && has_whole_addresses(&all))
        })
        .with_context(|| format!("{found:?} instead of {expected:?}"))
}

#[test]
fn frontends_follow_addresses_and_services() -> Result<()> {
    let mut scenario = Scenario::start(Cluster::builder().nodes(1), &SMALL_MAPS)?;
    let node = scenario.cluster.node(1).addresses();
    let at = |family| SocketAddr::new(node.get(family), NODE_PORT).to_string();
    let (node4, node6) = (at(Family::V4), at(Family::V6));
    let loopback = ("127.0.0.1:30080", "[::1]:30080");
    let added = format!("{ADDED}:{NODE_PORT}");
    publish(&scenario, json!({}))?;
    let [external, open, restricted] =
        [("198.51.100.9:80", false), ("203.0.113.9:80", false), ("203.0.113.9:80", true)]
            .map(|(address, is_restricted)| (address, "external", is_restricted));
    let node_port = |address| (address, "node_port", false);
    let all = [
        node_port(loopback.0),
        node_port(&node4),
        external,
        open,
        node_port(loopback.1),
        node_port(&node6),
    ];
    wait(&scenario, &all)?;
    wait_any_node(&scenario, &["0.0.0.0:30080", "[::]:30080"])?;

    let ranges = json!({ "loadBalancerSourceRanges": [" 10.0.0.0/8", "2001:db8::/32"] });
    publish(&scenario, ranges)?;
    let mut closed = all;
    closed[3] = restricted;
    wait(&scenario, &closed)?;
    wait_column(&scenario, "source_ranges", &json!(["10.0.0.0/8"]))?;

    scenario.take_agent(1)?.kill9()?;
    let given = ["--nodeport-addresses", "172.18.0.0/16", "--cluster-cidr", "10.244.0.0/16"];
    scenario.set_arguments(&[&given[..], &SMALL_MAPS].concat());
    scenario.start_agent(1)?;
    wait(&scenario, &[node_port(&node4), external, restricted])?;
    run(&scenario, "ip", &format!("address add {ADDED}/32 dev eth0"))?;
    wait(&scenario, &[node_port(&node4), node_port(&added), external, restricted])?;
    run(&scenario, "ip", &format!("address del {ADDED}/32 dev eth0"))?;
    wait(&scenario, &[node_port(&node4), external, restricted])?;
    wait_any_node(&scenario, &["0.0.0.0:30080", "[::]:30080"])?;

    publish(
        &scenario,
        json!({
            "type": "ClusterIP", "externalIPs": [], "ports": [{ "name": "http", "port": 80 }],
        }),
    )?;
    wait(&scenario, &[])?;
    wait_any_node(&scenario, &[])?;
    wait_column(&scenario, "source_ranges", &json!([]))?;
    wait_column(&scenario, "frontends", &json!([format!("{}:80", cluster_ip(NUMBER).v4)]))
}

#[test]
fn a_node_without_source_ports_logs_which_setting_to_change() -> Result<()> {
    let mut scenario = Scenario::start(Cluster::builder().nodes(1), &SMALL_MAPS)?;
    scenario.take_agent(1)?.terminate()?;
    run(&scenario, "sysctl", "-w net.ipv4.ip_local_port_range=1024\t65535")?;
    scenario.start_agent(1)?;
    scenario.agent(1)?.wait_log(&["net.ipv4.ip_local_port_range (now 1024 65535)"])
}
