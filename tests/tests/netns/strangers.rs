//! Packets from outside that are none of Services', or that no honest client sends: they are
//! put on the wire to node 1 byte by byte.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lb_common::abi::address::{Ipv4, Ipv6};
use lb_common::balance::Endpoint;
use lb_common::packet::SYN;
use lb_testing::family::TestFamily;
use lb_testing::frame::{Body, ETHERNET, Frame};
use lb_testing::world::at;
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::host::{Host, Serve};
use lb_tests::harness::netns::topology::cluster::{Builder, Cluster};
use lb_tests::harness::netns::topology::plan::{Family, balancer_ip, node_port};
use lb_tests::harness::netns::traffic::capture::{self, Capture, Captured};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario, TARGET};

const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Udp];
const SOON: Duration = Duration::from_secs(5);
/// Where a test serves itself.
const OWN: u16 = 9_001;
/// Pods that serve, with the number of their Service and that of the test's own.
const BACKENDS: [(&str, u8, u8); 2] = [("b", 1, 11), ("c", 2, 12)];

fn start(builder: Builder, xdp: &str) -> Result<Scenario> {
    let arguments = [&["--socket-lb", "off", "--xdp", xdp][..], &SMALL_MAPS].concat();
    let mut scenario = Scenario::start(builder.pod(1, "b").pod(2, "c"), &arguments)?;
    for (pod, number, own) in BACKENDS {
        scenario.serve_these(pod, &Serve::on(TARGET))?;
        let endpoints = scenario.endpoints(&[pod]);
        scenario.publish(&scenario.exposed(pod, number), &endpoints)?;
        let service = scenario.empty_service(&format!("{pod}-own"), own).udp(PORT, OWN);
        scenario.publish(&service.exposed(own), &endpoints)?;
    }
    Ok(scenario)
}

/// An address family in the words of frames and in those of the network.
trait Kind: TestFamily {
    const FAMILY: Family;
    /// Addresses that no packet on a wire may come from, but the node's own.
    fn martians() -> Vec<IpAddr>;
}

impl Kind for Ipv4 {
    const FAMILY: Family = Family::V4;

    fn martians() -> Vec<IpAddr> {
        let all = [[127, 0, 0, 1], [0, 0, 0, 0], [224, 0, 0, 1], [255, 255, 255, 255]];
        all.into_iter().map(IpAddr::from).collect()
    }
}

impl Kind for Ipv6 {
    const FAMILY: Family = Family::V6;

    fn martians() -> Vec<IpAddr> {
        let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        [Ipv6Addr::LOCALHOST, Ipv6Addr::UNSPECIFIED, all_nodes].map(IpAddr::from).to_vec()
    }
}

fn endpoint<F: TestFamily>(end: SocketAddr) -> Endpoint<F::Address> {
    let bytes = match end.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    at(F::address(&bytes), end.port())
}

/// A frame between these ends.
fn frame<F: TestFamily>(from: SocketAddr, to: SocketAddr, body: Body) -> Frame<F> {
    Frame::new(endpoint::<F>(from), endpoint::<F>(to), body)
}

/// Has a frame come in by the uplink of node 1, from the router, with what `tag` holds between
/// the link-layer addresses and the EtherType.
fn send<F: TestFamily>(scenario: &Scenario, frame: &Frame<F>, tag: &[u8]) -> Result<()> {
    let fabric = scenario.cluster.fabric().netns();
    let node = capture::link_address(scenario.cluster.node(1).netns(), "eth0")?;
    let router = capture::link_address(fabric, "br0")?;
    let bytes = frame.bytes();
    capture::send(fabric, "node1", &[&node, &router, tag, &bytes[12..]].concat())
}

/// The node port of a Service.
fn front(scenario: &Scenario, number: u8, family: Family) -> SocketAddr {
    scenario.cluster.node(1).at(family, node_port(number))
}

/// Both Services answer the client outside. What was sent before has gone its way by then.
fn check_services<F: Kind>(scenario: &Scenario) -> Result<()> {
    for (pod, number, _) in BACKENDS {
        for transport in TRANSPORTS {
            let probe = Probe::new(transport, front(scenario, number, F::FAMILY)).timeout(SOON);
            let answer = scenario.cluster.outside().ask(probe)?;
            ensure!(answer.name() == Some(pod), "{pod} {transport:?}: {answer:?}");
        }
    }
    Ok(())
}

/// What has come in by a capture's device.
fn came_in(capture: &Capture) -> Result<Vec<Captured>> {
    Ok(capture.take()?.into_iter().filter(|frame| !frame.is_outgoing).collect())
}

/// No backend sees a packet from an address that no packet may come from, and the node goes on
/// as before.
fn check_martians<F: Kind>(scenario: &Scenario, martians: &[IpAddr]) -> Result<()> {
    let mut expectations = Expectations::default();
    let seen: Result<Vec<_>> = BACKENDS
        .iter()
        .map(|(pod, ..)| Capture::on(scenario.cluster.pod(pod).netns(), "eth0"))
        .collect();
    let seen = seen?;
    for (index, martian) in martians.iter().enumerate() {
        for (_, number, _) in BACKENDS {
            for body in [Body::Tcp(SYN), Body::Udp] {
                let from = SocketAddr::new(*martian, 40_000 + index as u16);
                let frame = frame::<F>(from, front(scenario, number, F::FAMILY), body);
                send(scenario, &frame, &[])?;
            }
        }
    }
    expectations.check("afterwards", check_services::<F>(scenario));
    let own = scenario.cluster.node(1).ip(F::FAMILY);
    for ((pod, ..), capture) in BACKENDS.iter().zip(&seen) {
        for frame in came_in(capture)? {
            let Some([source, _]) = frame.addresses() else { continue };
            // Another node sees node 1 as the source of everybody's packets.
            let is_martian = martians.contains(&source) && (source != own || *pod == "b");
            expectations.is_true(format!("{pod} saw {source}"), !is_martian);
        }
    }
    expectations.finish()
}

/// A stranger that claims to be the node, from the port that a process there is going to use to
/// talk to a backend, is not in its way.
fn check_own_connections<F: Kind>(scenario: &Scenario) -> Result<()> {
    let (node, pod) = (scenario.cluster.node(1), scenario.cluster.pod("b"));
    let from = node.at(F::FAMILY, 21_000);
    for body in [Body::Tcp(SYN), Body::Udp] {
        send(scenario, &frame::<F>(from, front(scenario, BACKENDS[0].1, F::FAMILY), body), &[])?;
    }
    check_services::<F>(scenario)?;
    let mut expectations = Expectations::default();
    for transport in TRANSPORTS {
        let probe = Probe::new(transport, pod.at(F::FAMILY, TARGET)).source_port(from.port());
        let answer = node.ask(probe.timeout(SOON / 5))?;
        let is_right = answer.client_address() == Some(from.ip());
        expectations.is_true(format!("{transport:?}: {answer:?}"), is_right);
    }
    expectations.finish()
}

/// A frame without what a router changes: link-layer addresses, hops and their checksum.
fn routed(frame: &Captured) -> Vec<u8> {
    let mut bytes = frame.bytes[ETHERNET..].to_vec();
    if bytes[0] >> 4 == 4 {
        bytes[8] = 0;
        bytes[10..12].fill(0);
    } else {
        bytes[7] = 0;
    }
    bytes
}

/// The ports of a TCP segment, lower first, and whether it is a SYN.
fn tcp_ports(frame: &Captured) -> Option<([u16; 2], bool)> {
    let flags = frame.tcp_flags()?;
    let (_, ends) = frame.ends()?;
    let mut ports = ends.map(|(_, port)| port);
    ports.sort_unstable();
    Some((ports, flags & SYN != 0))
}

/// Waits until all that has passed one place between two ends has passed another one too, each
/// direction for itself. TCP counts only if its SYN was captured: the last packets of an earlier
/// connection may pass one place before its capture begins, and the other one after.
fn is_the_same(one: &Capture, other: &Capture, [from, to]: [IpAddr; 2]) -> Result<()> {
    let start = Instant::now();
    let mut all = [Vec::new(), Vec::new()];
    loop {
        for (capture, all) in [one, other].into_iter().zip(&mut all) {
            all.extend(capture.take()?);
        }
        let mut is_same = true;
        let opened: BTreeSet<_> = all
            .iter()
            .flatten()
            .filter_map(tcp_ports)
            .filter_map(|(ports, is_syn)| is_syn.then_some(ports))
            .collect();
        let is_opened =
            |frame: &Captured| tcp_ports(frame).is_none_or(|(ports, _)| opened.contains(&ports));
        for ends in [[from, to], [to, from]] {
            let [one, other] = all.each_ref().map(|frames| {
                let of_ends = frames
                    .iter()
                    .filter(|frame| frame.addresses() == Some(ends) && is_opened(frame));
                let mut frames: Vec<_> = of_ends.map(routed).collect();
                frames.sort();
                frames
            });
            is_same &= one == other && one.len() > 10;
            let told = || format!("{ends:?}\n{one:02x?}\n{other:02x?}");
            ensure!(is_same || start.elapsed() < SOON, "not the same: {}", told());
        }
        if is_same {
            return Ok(());
        }
    }
}

/// A pod that is a backend is reached by its own address too: by the same port as through the
/// Service, and beside flows through the Service.
fn check_pod<F: Kind>(scenario: &Scenario) -> Result<()> {
    let (outside, pod) = (scenario.cluster.outside(), scenario.cluster.pod("b"));
    let held = TRANSPORTS.map(|transport| {
        outside.open(Probe::new(transport, front(scenario, BACKENDS[0].1, F::FAMILY)).timeout(SOON))
    });
    let wire = Capture::on(scenario.cluster.fabric().netns(), "node1")?;
    let at_pod = Capture::on(pod.netns(), "eth0")?;
    let hosts: [&Host; 2] = [outside, &pod];
    let ends = hosts.map(|host| host.ip(F::FAMILY));
    for transport in TRANSPORTS {
        for payload in ["odd", &"as much as fits".repeat(60)] {
            let to = pod.at(F::FAMILY, TARGET);
            let probe = Probe::new(transport, to).payload(payload).timeout(SOON);
            let answer = outside.ask(probe)?;
            let is_right = answer.client_address() == Some(ends[0]);
            ensure!(is_right && answer.name() == Some("b"), "{transport:?}: {answer:?}");
        }
        // Nobody listens there: what the pod says of it is untouched as well.
        let closed = Probe::new(transport, pod.at(F::FAMILY, TARGET + 7)).connected();
        let answer = outside.ask(closed.timeout(SOON))?;
        ensure!(answer.error() == Some("ECONNREFUSED"), "{transport:?}: {answer:?}");
    }
    is_the_same(&wire, &at_pod, ends)?;
    for held in held {
        let answer = held?.exchange("still there", SOON)?;
        ensure!(answer.name() == Some("b"), "through the Service: {answer:?}");
    }
    Ok(())
}

/// IPv4 options, or so many extension headers of IPv6, that say nothing.
fn fillers<F: Kind>(count: usize) -> Vec<(u8, Vec<u8>)> {
    match F::FAMILY {
        Family::V4 => vec![(0, vec![1; 8 * count])],
        Family::V6 => vec![(60, vec![0, 1, 4, 0, 0, 0, 0]); count],
    }
}

/// Requests with long headers reach the backend with all of them, and are answered.
fn check_headers<F: Kind>(scenario: &Scenario) -> Result<()> {
    let outside = scenario.cluster.outside();
    for (pod, _, number) in BACKENDS {
        let (pod, to) = (scenario.cluster.pod(pod), front(scenario, number, F::FAMILY));
        let server = pod.datagrams(F::FAMILY, OWN, SOON)?;
        for count in 1..=4 {
            let client = outside.datagrams(F::FAMILY, 0, SOON)?;
            let from = SocketAddr::new(outside.ip(F::FAMILY), client.local_addr()?.port());
            let at_pod = Capture::on(pod.netns(), "eth0")?;
            // The second one belongs to a flow that is known.
            for payload in [&b"new"[..], b"known"] {
                let request = frame::<F>(from, to, Body::Udp).options(&fillers::<F>(count));
                send(scenario, &request.payload(payload), &[])?;
                let mut buffer = [0; 64];
                let (length, seen) = server.recv_from(&mut buffer)?;
                ensure!(&buffer[..length] == payload, "{count}: {:x?}", &buffer[..length]);
                server.send_to(b"an answer", seen)?;
                let (length, sender) = client.recv_from(&mut buffer)?;
                ensure!(&buffer[..length] == b"an answer" && sender == to, "{count}: {sender}");
            }
            let long = ETHERNET + if F::FAMILY == Family::V4 { 20 } else { 40 } + 8 * count;
            let payloads = came_in(&at_pod)?.into_iter().filter(|frame| {
                frame.bytes.get(long + 8..) == Some(b"new")
                    || frame.bytes.get(long + 8..) == Some(b"known")
            });
            ensure!(payloads.count() == 2, "{count}: the headers did not arrive as they were");
        }
    }
    Ok(())
}

/// A fifth extension header: the node's own stack gets the packet, and refuses it.
fn check_too_many(scenario: &Scenario) -> Result<()> {
    const UNREACHABLE: u8 = 1;
    let outside = scenario.cluster.outside();
    for (pod, _, number) in BACKENDS {
        let (pod, to) = (scenario.cluster.pod(pod), front(scenario, number, Family::V6));
        let (at_pod, wire) = (
            Capture::on(pod.netns(), "eth0")?,
            Capture::on(scenario.cluster.fabric().netns(), "node1")?,
        );
        let from = outside.at(Family::V6, 41_000);
        send(scenario, &frame::<Ipv6>(from, to, Body::Udp).options(&fillers::<Ipv6>(5)), &[])?;
        check_services::<Ipv6>(scenario)?;
        let is_refusal = |frame: &Captured| {
            frame.addresses() == Some([to.ip(), from.ip()])
                && frame.bytes[ETHERNET + 6] == 58
                && frame.bytes.get(ETHERNET + 40) == Some(&UNREACHABLE)
        };
        let refusals = came_in(&wire)?.iter().filter(|frame| is_refusal(frame)).count();
        ensure!(refusals == 1, "{refusals} refusals");
        let is_it = |frame: &Captured| frame.bytes.get(ETHERNET + 6) == Some(&60);
        ensure!(!came_in(&at_pod)?.iter().any(is_it), "it came to the backend");
    }
    Ok(())
}

/// Frames with the tag of a VLAN that the node has no part in are nobody's: no flow, and nothing
/// comes to a backend or goes out again.
fn check_tagged<F: Kind>(scenario: &mut Scenario) -> Result<()> {
    let before = scenario.agent(1)?.counted("flow_created")?;
    let wire = Capture::on(scenario.cluster.fabric().netns(), "node1")?;
    let mut expectations = Expectations::default();
    for (index, tag) in [&[0x81, 0, 0, 7][..], &[0x88, 0xa8, 0, 7]].into_iter().enumerate() {
        for (pod, number, _) in BACKENDS {
            for body in [Body::Tcp(SYN), Body::Udp] {
                let from = scenario.cluster.outside().at(F::FAMILY, 42_000 + index as u16);
                let to = front(scenario, number, F::FAMILY);
                let at_pod = Capture::on(scenario.cluster.pod(pod).netns(), "eth0")?;
                send(scenario, &frame::<F>(from, to, body.clone()), tag)?;
                // What was sent before has gone its way when this is answered.
                let probe =
                    Probe::udp(scenario.cluster.pod("b").at(F::FAMILY, TARGET)).timeout(SOON);
                ensure!(scenario.cluster.outside().ask(probe)?.name() == Some("b"), "no answer");
                let of_it = |frame: &&Captured| match frame.ends() {
                    Some((_, [(_, port), (_, to)])) => port == from.port() || to == from.port(),
                    None => false,
                };
                let came = came_in(&at_pod)?.iter().filter(of_it).count();
                expectations.is_true(format!("{pod} got {body:?} of {tag:x?}"), came == 0);
                let sent: Vec<_> =
                    came_in(&wire)?.into_iter().filter(|one| one.tag.is_some()).collect();
                expectations
                    .is_true(format!("{body:?} of {tag:x?} for {pod} goes out"), sent.is_empty());
            }
        }
    }
    let created = scenario.agent(1)?.counted("flow_created")? - before;
    expectations.is_true(format!("{created} flows"), created == 0);
    expectations.finish()
}

fn check_all(builder: Builder, xdp: &str) -> Result<()> {
    let mut scenario = start(builder, xdp)?;
    let own = scenario.cluster.node(1).ip(Family::V4);
    let mut expectations = Expectations::default();
    expectations.check(
        "martians, IPv4",
        check_martians::<Ipv4>(&scenario, &[Ipv4::martians(), vec![own]].concat()),
    );
    expectations.check("martians, IPv6", check_martians::<Ipv6>(&scenario, &Ipv6::martians()));
    let own = scenario.cluster.node(1).ip(Family::V6);
    expectations.check("the node's own, IPv6", check_martians::<Ipv6>(&scenario, &[own]));
    expectations
        .check("the node's own connections, IPv4", check_own_connections::<Ipv4>(&scenario));
    expectations
        .check("the node's own connections, IPv6", check_own_connections::<Ipv6>(&scenario));
    expectations.check("a pod, IPv4", check_pod::<Ipv4>(&scenario));
    expectations.check("a pod, IPv6", check_pod::<Ipv6>(&scenario));
    expectations.check("options", check_headers::<Ipv4>(&scenario));
    expectations.check("extension headers", check_headers::<Ipv6>(&scenario));
    expectations.check("more of them than are followed", check_too_many(&scenario));
    expectations.check("tags, IPv4", check_tagged::<Ipv4>(&mut scenario));
    expectations.check("tags, IPv6", check_tagged::<Ipv6>(&mut scenario));
    expectations.finish()
}

#[test]
fn strangers_to_tc() -> Result<()> {
    check_all(Cluster::builder(), "off")
}

#[test]
fn strangers_to_xdp_in_the_driver() -> Result<()> {
    check_all(Cluster::builder().no_tx_checksum_offload(), "native")
}

#[test]
fn strangers_to_xdp_in_the_stack() -> Result<()> {
    check_all(Cluster::builder().no_tx_checksum_offload(), "generic")
}

/// A switch that floods and a device that takes in every frame, as a packet capture on a node sets
/// it: only the node that has the frame's MAC address answers.
#[test]
fn frames_for_another_host_are_left_alone() -> Result<()> {
    for xdp in ["off", "native"] {
        let mut scenario = start(Cluster::builder().no_tx_checksum_offload(), xdp)?;
        scenario.cluster.fabric().route_external_to(1)?;
        scenario.cluster.fabric().netns().ip("link set br0 type bridge ageing_time 0")?;
        scenario.cluster.node(2).netns().ip("link set eth0 promisc on")?;
        let before = scenario.agent(2)?.counted("flow_created")?;
        let outside = scenario.cluster.outside();
        let mut expectations = Expectations::default();
        for round in 0..10 {
            for (pod, number, _) in BACKENDS {
                for (transport, family) in
                    TRANSPORTS.into_iter().flat_map(|one| Family::ALL.map(|family| (one, family)))
                {
                    let to = (balancer_ip(number).get(family), PORT).into();
                    let answer = outside.ask(Probe::new(transport, to).timeout(SOON))?;
                    let is_right = answer.name() == Some(pod);
                    expectations
                        .is_true(format!("{round}, {transport:?} {to}: {answer:?}"), is_right);
                }
            }
        }
        expectations.finish()?;
        let created = scenario.agent(2)?.counted("flow_created")? - before;
        ensure!(created == 0, "--xdp {xdp}: node 2 opened {created} flows");
    }
    Ok(())
}
