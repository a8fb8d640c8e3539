//! A node before its network plugin: no interface of a pod, no configuration of a CNI. The agent
//! serves the node's own processes, and each pod as it comes.

use std::time::Duration;

use anyhow::{Result, ensure};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario};
use lb_tests::harness::wait::eventually;

const NODE_SERVICE: u8 = 1;
const POD_SERVICE: u8 = 2;

#[test]
fn an_agent_serves_its_node_before_there_is_a_pod_and_each_pod_as_it_comes() -> Result<()> {
    let mut expectations = Expectations::default();
    for mode in ["off", "tcp"] {
        let builder = Cluster::builder().nodes(1);
        let mut scenario =
            Scenario::start(builder, &[&["--socket-lb", mode][..], &SMALL_MAPS].concat())?;
        let node = scenario.cluster.node(1);
        scenario.serve_node(1)?;
        let endpoints = scenario.node_endpoints(1);
        scenario.publish(&scenario.service("of-node", NODE_SERVICE), &endpoints)?;
        let ask = |client: &lb_tests::harness::netns::actors::host::Host, number: u8| {
            for family in Family::ALL {
                for transport in [Transport::Tcp, Transport::Udp] {
                    let to = (cluster_ip(number).get(family), PORT).into();
                    let probe = Probe::new(transport, to).timeout(Duration::from_secs(1));
                    let answer = client.ask(probe)?;
                    ensure!(answer.name().is_some(), "{mode} {transport:?} {to}: {answer:?}");
                }
            }
            anyhow::Ok(())
        };
        expectations.check(format!("{mode}: node to itself"), ask(&node, NODE_SERVICE));
        let agent = scenario.agent(1)?;
        let (status, body) = agent.http(10256, "/healthz")?;
        expectations.is_true(format!("{mode}: {status} {body}"), status == 200);
        let log = agent.process().stderr();
        // Only the first network namespace has this sysctl for writing.
        let lines = log.lines().filter(|line| !line.contains("nf_conntrack_max"));
        let alarming: Vec<_> =
            lines.filter(|line| line.contains("WARN") || line.contains("ERROR")).collect();
        expectations.is_true(format!("{mode}: {alarming:?}"), alarming.is_empty());
        ensure!(log.contains("pods=0"), "there is a pod\n{log}");

        scenario.cluster.add_pod(1, "a")?;
        scenario.cluster.add_pod(1, "b")?;
        scenario.serve(&["b"])?;
        let of_pods = scenario.service("of-pods", POD_SERVICE);
        scenario.publish(&of_pods, &scenario.endpoints(&["b"]))?;
        let a = scenario.cluster.pod("a");
        for (what, client) in [("pod", &**a), ("node", &**node)] {
            for number in [NODE_SERVICE, POD_SERVICE] {
                // Its programs come with its interface, which the agent is told of.
                let asked = eventually(|| ask(client, number));
                expectations.check(format!("{mode}: {what} to Service {number}"), asked);
            }
        }
    }
    expectations.finish()
}
