//! What the packet filters of a node see of Service traffic: as much as beside kube-proxy.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::cluster::{Builder, Cluster};
use lb_tests::harness::netns::topology::cni::Cni;
use lb_tests::harness::netns::topology::plan::Family;
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::frontends::{Frontend, Got, try_cases};
use lb_tests::harness::netns::words::scenario::{SMALL_MAPS, Scenario, TARGET};
use lb_tests::harness::wait::PATIENCE;

/// Services with a backend in pod `b` of node 1, and with a process of node 1.
const NEAR: u8 = 1;
const HOST: u8 = 2;

/// Loads an nftables script on a host.
fn nft(host: &Host, script: &str) -> Result<()> {
    let mut command = Command::new("sh");
    command.args(["-c", "printf %s \"$1\" | nft -f -", "nft", script]);
    host.output(command, PATIENCE).map(drop)
}

/// How many packets a counter of the table `guard` has.
fn packets(host: &Host, counter: &str) -> Result<u64> {
    let mut command = Command::new("nft");
    command.args(["list", "counter", "inet", "guard", counter]);
    let said = host.output(command, PATIENCE)?;
    let mut words = said.split_whitespace().skip_while(|word| *word != "packets");
    let count = words.nth(1).and_then(|count| count.parse().ok());
    count.with_context(|| format!("no packet count in {said:?}"))
}

/// The rules of a NetworkPolicy and of a host firewall, as agents without eBPF write them: they
/// drop what comes from the client outside for the pod `b` and for the node's own process.
fn policy(scenario: &Scenario) -> String {
    let (outside, b) = (scenario.cluster.outside(), scenario.cluster.pod("b"));
    let [(from4, to4), (from6, to6)] = Family::ALL.map(|family| (outside.ip(family), b.ip(family)));
    format!(
        "table inet guard {{
           counter forwarded {{
           }}
           counter received {{
           }}
           chain forward {{
             type filter hook forward priority filter; policy accept;
             ip saddr {from4} ip daddr {to4} counter name forwarded drop
             ip6 saddr {from6} ip6 daddr {to6} counter name forwarded drop
           }}
           chain input {{
             type filter hook input priority filter; policy accept;
             iifname \"eth0\" tcp dport {TARGET} counter name received drop
             iifname \"eth0\" udp dport {TARGET} counter name received drop
           }}
         }}"
    )
}

fn pods(cni: Cni) -> Builder {
    Cluster::builder().cni(cni).pod(1, "b")
}

#[test]
fn a_cluster_ip_from_outside_passes_the_rules_of_its_node() -> Result<()> {
    for cni in Cni::ALL {
        let mut scenario = Scenario::start(pods(cni).rp_filter(1), &SMALL_MAPS)?;
        scenario.serve(&["b"])?;
        scenario.serve_node(1)?;
        // No Service has a frontend for clients outside.
        scenario.publish(&scenario.service("near", NEAR), &scenario.endpoints(&["b"]))?;
        scenario.publish(&scenario.service("host", HOST), &scenario.node_endpoints(1))?;
        scenario.cluster.fabric().route_services_to(1)?;
        let mut expectations = Expectations::default();
        let open = [
            ("outside", NEAR, Got::Answer("b", &["outside"])),
            ("outside", HOST, Got::Answer("node1", &["outside"])),
        ];
        try_cases(&scenario, &mut expectations, &[Frontend::ClusterIp], &open);
        let node1 = scenario.cluster.node(1);
        nft(&node1, &policy(&scenario))?;
        let closed = [("outside", NEAR, Got::Silence), ("outside", HOST, Got::Silence)];
        try_cases(&scenario, &mut expectations, &[Frontend::ClusterIp], &closed);
        expectations.finish().with_context(|| format!("{cni:?}"))?;
        for counter in ["forwarded", "received"] {
            ensure!(packets(&node1, counter)? > 0, "{cni:?}: no packet was {counter}");
        }
    }
    Ok(())
}

/// Backends here of frontends for clients outside are reached through the same rules.
#[test]
fn node_ports_and_addresses_of_load_balancers_pass_the_rules_of_their_node() -> Result<()> {
    let mut scenario = Scenario::start(pods(Cni::PointToPoint), &SMALL_MAPS)?;
    scenario.serve(&["b"])?;
    scenario.serve_node(1)?;
    scenario.publish(&scenario.exposed("near", NEAR), &scenario.endpoints(&["b"]))?;
    scenario.publish(&scenario.exposed("host", HOST), &scenario.node_endpoints(1))?;
    scenario.cluster.fabric().route_external_to(1)?;
    nft(&scenario.cluster.node(1), &policy(&scenario))?;
    let mut expectations = Expectations::default();
    let closed = [("outside", NEAR, Got::Silence), ("outside", HOST, Got::Silence)];
    let frontends = [Frontend::NodePort(1), Frontend::Balancer, Frontend::External];
    try_cases(&scenario, &mut expectations, &frontends, &closed);
    expectations.finish()
}
