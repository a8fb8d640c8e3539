//! The health check servers of Services, as curl sees them in place of a load balancer's prober.

use std::fs::{self, Permissions};
use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lb_tests::harness::netns::actors::agent::{Agent, Options, lb_agent};
use lb_tests::harness::netns::actors::host::{Host, Serve};
use lb_tests::harness::netns::topology::cluster::{Builder, Cluster};
use lb_tests::harness::netns::topology::node::Node;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::manifests::{Endpoint, Service};
use lb_tests::harness::netns::words::scenario::{SMALL_MAPS, Scenario};
use lb_tests::harness::wait::{PATIENCE, eventually};
use serde_json::json;

/// Exit code of curl: no listener at the address.
const REFUSED: i32 = 7;

const NUMBER: u8 = 1;
const SECOND: u8 = 2;
/// Health check ports, of the first Service and others.
const PORT: u16 = 32_000;
const TAKEN: u16 = 32_001;
const OTHER: u16 = 32_002;

fn set_up(own: &[&str]) -> Result<Scenario> {
    start(Cluster::builder(), own)
}

fn start(builder: Builder, own: &[&str]) -> Result<Scenario> {
    let builder = builder.pod(1, "b").pod(1, "d").pod(2, "c");
    Scenario::start(builder, &[own, &SMALL_MAPS].concat())
}

/// Writes the Service as a load balancer of local policy with a health check port.
fn publish(
    scenario: &Scenario,
    service: &Service,
    port: u16,
    endpoints: &[Endpoint],
) -> Result<()> {
    scenario.manifests.endpoints(service, endpoints)?;
    let mut object = service.object();
    object["spec"]["type"] = json!("LoadBalancer");
    object["spec"]["externalTrafficPolicy"] = json!("Local");
    object["spec"]["healthCheckNodePort"] = json!(port);
    scenario.manifests.write(&service.file(), &format!("{object:#}"))
}

/// What curl says of a URL: status line, headers and body, or nothing if the connection is refused.
fn curl(from: &Host, to: SocketAddr) -> Result<Option<String>> {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--include", "--max-time", "10"]);
    command.arg(format!("http://{to}/healthz"));
    let mut process = from.spawn("curl", command)?;
    let status = process.wait(PATIENCE)?;
    match status.code() {
        Some(0) => Ok(Some(process.stdout())),
        Some(REFUSED) => Ok(None),
        _ => bail!("curl http://{to} ended with {status}\n{}", process.tail()),
    }
}

/// The whole answer about a Service in the namespace `default`, but for its date.
fn answer(name: &str, endpoints: usize) -> String {
    let status = if endpoints > 0 { "200 OK" } else { "503 Service Unavailable" };
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"{name}\"\n\t}},\n\
         \t\"localEndpoints\": {endpoints},\n\t\"serviceProxyHealthy\": true\n}}"
    );
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\n\
         X-Content-Type-Options: nosniff\r\nX-Load-Balancing-Endpoint-Weight: {endpoints}\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn without_date(answer: &str) -> String {
    let lines = answer.split_inclusive('\n');
    lines.filter(|line| !line.to_lowercase().starts_with("date:")).collect()
}

/// Waits until curl gets this answer; `None` if the connection is to be refused.
fn wait(from: &Host, to: SocketAddr, expected: Option<&str>) -> Result<()> {
    eventually(|| {
        let told = curl(from, to)?.map(|told| without_date(&told));
        ensure!(told.as_deref() == expected, "{to} says {told:#?}, not {expected:#?}");
        Ok(())
    })
}

/// Waits until the prober outside gets this count of endpoints from each node, in both families.
fn check(
    scenario: &Scenario,
    expectations: &mut Expectations,
    when: &str,
    port: u16,
    name: &str,
    expected: [usize; 2],
) {
    for (number, endpoints) in [1, 2].into_iter().zip(expected) {
        let node = scenario.cluster.node(number);
        for family in Family::ALL {
            let expected = answer(name, endpoints);
            let told = wait(scenario.cluster.outside(), node.at(family, port), Some(&expected));
            expectations.check(format!("{when}: node{number} {family:?}"), told);
        }
    }
}

#[test]
fn a_prober_sees_the_ready_endpoints_of_each_node() -> Result<()> {
    let scenario = set_up(&[])?;
    let mut expectations = Expectations::default();
    let service = scenario.service("web", NUMBER);
    let only = |pods: &[&str]| scenario.endpoints(pods);
    let each = |pod: &str, change: fn(Endpoint) -> Endpoint| {
        scenario.endpoints(&[pod]).into_iter().map(change).collect::<Vec<_>>()
    };
    for (when, endpoints, expected) in [
        ("one pod", only(&["b"]), [1, 0]),
        ("scaled to none", Vec::new(), [0, 0]),
        ("and back", only(&["b"]), [1, 0]),
        ("three pods", only(&["b", "c", "d"]), [2, 1]),
        ("the only one is terminating", each("b", Endpoint::terminating), [0, 0]),
        ("not ready", [each("b", Endpoint::not_ready), only(&["c"])].concat(), [0, 1]),
        ("moved", only(&["c"]), [0, 1]),
    ] {
        publish(&scenario, &service, PORT, &endpoints)?;
        check(&scenario, &mut expectations, when, PORT, "web", expected);
    }
    let node2 = scenario.cluster.node(2);
    for family in Family::ALL {
        let from_node = wait(&node2, node2.at(family, PORT), Some(&answer("web", 1)));
        expectations.check(format!("from the node itself, {family:?}"), from_node);
    }
    publish(&scenario, &service, OTHER, &only(&["b"]))?;
    check(&scenario, &mut expectations, "another port", OTHER, "web", [1, 0]);
    let outside = scenario.cluster.outside();
    let node1 = scenario.cluster.node(1);
    let old = wait(outside, node1.at(Family::V4, PORT), None);
    expectations.check("the port that it had is closed", old);
    scenario.manifests.service(&service)?;
    for family in Family::ALL {
        let closed = wait(outside, node1.at(family, OTHER), None);
        expectations.check(format!("a Service that needs none any more, {family:?}"), closed);
    }
    expectations.finish()
}

#[test]
fn a_port_that_is_taken_costs_no_other_service_anything() -> Result<()> {
    let mut scenario = set_up(&[])?;
    let mut expectations = Expectations::default();
    let node1 = scenario.cluster.node(1);
    let both = scenario.endpoints(&["b", "c"]);
    publish(&scenario, &scenario.service("web", NUMBER), PORT, &both)?;
    check(&scenario, &mut expectations, "alone", PORT, "web", [1, 1]);
    let strange = node1.serve(&Serve::default().http(TAKEN))?;
    let young = scenario.service("young", SECOND);
    publish(&scenario, &young, TAKEN, &both)?;
    let cause = format!(
        "node node1 failed to start healthcheck \\\"default/young\\\" on port {TAKEN}: listen tcp4"
    );
    let reason = "FailedToStartServiceHealthcheck";
    scenario.agent(1)?.wait_log(&[reason, &cause, "address already in use"])?;
    check(&scenario, &mut expectations, "beside one that failed", PORT, "web", [1, 1]);
    drop(strange);
    check(&scenario, &mut expectations, "the port is free again", TAKEN, "young", [1, 1]);

    publish(&scenario, &young, PORT, &both)?;
    let cause = "the port belongs to the Service default/web";
    scenario.agent(1)?.wait_log(&[reason, "healthcheck \\\"default/young\\\"", cause])?;
    check(&scenario, &mut expectations, "asked for by two", PORT, "web", [1, 1]);
    scenario.manifests.delete(&scenario.service("web", NUMBER))?;
    check(&scenario, &mut expectations, "left to the second", PORT, "young", [1, 1]);
    expectations.finish()
}

/// Addresses of health check sockets of a node.
fn listening(node: &Node, port: u16) -> Result<String> {
    let mut command = Command::new("ss");
    command.args(["--no-header", "--listening", "--numeric", "--tcp"]);
    command.args(["sport", "=", &format!(":{port}")]);
    node.output(command, PATIENCE)
}

fn wait_listening(node: &Node, port: u16, address: &str, is_there: bool) -> Result<()> {
    eventually(|| {
        let found = listening(node, port)?;
        let is_met = found.contains(&format!(" {address}:{port} ")) == is_there;
        ensure!(is_met, "{address} should listen: {is_there}\n{found}");
        Ok(())
    })
}

fn ip(node: &Node, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("ip");
    command.args(arguments);
    node.output(command, PATIENCE).map(drop)
}

#[test]
fn servers_follow_the_addresses_of_node_ports() -> Result<()> {
    const ADDED: &str = "172.18.0.111";
    // The network does not know the address that is added.
    let builder = Cluster::builder().any_source();
    let mut scenario = start(builder, &["--nodeport-addresses", "172.18.0.0/16"])?;
    let mut expectations = Expectations::default();
    let node1 = scenario.cluster.node(1);
    let outside_at = |address: &str| -> Result<SocketAddr> {
        Ok(SocketAddr::new(address.parse::<IpAddr>()?, PORT))
    };
    publish(&scenario, &scenario.service("web", NUMBER), PORT, &scenario.endpoints(&["b"]))?;
    let own = node1.at(Family::V4, PORT);
    let expected = answer("web", 1);
    let outside = scenario.cluster.outside();
    wait(outside, own, Some(&expected))?;
    let not_selected = wait(outside, node1.at(Family::V6, PORT), None);
    expectations.check("an address that is not selected", not_selected);
    ip(&node1, &["addr", "add", &format!("{ADDED}/16"), "dev", "eth0"])?;
    wait(outside, outside_at(ADDED)?, Some(&expected))?;
    ip(&node1, &["addr", "del", &format!("{ADDED}/16"), "dev", "eth0"])?;
    expectations.check("an address that went", wait_listening(&node1, PORT, ADDED, false));
    expectations.check("one that stayed", wait(outside, own, Some(&expected)));

    scenario.take_agent(1)?.terminate()?;
    scenario
        .set_arguments(&[&["--nodeport-addresses", "0.0.0.0/0,::/0"], &SMALL_MAPS[..]].concat());
    scenario.start_agent(1)?;
    let outside = scenario.cluster.outside();
    for family in Family::ALL {
        let told = wait(outside, node1.at(family, PORT), Some(&expected));
        expectations.check(format!("all of {family:?}"), told);
    }
    for whole in ["0.0.0.0", "[::]"] {
        expectations.check(whole, wait_listening(&node1, PORT, whole, true));
    }
    expectations.finish()
}

#[test]
fn servers_may_outnumber_the_default_limit_of_open_files() -> Result<()> {
    const SERVICES: u8 = 70;
    const FILES: u16 = 256;
    let mut scenario = set_up(&[])?;
    scenario.take_agent(1)?.terminate()?;
    let endpoints = scenario.endpoints(&["b"]);
    for number in 1..=SERVICES {
        let service = Service::new(&format!("web-{number}")).cluster_ips(cluster_ip(number));
        publish(&scenario, &service.tcp(80, 8080), PORT + u16::from(number), &endpoints)?;
    }
    let script = scenario.manifests.path().join("limited.sh");
    let program = lb_agent()?;
    let program = program.get_program().to_string_lossy();
    fs::write(&script, format!("#!/bin/sh\nulimit -S -n {FILES}\nexec '{program}' \"$@\"\n"))?;
    fs::set_permissions(&script, Permissions::from_mode(0o755))?;
    let options = Options::manifests(scenario.manifests.path()).program(&script);
    let node1 = scenario.cluster.node(1);
    let agent = Agent::start(&node1, &options.arguments(&SMALL_MAPS))?;
    let outside = scenario.cluster.outside();
    for number in [1, SERVICES] {
        for family in Family::ALL {
            let told = answer(&format!("web-{number}"), 1);
            wait(outside, node1.at(family, PORT + u16::from(number)), Some(&told))?;
        }
    }
    ensure!(agent.terminate()?.success());
    Ok(())
}

#[test]
fn a_prober_that_lingers_does_not_hold_the_agent_up() -> Result<()> {
    let mut scenario = set_up(&[])?;
    publish(&scenario, &scenario.service("web", NUMBER), PORT, &scenario.endpoints(&["b"]))?;
    let node1 = scenario.cluster.node(1);
    let outside = scenario.cluster.outside();
    wait(outside, node1.at(Family::V4, PORT), Some(&answer("web", 1)))?;
    let mut probers = Vec::new();
    for family in Family::ALL {
        for request in ["", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nHost: web\r\n\r\n"] {
            let to = node1.at(family, PORT);
            let prober = outside.netns().run(|| {
                let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
                stream.write_all(request.as_bytes())?;
                Ok(stream)
            });
            probers.push(prober.context("cannot connect")?);
        }
    }
    let start = Instant::now();
    let status = scenario.take_agent(1)?.terminate()?;
    println!("ended {:?} after SIGTERM with {} probers", start.elapsed(), probers.len());
    ensure!(start.elapsed() < Duration::from_secs(10), "it ended late");
    ensure!(status.code() == Some(0), "{status}");
    wait(scenario.cluster.outside(), node1.at(Family::V4, PORT), None)
}
