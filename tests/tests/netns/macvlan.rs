//! A pod on a macvlan of its node's uplink: it is another host of the nodes' network, and no process
//! of the node that its frames leave by.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Addresses, NODE_GATEWAY, cluster_ip, node_port};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::frontends::{SILENT, kinds};
use lb_tests::harness::netns::words::manifests::Endpoint;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario, expect};

/// The Services by number: served by the pod on the macvlan, and by a pod of node 2.
const OWN: u8 = 1;
const FAR: u8 = 2;
/// The addresses of the pod, in the nodes' network.
const POD: Addresses = Addresses {
    v4: Ipv4Addr::new(172, 18, 0, 200),
    v6: Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, 0x200),
};

/// Gives pod `m` of node 1 a macvlan in place of its veth.
fn move_to_macvlan(scenario: &Scenario) -> Result<()> {
    let (node1, m) = (scenario.cluster.node(1), scenario.cluster.pod("m"));
    m.netns().ip("link del eth0")?;
    node1.netns().ip_lines(&[
        "link add link eth0 name m0 type macvlan mode bridge".to_owned(),
        format!("link set m0 netns {} name eth0", m.netns().name()),
    ])?;
    m.netns().ip_lines(&[
        format!("addr add {}/24 dev eth0", POD.v4),
        format!("addr add {}/64 dev eth0 nodad", POD.v6),
        "link set eth0 up".to_owned(),
        format!("route add default via {}", NODE_GATEWAY.v4),
        format!("route add default via {}", NODE_GATEWAY.v6),
    ])
}

#[test]
fn a_pod_on_a_macvlan_is_no_process_of_its_node() -> Result<()> {
    let builder = Cluster::builder().any_source().pod(1, "m").pod(2, "c");
    let mut scenario = Scenario::start(builder, &SMALL_MAPS)?;
    move_to_macvlan(&scenario)?;
    scenario.serve(&["m", "c"])?;
    let own = [Endpoint::at(POD.v4), Endpoint::at(POD.v6)].map(|endpoint| endpoint.node("node1"));
    scenario.publish(&scenario.exposed("own", OWN), &own)?;
    scenario.publish(&scenario.exposed("far", FAR), &scenario.endpoints(&["c"]))?;
    let (m, c) = (scenario.cluster.pod("m"), scenario.cluster.pod("c"));
    let (outside, node2) = (scenario.cluster.outside(), scenario.cluster.node(2));
    let mut expectations = Expectations::default();
    for (transport, family) in kinds() {
        // As beside kube-proxy, the node that the frames leave by does not look at them.
        let vip = (cluster_ip(FAR).get(family), PORT).into();
        let before = scenario.cluster.fabric().service_packets_from(1)?;
        let answer = m.ask(Probe::new(transport, vip).timeout(SILENT))?;
        let left = scenario.cluster.fabric().service_packets_from(1)? - before;
        let is_untouched = answer.error() == Some("timeout") && left > 0;
        expectations.is_true(format!("{transport:?} {vip}: {answer:?}, {left} left"), is_untouched);

        let at_node2 = |number| SocketAddr::from((node2.ip(family), node_port(number)));
        let of_pod = SocketAddr::from((cluster_ip(OWN).get(family), PORT));
        let own = POD.get(family);
        let rows: [(&Host, SocketAddr, &str, _); 4] = [
            (&m, at_node2(FAR), "c", own),
            (outside, at_node2(OWN), "m", node2.ip(family)),
            (&node2, of_pod, "m", node2.ip(family)),
            (&c, of_pod, "m", c.ip(family)),
        ];
        for (client, to, server, seen) in rows {
            let outcome = client.ask(Probe::new(transport, to)).and_then(|answer| {
                expect(client.name(), &answer, to, &[server], &[seen]).map(drop)
            });
            expectations.check(format!("{} {transport:?} {to}", client.name()), outcome);
        }
    }
    expectations.finish()?;
    let flows = scenario.agent(1)?.counted("flow_created")?;
    ensure!(flows == 0, "node 1 has made {flows} flows");
    Ok(())
}
