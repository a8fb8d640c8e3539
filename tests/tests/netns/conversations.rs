//! Clients that talk to a backend itself, from a port from which they have asked a Service for it.

use anyhow::Result;
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::cluster_ip;
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::frontends::kinds;
use lb_tests::harness::netns::words::scenario::{PORT, Scenario, TARGET};
use lb_tests::harness::wait::PATIENCE;

/// The clients' source port.
const SOURCE: u16 = 7001;

/// Row 7.16 of docs/contract.md.
#[test]
fn a_client_may_ask_a_backend_itself_from_the_same_port() -> Result<()> {
    for arguments in [&[][..], &["--socket-lb", "off"], &["--masquerade-all"]] {
        let builder = Cluster::builder().pod(1, "a").pod(1, "b").pod(2, "c");
        let mut scenario = Scenario::start(builder, arguments)?;
        scenario.serve(&["b", "c"])?;
        for (number, backend) in [(1, "b"), (2, "c")] {
            scenario
                .publish(&scenario.service(backend, number), &scenario.endpoints(&[backend]))?;
        }
        let mut expectations = Expectations::default();
        let (a, node1) = (scenario.cluster.pod("a"), scenario.cluster.node(1));
        let mut clients: Vec<(&Host, u8, &str)> = vec![(&a, 1, "b"), (&a, 2, "c")];
        // Translated at connect(), both sockets would be one to the kernel: it refuses the second.
        if arguments.contains(&"off") {
            clients.push((&node1, 2, "c"));
        }
        for (transport, family) in kinds() {
            for (client, number, backend) in &clients {
                let service = (cluster_ip(*number).get(family), PORT).into();
                let itself = scenario.cluster.pod(backend).at(family, TARGET);
                let what =
                    format!("{arguments:?}: {transport:?} {family:?} {} {backend}", client.name());
                let probe = |to| Probe::new(transport, to).source_port(SOURCE).connected();
                let asked = client.open(probe(service));
                let direct = client.open(probe(itself));
                let (Ok(asked), Ok(direct)) = (&asked, &direct) else {
                    expectations.is_true(format!("{what}: {asked:?} {direct:?}"), false);
                    continue;
                };
                for (connection, name) in [(asked, "the Service"), (direct, "the backend")] {
                    let answer = connection.exchange("again", PATIENCE);
                    let is_right =
                        answer.as_ref().is_ok_and(|answer| answer.name() == Some(*backend));
                    expectations.is_true(format!("{what}: {name}: {answer:?}"), is_right);
                }
            }
        }
        expectations.finish()?;
    }
    Ok(())
}
