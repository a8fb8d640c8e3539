//! Many clients outside the cluster and much that they load, through a node to a backend on
//! another one, while the agent is killed and comes back.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lb_tests::harness::echo::{Probe, Transport, crowd};
use lb_tests::harness::netns::actors::client::stop_without_loss;
use lb_tests::harness::netns::actors::host::Serve;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, node_port};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::scenario::{PORT, Scenario, TARGET};

const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Udp];
/// Where the servers listen that many clients ask, and that send downloads.
const CROWD: u16 = 9_000;
const BULK: u16 = 9_001;
/// The Services by number.
const MANY: u8 = 1;
const DOWNLOADS: u8 = 2;
const NEAR: u8 = 3;

/// Node 1 is asked; `c` on node 2 serves, and for comparison `b` on node 1.
fn set_up(mode: &str) -> Result<Scenario> {
    let builder = Cluster::builder().any_source().pod(1, "b").pod(2, "c");
    let mut scenario = Scenario::start(builder, &["--external-mode", mode])?;
    scenario.serve(&["b"])?;
    scenario.serve_these("c", &Serve::on(TARGET).bulk(BULK))?;
    // As many processes as it takes to hold all the clients, with some to spare.
    for _ in 0..8 {
        scenario.serve_these("c", &Serve::default().crowd(CROWD))?;
    }
    let far = scenario.endpoints(&["c"]);
    let many = scenario.empty_service("many", MANY).tcp(PORT, CROWD).udp(PORT, TARGET);
    scenario.publish(&many.exposed(MANY), &far)?;
    let downloads = scenario.empty_service("downloads", DOWNLOADS).tcp(PORT, BULK);
    scenario.publish(&downloads.exposed(DOWNLOADS), &far)?;
    scenario.publish(&scenario.exposed("near", NEAR), &scenario.endpoints(&["b"]))?;
    Ok(scenario)
}

fn to(scenario: &Scenario, number: u8, family: Family) -> SocketAddr {
    scenario.cluster.node(1).at(family, node_port(number))
}

fn restart(scenario: &mut Scenario, node: u8) -> Result<()> {
    scenario.take_agent(node)?.kill9()?;
    scenario.start_agent(node)
}

#[test]
fn parallel_downloads_are_right_to_the_last_byte() -> Result<()> {
    const COUNT: u64 = 200;
    const LENGTH: u64 = 10 << 20;
    for mode in ["snat", "dsr"] {
        let mut scenario = set_up(mode)?;
        for family in Family::ALL {
            let to = to(&scenario, DOWNLOADS, family);
            let downloads = scenario.cluster.outside().download(to, COUNT, LENGTH)?;
            restart(&mut scenario, 1)?;
            restart(&mut scenario, 2)?;
            let report = downloads.finish(Duration::from_secs(300))?;
            println!("{mode}, {family:?}: {report:?}");
            let is_right = report.ok == COUNT && report.bytes == COUNT * LENGTH;
            ensure!(is_right, "{mode}, {family:?}: {report:?}");
        }
    }
    Ok(())
}

/// The node's own connections to the very backend work while others use the node's address.
fn check_own_connections(
    scenario: &Scenario,
    expectations: &mut Expectations,
    family: Family,
) -> Result<()> {
    let node = scenario.cluster.node(1);
    let direct = scenario.cluster.pod("c").at(family, TARGET);
    for to in [direct, to(scenario, MANY, family)] {
        for transport in TRANSPORTS {
            for _ in 0..50 {
                let answer = node.ask(Probe::new(transport, to))?;
                let is_own = answer.client_address() == Some(node.ip(family));
                expectations.is_true(format!("node1 -> {to} {transport:?}: {answer:?}"), is_own);
            }
        }
    }
    Ok(())
}

#[test]
fn twenty_thousand_clients_of_one_backend_are_told_apart() -> Result<()> {
    const COUNT: u64 = 20_000;
    let mut scenario = set_up("snat")?;
    let mut expectations = Expectations::default();
    for family in Family::ALL {
        let mut crowds = Vec::new();
        for transport in TRANSPORTS {
            let probe = Probe::new(transport, to(&scenario, MANY, family));
            let crowd = scenario.cluster.outside().crowd(&probe, COUNT as usize)?;
            let report = crowd.ask()?;
            let what = format!("{transport:?} {family:?}: {}", told(&report));
            println!("{what}");
            expectations.is_true(what, is_complete(&report, COUNT));
            crowds.push((transport, crowd));
        }
        check_own_connections(&scenario, &mut expectations, family)?;
        restart(&mut scenario, 1)?;
        for (transport, crowd) in crowds {
            let report = crowd.ask()?;
            let what = format!("{transport:?} {family:?}, again: {}", told(&report));
            expectations.is_true(what, is_complete(&report, COUNT) && report.moved == 0);
        }
    }
    expectations.finish()
}

/// A report without the list of all clients.
fn told(report: &crowd::Report) -> String {
    let shared = report.shared();
    let report = crowd::Report { clients: Vec::new(), ..report.clone() };
    format!("{report:?}, {shared} shared")
}

fn is_complete(report: &crowd::Report, count: u64) -> bool {
    report.ok == count && report.failed.is_empty() && report.shared() == 0
}

#[test]
fn clients_without_a_source_port_are_refused_and_none_hears_another() -> Result<()> {
    const COUNT: u64 = 32_000;
    let mut scenario = set_up("snat")?;
    let mut expectations = Expectations::default();
    for family in Family::ALL {
        for transport in TRANSPORTS {
            let probe = Probe::new(transport, to(&scenario, MANY, family));
            let crowd = scenario.cluster.outside().crowd(&probe, COUNT as usize)?;
            let before = scenario.agent(1)?.counted("no_source_port")?;
            let report = crowd.ask()?;
            let refused = report.failed.get("ECONNREFUSED").copied().unwrap_or_default();
            let what = format!("{transport:?} {family:?}: {}", told(&report));
            println!("{what}");
            expectations.is_true(&what, refused > 0 && report.ok > 20_000 && report.shared() == 0);
            expectations.is_true(&what, report.ok + refused == COUNT);
            let counted = scenario.agent(1)?.counted("no_source_port")? - before;
            expectations.is_true(format!("{what}: counted {counted}"), counted == refused);
            check_own_connections(&scenario, &mut expectations, family)?;
            let report = crowd.ask()?;
            let what = format!("{transport:?} {family:?}, again: {}", told(&report));
            let refused = report.failed.get("ECONNREFUSED").copied().unwrap_or_default();
            let is_right = report.ok + refused == COUNT && report.moved == 0;
            expectations.is_true(what, is_right && report.shared() == 0);
        }
    }
    expectations.finish()
}

#[test]
fn a_killed_and_restarted_agent_loses_no_packet() -> Result<()> {
    const RATE: u64 = 200;
    const TRAFFIC: Duration = Duration::from_secs(60);
    let mut scenario = set_up("snat")?;
    let mut loads = Vec::new();
    for family in Family::ALL {
        for number in [MANY, NEAR] {
            let to = to(&scenario, number, family);
            loads.extend(scenario.cluster.outside().loads(to, RATE, TRAFFIC)?);
        }
    }
    let start = Instant::now();
    for _ in 0..3 {
        scenario.take_agent(1)?.kill9()?;
        thread::sleep(Duration::from_millis(300));
        scenario.start_agent(1)?;
    }
    stop_without_loss(loads, start.elapsed().as_secs() * RATE / 2)
}
