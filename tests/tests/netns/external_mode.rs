//! How clients outside reach a backend on another node: as the flag says, or as the Service
//! says for itself; and how `get` shows it.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::agent;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, balancer_ip, cidr, node_port};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::manifests::Service;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario, expect};
use serde_json::{Value, json};

const NUMBER: u8 = 1;

/// Publishes the Service with this annotation.
fn annotate(scenario: &Scenario, service: &Service, mode: Option<&str>) -> Result<()> {
    let mut object = service.object();
    if let Some(mode) = mode {
        object["metadata"]["annotations"] = json!({ "lb-agent/external-mode": mode });
    }
    scenario.manifests.write(&service.file(), &format!("{object:#}"))
}

fn rows_of(table: &Value) -> impl Iterator<Item = &Value> {
    table.as_array().into_iter().flatten()
}

/// Waits until every agent has this mode for the Service.
fn wait_mode(scenario: &Scenario, mode: &str) -> Result<()> {
    let is_of = |row: &Value| row["name"].as_str().is_some_and(|name| name.contains("/far:"));
    let has_mode = |services: &Value| {
        let mut rows = rows_of(services).filter(|row| is_of(row)).peekable();
        rows.peek().is_some() && rows.all(|row| row["external_mode"] == mode)
    };
    scenario.wait(|agent| Ok(has_mode(&agent.get("services")?))).with_context(|| mode.to_owned())
}

/// The flows that node 1 tunnels, by the address of the client.
fn tunnelled(scenario: &Scenario, client: SocketAddr) -> Result<Vec<Value>> {
    let flows = agent::get(&scenario.cluster.node(1), "flows")?;
    let is_meant = |row: &&Value| row["action"] == "tunnel" && row["source"] == client.to_string();
    Ok(rows_of(&flows).filter(is_meant).cloned().collect())
}

/// Asks node 1 from outside: the backend sees the client or node 1, and `get` shows why.
fn check(
    scenario: &Scenario,
    expectations: &mut Expectations,
    is_encapsulated: bool,
) -> Result<()> {
    let (node1, node2) = (scenario.cluster.node(1), scenario.cluster.node(2));
    let outside = scenario.cluster.outside();
    for family in Family::ALL {
        let seen = if is_encapsulated { outside.ip(family) } else { node1.ip(family) };
        let balancer = SocketAddr::new(balancer_ip(NUMBER).get(family), PORT);
        for to in [(node1.ip(family), node_port(NUMBER)).into(), balancer] {
            for transport in [Transport::Tcp, Transport::Udp] {
                let what = format!("{to} {transport:?}, tunnelled: {is_encapsulated}");
                let answer = outside.ask(Probe::new(transport, to))?;
                expectations.check(&what, expect(&what, &answer, to, &["c"], &[seen]).map(drop));
                let Some(reached) = answer.reached().filter(|_| is_encapsulated) else { continue };
                // The socket of UDP is bound to no address.
                let client = SocketAddr::new(outside.ip(family), reached.source.port());
                let flows = tunnelled(scenario, client)?;
                let is_so = |flow: &Value| {
                    flow["via"] == node2.ip(family).to_string()
                        && flow["destination"] == to.to_string()
                        && flow["new_destination"] == flow["destination"]
                };
                expectations.is_true(
                    format!("{what}: {flows:?}"),
                    matches!(&flows[..], [flow] if is_so(flow)),
                );
            }
        }
        let backends = agent::get(&node1, "backends")?;
        let mut of_family = rows_of(&backends).filter(|row| {
            let address = row["address"].as_str().and_then(|text| text.parse().ok());
            address.is_some_and(|at: SocketAddr| Family::of(at.ip()) == family)
        });
        let node = if is_encapsulated { json!(node2.ip(family)) } else { Value::Null };
        expectations.is_true(format!("{backends}"), of_family.all(|row| row["node"] == node));
    }
    Ok(())
}

fn check_all(flag: &str, expected: &[(Option<&str>, &str)]) -> Result<()> {
    let builder = Cluster::builder().any_source().pod(1, "a").pod(2, "c");
    let pods = cidr::cluster();
    let arguments = ["--external-mode", flag, "--cluster-cidr", &pods];
    let mut scenario = Scenario::start(builder, &[&arguments[..], &SMALL_MAPS].concat())?;
    scenario.serve(&["c"])?;
    scenario.cluster.fabric().route_external_to(1)?;
    let service = scenario.exposed("far", NUMBER);
    scenario.publish(&service, &scenario.endpoints(&["c"]))?;
    let mut expectations = Expectations::default();
    for (annotation, mode) in expected {
        annotate(&scenario, &service, *annotation)?;
        wait_mode(&scenario, mode)?;
        check(&scenario, &mut expectations, *mode == "dsr")?;
    }
    expectations.finish()?;
    let told =
        "metadata.annotations[lb-agent/external-mode]: \\\"tunnel\\\" is neither snat nor dsr";
    scenario.agent(1)?.wait_log(&[told])
}

#[test]
fn packets_are_encapsulated_unless_the_service_says_otherwise() -> Result<()> {
    check_all("dsr", &[(None, "dsr"), (Some("snat"), "snat"), (Some("tunnel"), "dsr")])
}

#[test]
fn packets_are_not_encapsulated_unless_the_service_says_so() -> Result<()> {
    check_all("snat", &[(None, "snat"), (Some("dsr"), "dsr"), (Some("tunnel"), "snat")])
}
