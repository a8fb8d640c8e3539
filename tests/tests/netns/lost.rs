//! Packets to addresses of load balancers and external IPs that no flow and no port is known for.

use std::time::Duration;

use anyhow::{Result, ensure};
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, balancer_ip, external_ip};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::frontends::{Frontend, SILENT};
use lb_tests::harness::netns::words::scenario::{SMALL_MAPS, Scenario};

const NEAR: u8 = 1;
const ANSWER: Duration = Duration::from_secs(5);

fn start() -> Result<Scenario> {
    let mut scenario = Scenario::start(Cluster::builder().pod(1, "b"), &SMALL_MAPS)?;
    scenario.serve(&["b"])?;
    scenario.publish(&scenario.exposed("near", NEAR), &scenario.endpoints(&["b"]))?;
    scenario.cluster.fabric().route_external_to(1)?;
    Ok(scenario)
}

#[test]
fn packets_to_other_ports_of_an_address_do_not_circle() -> Result<()> {
    let mut scenario = start()?;
    let outside = scenario.cluster.outside();
    let mut expectations = Expectations::default();
    for family in Family::ALL {
        for ip in [balancer_ip(NEAR).get(family), external_ip(NEAR).get(family)] {
            let answer = outside.ask(Probe::udp((ip, 81).into()).connected().timeout(SILENT))?;
            // A packet that circles ends with an ICMP error: time exceeded.
            let is_silent = answer.error() == Some("timeout");
            expectations.is_true(format!("{ip}: {answer:?}"), is_silent);
        }
    }
    expectations.finish()?;
    let returned = scenario.agent(1)?.counted("returning")?;
    ensure!(returned == 4, "4 datagrams were dropped {returned} times");
    Ok(())
}

#[test]
fn a_connection_whose_route_moves_to_another_node_is_reset() -> Result<()> {
    let scenario = start()?;
    let outside = scenario.cluster.outside();
    let mut expectations = Expectations::default();
    for family in Family::ALL {
        for front in [Frontend::Balancer, Frontend::External] {
            scenario.cluster.fabric().route_external_to(1)?;
            let connection = outside.open(Probe::tcp(front.at(&scenario, NEAR, family)))?;
            scenario.cluster.fabric().route_external_to(2)?;
            let answer = connection.exchange("after the change", ANSWER)?;
            let is_reset = answer.error() == Some("ECONNRESET");
            expectations.is_true(format!("{front:?} {family:?}: {answer:?}"), is_reset);
        }
    }
    expectations.finish()
}
