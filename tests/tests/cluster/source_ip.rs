//! Kubernetes' tutorial "Using Source IP": which client address a server sees, by HTTP, with a
//! real API server. There it is one node at a time; here every node, both families and UDP too.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lb_tests::harness::controlplane::Options;
use lb_tests::harness::controlplane::live::exposed::{
    Fetched, Policy, exposed, fetch, health, wait_endpoints,
};
use lb_tests::harness::controlplane::live::{HTTP, LiveCluster, PORT};
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, balancer_ip, cidr, cluster_ip};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::wait::PATIENCE;

/// The pod that serves, on node 1, and what selects it.
const SERVER: &str = "server";
const APP: &str = "source-ip-app";
/// Pods of clients, on node 1 and 2.
const CLIENTS: [&str; 2] = ["near", "far"];
const NODES: [u8; 2] = [1, 2];
/// Numbers of the ClusterIPs.
const INSIDE: u8 = 20;
const NODE_PORT: u8 = 21;
const LOAD_BALANCER: u8 = 22;
/// How long a client waits for an answer that is not to come.
const SILENCE: Duration = Duration::from_millis(500);

/// How packets reach a backend on another node, and whom that backend sees then.
struct Mode {
    name: &'static str,
    from_elsewhere: fn(client: &Host, node: &Host, family: Family) -> IpAddr,
}

/// Every mode there is; the tests run in each.
const MODES: [Mode; 2] = [
    Mode { name: "snat", from_elsewhere: |_, node, family| node.ip(family) },
    Mode { name: "dsr", from_elsewhere: |client, _, family| client.ip(family) },
];

/// Where a Service is reached, for HTTP and for UDP.
#[derive(Clone, Copy)]
struct FrontEnd {
    http: SocketAddr,
    udp: SocketAddr,
}

impl FrontEnd {
    fn new(address: IpAddr, [http, udp]: [u16; 2]) -> Self {
        let at = |port| SocketAddr::new(address, port);
        Self { http: at(http), udp: at(udp) }
    }

    fn cluster_ip(number: u8, family: Family) -> Self {
        Self::new(cluster_ip(number).get(family), [HTTP, PORT])
    }

    fn load_balancer(family: Family) -> Self {
        Self::new(balancer_ip(LOAD_BALANCER).get(family), [HTTP, PORT])
    }
}

/// The server answers, and sees this client address.
fn check_seen(from: &Host, to: FrontEnd, seen: IpAddr) -> Result<()> {
    let expected = Fetched::Answer { name: SERVER.to_owned(), client: seen };
    let fetched = fetch(from, to.http, PATIENCE)?;
    ensure!(fetched == expected, "{fetched:?} instead of {expected:?}");
    let answer = from.ask(Probe::udp(to.udp))?;
    let told = answer.client_address();
    ensure!(told == Some(seen), "UDP: {answer:?} instead of {seen}");
    ensure!(answer.name() == Some(SERVER), "UDP: {answer:?}");
    Ok(())
}

/// There is neither an answer nor a refusal.
fn check_silence(from: &Host, to: FrontEnd) -> Result<()> {
    let fetched = fetch(from, to.http, SILENCE)?;
    ensure!(fetched == Fetched::TimedOut, "{fetched:?} instead of silence");
    let answer = from.ask(Probe::udp(to.udp).timeout(SILENCE))?;
    ensure!(answer.error() == Some("timeout"), "UDP: {answer:?} instead of silence");
    Ok(())
}

/// The client is refused at once: there is no endpoint on any node.
fn check_refused(from: &Host, to: FrontEnd) -> Result<()> {
    let fetched = fetch(from, to.http, PATIENCE)?;
    ensure!(fetched == Fetched::Refused, "{fetched:?} instead of a refusal");
    let answer = from.ask(Probe::udp(to.udp).connected())?;
    ensure!(answer.error() == Some("ECONNREFUSED"), "UDP: {answer:?} instead of a refusal");
    Ok(())
}

/// Everybody inside who asks, by name: pods on either node, and the nodes.
fn check_inside(
    live: &LiveCluster,
    expectations: &mut Expectations,
    what: &str,
    to: impl Fn(u8, Family) -> FrontEnd,
) {
    for (node, pod) in NODES.into_iter().zip(CLIENTS) {
        let (pod, host) = (live.cluster.pod(pod), live.cluster.node(node));
        for family in Family::ALL {
            let to = to(node, family);
            for client in [&**pod, &**host] {
                let outcome = check_seen(client, to, client.ip(family));
                expectations.check(format!("{what}, {} -> {}", client.name(), to.http), outcome);
            }
        }
    }
}

/// The client outside asks at each node.
fn check_outside(
    live: &LiveCluster,
    expectations: &mut Expectations,
    what: &str,
    to: impl Fn(u8, Family) -> Result<FrontEnd>,
    seen: impl Fn(u8, Family) -> Option<IpAddr>,
) -> Result<()> {
    let outside = live.cluster.outside();
    for node in NODES {
        for family in Family::ALL {
            let to = to(node, family)?;
            let outcome = match seen(node, family) {
                Some(seen) => check_seen(outside, to, seen),
                None => check_silence(outside, to),
            };
            expectations.check(format!("{what}, outside -> {} by node{node}", to.http), outcome);
        }
    }
    Ok(())
}

/// Whom the server sees of the client outside, by the node that it came to.
fn seen_with(
    live: &LiveCluster,
    mode: &Mode,
    policy: Policy,
) -> impl Fn(u8, Family) -> Option<IpAddr> {
    let outside = live.cluster.outside();
    move |node, family| match (node, policy) {
        (1, _) => Some(outside.ip(family)),
        (_, Policy::Cluster) => {
            Some((mode.from_elsewhere)(outside, &live.cluster.node(node), family))
        }
        (_, Policy::Local) => None,
    }
}

fn check_cluster_ip(live: &LiveCluster, expectations: &mut Expectations) -> Result<()> {
    live.plane.apply(&exposed("clusterip", INSIDE, "ClusterIP", APP).to_string())?;
    live.wait_backends("clusterip", Some(1))?;
    check_inside(live, expectations, "ClusterIP", |_, family| FrontEnd::cluster_ip(INSIDE, family));
    Ok(())
}

fn check_node_port(live: &LiveCluster, expectations: &mut Expectations, mode: &Mode) -> Result<()> {
    live.plane.apply(&exposed("nodeport", NODE_PORT, "NodePort", APP).to_string())?;
    live.wait_backends("nodeport", Some(1))?;
    let ports = [live.node_port("nodeport", "http")?, live.node_port("nodeport", "udp")?];
    let to = |node, family| FrontEnd::new(live.cluster.node(node).ip(family), ports);
    for policy in [Policy::Cluster, Policy::Local] {
        live.set_external_policy("nodeport", policy)?;
        let what = format!("NodePort, {policy:?}");
        let seen = seen_with(live, mode, policy);
        check_outside(live, expectations, &what, |node, family| Ok(to(node, family)), seen)?;
        // A node's own clients are served by every endpoint, whatever the policy.
        check_inside(live, expectations, &what, to);
    }
    Ok(())
}

fn check_load_balancer(
    live: &LiveCluster,
    expectations: &mut Expectations,
    mode: &Mode,
) -> Result<()> {
    let name = "loadbalancer";
    live.plane.apply(&exposed(name, LOAD_BALANCER, "LoadBalancer", APP).to_string())?;
    live.wait_backends(name, Some(1))?;
    let to = FrontEnd::load_balancer(Family::V4).http;
    let before = fetch(live.cluster.outside(), to, SILENCE)?;
    let nobody = !matches!(before, Fetched::Answer { .. });
    expectations.is_true(format!("an address that no Service has yet: {before:?}"), nobody);
    live.set_ingress(name, balancer_ip(LOAD_BALANCER))?;
    let to = |node, family| {
        live.cluster.fabric().route_external_to(node)?;
        Ok(FrontEnd::load_balancer(family))
    };
    let inside = |_, family| FrontEnd::load_balancer(family);
    for policy in [Policy::Cluster, Policy::Local] {
        live.set_external_policy(name, policy)?;
        let what = format!("LoadBalancer, {policy:?}");
        check_outside(live, expectations, &what, to, seen_with(live, mode, policy))?;
        check_inside(live, expectations, &what, inside);
    }
    check_scale(live, expectations, name)
}

/// Waits until the health check ports of both nodes tell of so many endpoints.
fn wait_health(live: &LiveCluster, port: u16, expected: [u64; 2]) -> Result<()> {
    for (node, endpoints) in NODES.into_iter().zip(expected) {
        for family in Family::ALL {
            let at = live.cluster.node(node).at(family, port);
            wait_endpoints(live.cluster.outside(), at, endpoints)?;
        }
    }
    Ok(())
}

/// The node that a load balancer sends to: the only one whose health check succeeds.
fn healthy_node(live: &LiveCluster, port: u16) -> Result<u8> {
    let mut healthy = Vec::new();
    for node in NODES {
        let at = live.cluster.node(node).at(Family::V4, port);
        if health(live.cluster.outside(), at)?.status == 200 {
            healthy.push(node);
        }
    }
    match healthy[..] {
        [node] => Ok(node),
        _ => bail!("healthy are {healthy:?}"),
    }
}

/// A load balancer that asks which node has an endpoint, while they go and come back.
fn check_scale(live: &LiveCluster, expectations: &mut Expectations, name: &str) -> Result<()> {
    let outside = live.cluster.outside();
    let port = live.health_check_port(name)?;
    expectations.check("one endpoint", wait_health(live, port, [1, 0]));

    live.plane.delete_pod("default", SERVER, Duration::ZERO)?;
    live.wait_backends(name, Some(0))?;
    expectations.check("scaled to none", wait_health(live, port, [0, 0]));
    for node in NODES {
        live.cluster.fabric().route_external_to(node)?;
        for family in Family::ALL {
            let refused = check_refused(outside, FrontEnd::load_balancer(family));
            expectations.check(format!("no endpoint, by node{node}, {family:?}"), refused);
        }
    }

    live.create_pods(APP, &[SERVER])?;
    live.wait_backends(name, Some(1))?;
    expectations.check("scaled back", wait_health(live, port, [1, 0]));
    live.cluster.fabric().route_external_to(healthy_node(live, port)?)?;
    for family in Family::ALL {
        let outcome = check_seen(outside, FrontEnd::load_balancer(family), outside.ip(family));
        expectations.check(format!("an endpoint again, {family:?}"), outcome);
    }
    Ok(())
}

fn check_all(mode: &Mode, arguments: &[&str]) -> Result<()> {
    // Direct server return sends from addresses of Services.
    let builder = Cluster::builder().any_source();
    let builder = builder.pod(1, SERVER).pod(1, CLIENTS[0]).pod(2, CLIENTS[1]);
    let mut live = LiveCluster::start(builder, Options::default())?;
    live.serve(&[SERVER])?;
    let pods = cidr::cluster();
    let given = ["--external-mode", mode.name, "--cluster-cidr", &pods];
    live.start_agents(&[&given, arguments].concat())?;
    live.create_pods(APP, &[SERVER])?;
    let mut expectations = Expectations::default();
    check_cluster_ip(&live, &mut expectations)?;
    check_node_port(&live, &mut expectations, mode)?;
    check_load_balancer(&live, &mut expectations, mode)?;
    expectations.finish().with_context(|| format!("--external-mode {}", mode.name))?;
    let leaked = live.cluster.fabric().service_packets()?;
    ensure!(leaked == 0, "{leaked} packets to ClusterIPs left a node");
    live.plane.check_running()
}

#[test]
fn servers_see_the_client_addresses_of_the_tutorial() -> Result<()> {
    MODES.iter().try_for_each(|mode| check_all(mode, &[]))
}

#[test]
fn servers_see_the_same_addresses_by_the_packet_path() -> Result<()> {
    MODES.iter().try_for_each(|mode| check_all(mode, &["--socket-lb", "off"]))
}
