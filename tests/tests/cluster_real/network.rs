//! The network of pods, without a Service: what every other test builds on.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::topology::plan::Family;
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::real::objects::{App, TARGET};
use lb_tests::harness::wait::{PATIENCE, eventually};

use crate::Test;
use crate::world::{World, nodes};

pub(crate) const TESTS: &[Test] =
    &[("network::pods_reach_pods_of_every_node_with_their_own_address", pods)];

/// More than a packet of any network between nodes takes.
const LARGE: usize = 4000;

fn pods(world: &World) -> Result<()> {
    let names: Vec<String> = nodes().map(|node| format!("pod-{node}")).collect();
    let apps: Vec<_> =
        nodes().zip(&names).map(|(node, name)| App::new(name, 1).on(node).deployment()).collect();
    world.apply(&apps)?;
    let pods = names.iter().map(|name| world.client(name)).collect::<Result<Vec<_>>>()?;
    let mut expectations = Expectations::default();
    for (client, from) in pods.iter().zip(&names) {
        for (server, to) in pods.iter().zip(&names).filter(|(_, to)| *to != from) {
            for family in Family::ALL {
                let address = SocketAddr::new(server.ip(family), TARGET);
                for probe in [Probe::tcp(address), Probe::udp(address).payload("x".repeat(LARGE))] {
                    let outcome = eventually(|| {
                        let answer = client.ask(probe.clone().timeout(PATIENCE))?;
                        let (server, seen) = (answer.name(), answer.client_address());
                        ensure!(
                            server.is_some_and(|name| name.starts_with(to.as_str()))
                                && seen == Some(client.ip(family)),
                            "{answer:?}"
                        );
                        Ok(())
                    });
                    expectations.check(format!("{from} to {to}, {family:?}"), outcome);
                }
            }
        }
    }
    expectations.finish()
}
