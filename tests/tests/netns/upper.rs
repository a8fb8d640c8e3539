//! Clients outside that come by a device upon a node's uplink, as a VLAN's or a macvlan is. It
//! has no XDP of its own in the driver, and its packets pass the uplink's programs before.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::agent::cleanup;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Addresses, Family, NODE_GATEWAY, node_port};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::scenario::{SMALL_MAPS, Scenario, expect};
use lb_tests::harness::wait::eventually;

/// The Services by number: served on node 1 and on node 2.
const NEAR: u8 = 1;
const FAR: u8 = 2;
/// The device upon the uplink.
const UPPER: &str = "upper0";
/// Node 1 and the router, in the network of that device.
const NODE: Addresses = Addresses {
    v4: std::net::Ipv4Addr::new(172, 19, 0, 11),
    v6: std::net::Ipv6Addr::new(0xfd00, 0x19, 0, 0, 0, 0, 0, 0x11),
};
const ROUTER: Addresses = Addresses {
    v4: std::net::Ipv4Addr::new(172, 19, 0, 1),
    v6: std::net::Ipv6Addr::new(0xfd00, 0x19, 0, 0, 0, 0, 0, 1),
};

/// Lines of `ip` that give a device its addresses.
fn addresses(device: &str, at: Addresses) -> [String; 2] {
    [
        format!("addr add {}/24 dev {device}", at.v4),
        format!("addr add {}/64 dev {device} nodad", at.v6),
    ]
}

/// Makes the device. Only it answers for its addresses.
fn add_upper(scenario: &Scenario) -> Result<()> {
    scenario.cluster.fabric().netns().ip_lines(&addresses("br0", ROUTER))?;
    let node = scenario.cluster.node(1);
    node.netns().run(|| Ok(std::fs::write("/proc/sys/net/ipv4/conf/all/arp_ignore", "1")?))?;
    let mut lines = vec![format!("link add link eth0 name {UPPER} type macvlan mode bridge")];
    lines.extend(addresses(UPPER, NODE));
    lines.push(format!("link set {UPPER} up"));
    node.netns().ip_lines(&lines)
}

/// The default routes of node 1 by its uplink, or by the device upon it.
fn default_routes(by_upper: bool) -> [String; 2] {
    let (device, at) = if by_upper { (UPPER, ROUTER) } else { ("eth0", NODE_GATEWAY) };
    Family::ALL.map(|family| format!("route replace default via {} dev {device}", at.get(family)))
}

fn start() -> Result<Scenario> {
    let builder = Cluster::builder().pod(1, "b").pod(2, "c");
    let builder = builder.no_tx_checksum_offload().any_source();
    let mut scenario = Scenario::start(builder, &SMALL_MAPS)?;
    scenario.serve(&["b", "c"])?;
    scenario.publish(&scenario.exposed("near", NEAR), &scenario.endpoints(&["b"]))?;
    scenario.publish(&scenario.exposed("far", FAR), &scenario.endpoints(&["c"]))?;
    add_upper(&scenario)?;
    scenario.manifests.node("node1", NODE, None)?;
    Ok(scenario)
}

/// Starts the agent of node 1 as if there had been none before.
fn restart(scenario: &mut Scenario, arguments: &[&str]) -> Result<()> {
    scenario.take_agent(1)?.terminate()?;
    cleanup(&scenario.cluster.node(1))?;
    let fixed = ["--socket-lb", "off", "--pod-interfaces", "cali*"];
    scenario.set_arguments(&[&fixed[..], arguments, &SMALL_MAPS].concat());
    scenario.start_agent(1)
}

/// Waits until the agent has said of each of these devices how its packets are taken, and of
/// no other one.
fn check_said(scenario: &mut Scenario, said: &[(&str, &str)]) -> Result<()> {
    eventually(|| {
        let log = scenario.agent(1)?.process().stderr();
        let lines = || log.lines().filter(|line| line.contains("packets are handled by"));
        let is_said = |(device, how): &(&str, &str)| {
            let device = format!("\"{device}\"");
            lines().any(|line| line.contains(how) && line.contains(&device))
        };
        let is_all = said.iter().all(is_said) && lines().count() == said.len();
        ensure!(is_all, "not {said:?}:\n{log}");
        Ok(())
    })
}

/// The client outside reaches both Services at node 1's address there.
fn check(scenario: &Scenario) -> Result<()> {
    let (outside, node) = (scenario.cluster.outside(), scenario.cluster.node(1));
    let mut expectations = Expectations::default();
    for family in Family::ALL {
        let node: [IpAddr; 2] = [NODE.get(family), node.ip(family)];
        let client = [outside.ip(family)];
        let backends: [(u8, &str, &[IpAddr]); 2] = [(NEAR, "b", &client), (FAR, "c", &node)];
        for (number, server, seen) in backends {
            for transport in [Transport::Tcp, Transport::Udp] {
                let to: SocketAddr = (NODE.get(family), node_port(number)).into();
                let payload = "more than one segment".repeat(50);
                let probe = Probe::new(transport, to).payload(payload);
                let outcome = outside.ask(probe).and_then(|answer| {
                    expect(&format!("{transport:?}"), &answer, to, &[server], seen).map(drop)
                });
                expectations.check(to, outcome);
            }
        }
    }
    expectations.finish()
}

const BY_TC: &str = "tc: --xdp off";
const NO_XDP: &str = "tc: its driver does not support XDP";

#[test]
fn a_device_upon_the_uplink_faces_the_outside() -> Result<()> {
    let mut scenario = start()?;
    scenario.cluster.node(1).netns().ip_lines(&default_routes(true))?;
    const GENERIC: &str = "XDP in the stack";
    for (arguments, said) in [
        (&["--xdp", "off"][..], &[("eth0", BY_TC), (UPPER, BY_TC)][..]),
        (&["--devices", UPPER, "--xdp", "native"], &[(UPPER, NO_XDP)]),
        (&["--xdp", "generic"], &[("eth0", GENERIC), (UPPER, GENERIC)]),
    ] {
        restart(&mut scenario, arguments)?;
        check_said(&mut scenario, said)
            .and_then(|()| check(&scenario))
            .with_context(|| arguments.join(" "))?;
    }
    Ok(())
}

#[test]
fn an_uplink_and_a_device_upon_it_face_the_outside() -> Result<()> {
    let mut scenario = start()?;
    for (by_upper, xdp, below, upper) in [
        (false, "off", BY_TC, BY_TC),
        (true, "off", BY_TC, BY_TC),
        (false, "native", "XDP in the driver", NO_XDP),
        (true, "generic", "XDP in the stack", "XDP in the stack"),
    ] {
        scenario.cluster.node(1).netns().ip_lines(&default_routes(by_upper))?;
        restart(&mut scenario, &["--devices", "eth0,upper0", "--xdp", xdp])?;
        check_said(&mut scenario, &[("eth0", below), (UPPER, upper)])
            .and_then(|()| check(&scenario))
            .with_context(|| format!("--xdp {xdp}, default route by the upper: {by_upper}"))?;
    }
    Ok(())
}
