//! Addresses that Services want and other programs of a node have.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::host::{Host, Serve};
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::frontends::kinds;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario, TARGET};
use lb_tests::harness::wait::{PATIENCE, eventually};

const DNS: u8 = 1;
const API: u8 = 2;
const GREEDY: u8 = 3;

fn sh(host: &Host, script: &str) -> Result<()> {
    let mut command = Command::new("sh");
    command.args(["-ec", script]);
    host.output(command, PATIENCE).map(drop)
}

/// What NodeLocal DNSCache sets up on a node: a device with the ClusterIP, whose packets connection
/// tracking does not see. A bridge without ports stands for its dummy, which not every kernel has.
fn hold(node: &Host) -> Result<()> {
    let own = cluster_ip(DNS);
    sh(
        node,
        &format!(
            "ip link add nodelocaldns type bridge
             ip link set nodelocaldns up
             ip addr add {v4}/32 dev nodelocaldns
             ip addr add {v6}/128 dev nodelocaldns nodad
             nft -f - <<END
             table inet nodelocaldns {{
               chain prerouting {{
                 type filter hook prerouting priority raw; policy accept;
                 ip daddr {v4} notrack
                 ip6 daddr {v6} notrack
               }}
               chain output {{
                 type filter hook output priority raw; policy accept;
                 ip daddr {v4} notrack
                 ip saddr {v4} notrack
                 ip6 daddr {v6} notrack
                 ip6 saddr {v6} notrack
               }}
             }}\nEND\n",
            v4 = own.v4,
            v6 = own.v6
        ),
    )
}

/// Asks the ClusterIP once with each kind, from a pod of node 1, a process of node 1, and a pod of
/// node 2. `near` is who answers on node 1.
fn ask_all(scenario: &Scenario, near: &str) -> Result<()> {
    let mut expectations = Expectations::default();
    let (a, d, node1) =
        (scenario.cluster.pod("a"), scenario.cluster.pod("d"), scenario.cluster.node(1));
    let clients: [(&Host, &str); 3] = [(&a, near), (&node1, near), (&d, "b")];
    for kind @ (transport, family) in kinds() {
        let to = (cluster_ip(DNS).get(family), PORT).into();
        for (client, server) in clients {
            let answer = client.ask(Probe::new(transport, to))?;
            let is_right = answer.name() == Some(server);
            expectations.is_true(format!("{} {kind:?}: {answer:?}", client.name()), is_right);
        }
    }
    expectations.finish()
}

#[test]
fn a_process_serves_the_cluster_ip_that_an_interface_holds() -> Result<()> {
    for mode in ["off", "node", "all"] {
        let builder = Cluster::builder().rp_filter(1).pod(1, "a").pod(2, "b").pod(2, "d");
        let arguments = [&["--socket-lb", mode][..], &SMALL_MAPS].concat();
        let mut scenario = Scenario::start(builder, &arguments)?;
        scenario.serve(&["b"])?;
        scenario.publish(&scenario.service("dns", DNS), &scenario.endpoints(&["b"]))?;
        ask_all(&scenario, "b")?;
        let node1 = scenario.cluster.node(1);
        scenario.serve_node_these(1, &Serve::on(PORT))?;
        hold(&node1)?;
        scenario.agent(1)?.wait_log(&["holds this ClusterIP", "default/dns"])?;
        eventually(|| ask_all(&scenario, "node1"))
            .with_context(|| format!("--socket-lb {mode}, held"))?;
        sh(&node1, "ip link del nodelocaldns; nft delete table inet nodelocaldns")?;
        eventually(|| ask_all(&scenario, "b"))
            .with_context(|| format!("--socket-lb {mode}, held no more"))?;
    }
    Ok(())
}

#[test]
fn a_service_at_the_address_of_the_api_server_is_refused() -> Result<()> {
    for mode in ["off", "node"] {
        let builder = Cluster::builder().pod(1, "a").pod(2, "c");
        let arguments = [&["--socket-lb", mode][..], &SMALL_MAPS].concat();
        let mut scenario = Scenario::start(builder, &arguments)?;
        scenario.serve(&["c"])?;
        scenario.serve_node(1)?;
        let c = scenario.cluster.pod("c");
        let api = scenario.empty_service("kubernetes", API).tcp(PORT, TARGET);
        scenario.publish(&api, &scenario.node_endpoints(1))?;
        let node1 = scenario.cluster.node(1);
        let greedy = scenario.empty_service("greedy", GREEDY).tcp(TARGET, TARGET);
        let greedy = greedy.external_ips(node1.addresses());
        scenario.manifests.publish(&greedy, &scenario.endpoints(&["c"]))?;
        for node in [1, 2] {
            scenario.agent(node)?.wait_log(&["default/greedy", "is an API server"])?;
        }
        let mut expectations = Expectations::default();
        let (a, node2) = (scenario.cluster.pod("a"), scenario.cluster.node(2));
        let clients: [&Host; 4] = [&a, &node1, &node2, scenario.cluster.outside()];
        for family in Family::ALL {
            for client in clients {
                let answer = client.ask(Probe::tcp(node1.at(family, TARGET)))?;
                let is_right = answer.name() == Some("node1");
                expectations.is_true(format!("{} {family:?}: {answer:?}", client.name()), is_right);
            }
            let to = (cluster_ip(GREEDY).get(family), TARGET).into();
            let answer = a.ask(Probe::new(Transport::Tcp, to))?;
            expectations.is_true(format!("{to}: {answer:?}"), answer.name() == Some("c"));
            // What a pod's packets are translated to is the address that the other Service wanted.
            let to = (cluster_ip(API).get(family), PORT).into();
            let answer = c.ask(Probe::tcp(to))?;
            expectations.is_true(format!("c, {to}: {answer:?}"), answer.name() == Some("node1"));
        }
        expectations.finish().with_context(|| format!("--socket-lb {mode}"))?;
        let refused = scenario.agent(2)?.get("frontends")?;
        let rows = refused.as_array().context("no list of frontends")?;
        let kinds = ["external", "external_address"];
        let is_there = rows.iter().any(|row| kinds.iter().any(|kind| row["kind"] == *kind));
        ensure!(!is_there, "an external frontend is there: {refused}");
    }
    Ok(())
}

/// The address of a backend may be an external IP of another Service, at other ports: a node's,
/// or a pod's where the agents do not know which addresses pods have.
#[test]
fn a_backend_is_reached_whose_address_is_an_external_ip() -> Result<()> {
    let builder = Cluster::builder().pod(1, "a").pod(2, "c");
    let mut scenario = Scenario::start(builder, &SMALL_MAPS)?;
    scenario.serve(&["c"])?;
    scenario.serve_node(1)?;
    let web = scenario.empty_service("web", API).tcp(PORT, TARGET);
    scenario.publish(&web, &scenario.node_endpoints(1))?;
    let greedy = scenario.empty_service("greedy", GREEDY).tcp(9, TARGET);
    let greedy = greedy.external_ips(scenario.cluster.node(1).addresses());
    scenario.publish(&greedy, &scenario.endpoints(&["c"]))?;
    let mut expectations = Expectations::default();
    for family in Family::ALL {
        let to = (cluster_ip(API).get(family), PORT).into();
        let answer = scenario.cluster.pod("c").ask(Probe::tcp(to))?;
        expectations.is_true(format!("{to}: {answer:?}"), answer.name() == Some("node1"));
    }
    expectations.finish()
}
