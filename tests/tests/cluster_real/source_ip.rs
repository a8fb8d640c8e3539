//! Kubernetes' tutorial "Using Source IP" with a Deployment: which client address the server in a
//! pod sees.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use lb_tests::harness::controlplane::live::exposed::{Fetched, fetch, wait_endpoints};
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::plan::{Addresses, Family, balancer_ip, cidr};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::real::objects::{App, HTTP, PORT, service};
use lb_tests::harness::wait::{PATIENCE, eventually};
use serde_json::json;

use crate::Test;
use crate::world::{World, nodes};

pub(crate) const TESTS: &[Test] = &[
    ("source_ip::a_client_inside_is_seen_with_its_own_address", inside),
    ("source_ip::a_client_outside_is_seen_as_the_policy_says", outside),
];

const SERVER: &str = "source-ip-app";
/// The node that the server's one pod runs on.
const HOME: u8 = 1;
/// How long a client waits for an answer that is not to come.
const SILENCE: Duration = Duration::from_millis(500);
const BALANCER: u8 = 20;

/// Whom the server may see: one of these.
type Seen = Vec<IpAddr>;

fn check_seen(from: &Host, address: IpAddr, [http, udp]: [u16; 2], seen: &Seen) -> Result<()> {
    let fetched = fetch(from, SocketAddr::new(address, http), PATIENCE)?;
    let is_right = matches!(&fetched, Fetched::Answer { client, .. } if seen.contains(client));
    ensure!(is_right, "HTTP: {fetched:?} instead of {seen:?}");
    // Again, because the agent learns of a new pod's device by itself.
    let answer = eventually(|| {
        let answer = from.ask(Probe::udp(SocketAddr::new(address, udp)))?;
        ensure!(answer.reached().is_some(), "UDP: {answer:?}");
        Ok(answer)
    })?;
    let client = answer.client_address();
    ensure!(client.is_some_and(|client| seen.contains(&client)), "UDP: {answer:?}, not {seen:?}");
    Ok(())
}

fn check_silence(from: &Host, address: IpAddr, [http, udp]: [u16; 2]) -> Result<()> {
    let fetched = fetch(from, SocketAddr::new(address, http), SILENCE)?;
    ensure!(fetched == Fetched::TimedOut, "HTTP: {fetched:?} instead of silence");
    let answer = from.ask(Probe::udp(SocketAddr::new(address, udp)).timeout(SILENCE))?;
    ensure!(answer.error() == Some("timeout"), "UDP: {answer:?} instead of silence");
    Ok(())
}

fn inside(world: &World) -> Result<()> {
    world.apply(&[
        App::new(SERVER, 1).on(HOME).deployment(),
        App::new("client-1", 1).on(1).deployment(),
        App::new("client-2", 1).on(2).deployment(),
        service("clusterip", SERVER, "ClusterIP"),
    ])?;
    world.wait_endpoints("clusterip", 1)?;
    let to = world.cluster_ips("clusterip")?;
    let mut expectations = Expectations::default();
    for node in [1, 2] {
        let (pod, host) = (world.client(&format!("client-{node}"))?, world.node(node)?);
        for family in Family::ALL {
            let own = vec![pod.ip(family)];
            let outcome = check_seen(&pod, to.get(family), [HTTP, PORT], &own);
            expectations.check(format!("pod on node{node}, {family:?}"), outcome);
            // To a pod of its own the node speaks with the address of the pods' bridge.
            let own = vec![host.ip(family), bridge(node, family), overlay(node, family)];
            let outcome = check_seen(&host, to.get(family), [HTTP, PORT], &own);
            expectations.check(format!("node{node}, {family:?}"), outcome);
        }
    }
    expectations.finish()
}

/// The address of a node's device in flannel's overlay, if there is one: the network address of its
/// pods.
fn overlay(node: u8, family: Family) -> IpAddr {
    let [v4, v6] = cidr::pods_of_node(node);
    if family == Family::V4 { v4.addr() } else { v6.addr() }
}

/// The first address of a node's pods.
fn bridge(node: u8, family: Family) -> IpAddr {
    let [v4, v6] = cidr::pods_of_node(node);
    let net = if family == Family::V4 { v4 } else { v6 };
    net.hosts().find(|address| *address != net.network()).unwrap_or(net.network())
}

fn outside(world: &World) -> Result<()> {
    world.apply(&[
        App::new(SERVER, 1).on(HOME).deployment(),
        service("nodeport", SERVER, "NodePort"),
        service("loadbalancer", SERVER, "LoadBalancer"),
    ])?;
    world.wait_endpoints("nodeport", 1)?;
    let balancer = balancer_ip(BALANCER);
    world.set_ingress("loadbalancer", balancer)?;
    let mut expectations = Expectations::default();
    check_entries(world, &mut expectations, balancer, "Cluster")?;
    let patch = json!({"spec": {"externalTrafficPolicy": "Local"}}).to_string();
    for name in ["nodeport", "loadbalancer"] {
        world.kubectl(&["patch", "service", name, "-p", &patch])?;
        world.wait_rows(name, "policy Local", |row| row["external_traffic_policy"] == "Local")?;
    }
    check_entries(world, &mut expectations, balancer, "Local")?;
    // What a cloud's load balancer asks to find the nodes with endpoints.
    let object = world.get_object(&["service", "loadbalancer"])?;
    let port = u16::try_from(object["spec"]["healthCheckNodePort"].as_u64().unwrap_or_default())?;
    let client = world.outside()?;
    for node in nodes() {
        let at = world.node(node)?.at(Family::V4, port);
        wait_endpoints(&client, at, u64::from(node == HOME))?;
    }
    expectations.finish()
}

/// The client outside comes to each node, by its port and by the load balancer's address.
fn check_entries(
    world: &World,
    expectations: &mut Expectations,
    balancer: Addresses,
    policy: &str,
) -> Result<()> {
    let client = world.outside()?;
    let ports = [world.node_port("nodeport", "http")?, world.node_port("nodeport", "udp")?];
    for node in nodes() {
        let entry = world.node(node)?;
        world.route_outside(balancer, node)?;
        for family in Family::ALL {
            for (what, address, ports) in [
                ("node port", entry.ip(family), ports),
                ("load balancer", balancer.get(family), [HTTP, PORT]),
            ] {
                let outcome = match (node == HOME, policy) {
                    (true, _) => check_seen(&client, address, ports, &vec![client.ip(family)]),
                    (false, "Cluster") => {
                        let own = vec![entry.ip(family), overlay(node, family)];
                        check_seen(&client, address, ports, &own)
                    }
                    (false, _) => check_silence(&client, address, ports),
                };
                let told = format!("{policy}, {what} {address} by node{node}");
                expectations.check(told, outcome);
            }
        }
    }
    Ok(())
}
