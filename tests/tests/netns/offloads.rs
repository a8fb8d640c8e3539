//! Packets of which devices are to do a part of the work: checksums that are not finished,
//! several segments in one, frames of 9000 bytes. Clients outside, through a node port, to a
//! backend of the node and of another one.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::agent;
use lb_tests::harness::netns::actors::host::{Host, Serve};
use lb_tests::harness::netns::topology::cluster::{Builder, Cluster};
use lb_tests::harness::netns::topology::plan::{Family, node_port};
use lb_tests::harness::netns::traffic::capture::{Capture, Captured, Checksum};
use lb_tests::harness::netns::traffic::offload;
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario, TARGET};
use lb_tests::harness::wait::eventually;
use nix::sys::socket::{setsockopt, sockopt};

const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Udp];
/// Where downloads are served, and where a test serves itself.
const BULK: u16 = 9_000;
const OWN: u16 = 9_001;
const SOON: Duration = Duration::from_secs(5);
/// The longest frame of devices that nobody has changed.
const ORDINARY: usize = 1514;

/// A pod that serves, and what the numbers of its Services start from: echo, downloads, and
/// the test's own.
type Backend = (&'static str, u8);
const NEAR: Backend = ("b", 1);
const FAR: Backend = ("c", 11);
const BACKENDS: [Backend; 2] = [NEAR, FAR];
const DOWNLOADS: u8 = 1;
const THE_TESTS: u8 = 2;

fn start(builder: Builder, xdp: &str) -> Result<Scenario> {
    let arguments = [&["--socket-lb", "off", "--xdp", xdp][..], &SMALL_MAPS].concat();
    let mut scenario = Scenario::start(builder.pod(1, "b").pod(2, "c"), &arguments)?;
    for (pod, first) in BACKENDS {
        scenario.serve_these(pod, &Serve::on(TARGET).bulk(BULK))?;
        let endpoints = scenario.endpoints(&[pod]);
        scenario.publish(&scenario.exposed(pod, first), &endpoints)?;
        let number = first + DOWNLOADS;
        let downloads = scenario.empty_service(&format!("{pod}-downloads"), number).tcp(PORT, BULK);
        scenario.publish(&downloads.exposed(number), &endpoints)?;
        let number = first + THE_TESTS;
        let own = scenario.empty_service(&format!("{pod}-own"), number).udp(PORT, OWN);
        scenario.publish(&own.exposed(number), &endpoints)?;
    }
    Ok(scenario)
}

/// The ways of `--xdp` to take packets, with a network that each of them is right for.
fn taken() -> [(&'static str, Builder); 3] {
    let finished = || Cluster::builder().no_tx_checksum_offload();
    [("off", Cluster::builder()), ("native", finished()), ("generic", finished())]
}

/// The node port of a Service.
fn front(scenario: &Scenario, number: u8, family: Family) -> SocketAddr {
    scenario.cluster.node(1).at(family, node_port(number))
}

/// Both devices of node 1 that packets to and from a backend pass.
fn captures(scenario: &Scenario, (pod, _): Backend) -> Result<Vec<Capture>> {
    let node = scenario.cluster.node(1);
    let mut captures = vec![Capture::on(node.netns(), "eth0")?];
    if pod == NEAR.0 {
        captures.push(Capture::on(node.netns(), scenario.cluster.pod(pod).host_device())?);
    }
    Ok(captures)
}

/// The uplinks of hosts.
fn captures_at(hosts: &[&Host]) -> Result<Vec<Capture>> {
    hosts.iter().map(|host| Capture::on(host.netns(), "eth0")).collect()
}

/// What a packet of a flow is: a request as it comes and as it goes on, a reply as it comes
/// and as it goes on.
const LEGS: [&str; 4] = ["request", "request, translated", "reply", "reply, translated"];

/// Which of [`LEGS`] a frame is.
fn leg(frame: &Captured, front: SocketAddr, backend: SocketAddr) -> Option<usize> {
    let (_, [source, destination]) = frame.ends()?;
    let [front, backend] = [front, backend].map(|end| (end.ip(), end.port()));
    let found = [destination == front, destination == backend, source == backend, source == front];
    found.iter().position(|is_it| *is_it)
}

/// Everything that was captured.
fn seen(captures: &[Capture]) -> Result<Vec<Captured>> {
    let frames: Result<Vec<_>> = captures.iter().map(Capture::take).collect();
    Ok(frames?.into_iter().flatten().collect())
}

/// All checksums are right, and each of these legs has a frame that `is_met` likes.
fn check_legs(
    frames: &[Captured],
    (front, backend): (SocketAddr, SocketAddr),
    legs: &[usize],
    is_met: impl Fn(&Captured) -> bool,
) -> Result<()> {
    let mut met = [0; LEGS.len()];
    for frame in frames {
        if let Some(leg) = leg(frame, front, backend) {
            frame.check().context(LEGS[leg])?;
            met[leg] += usize::from(is_met(frame));
        }
    }
    for leg in legs {
        ensure!(met[*leg] > 0, "{front}: no such {}: {met:?}", LEGS[*leg]);
    }
    Ok(())
}

const ALL: [usize; 4] = [0, 1, 2, 3];

/// Echoes of every parity of length.
fn echo(client: &Host, transport: Transport, to: SocketAddr) -> Result<()> {
    for payload in ["o", "even", &"odd".repeat(333), &"even".repeat(250)] {
        let answer = client.ask(Probe::new(transport, to).payload(payload).timeout(SOON))?;
        ensure!(answer.reached().is_some(), "{answer:?}");
    }
    Ok(())
}

#[test]
fn checksums_that_a_device_is_to_finish_come_out_right() -> Result<()> {
    let scenario = start(Cluster::builder(), "off")?;
    let outside = scenario.cluster.outside();
    for is_finished_between in [false, true] {
        if is_finished_between {
            for port in ["node1", "node2", "outside"] {
                offload::finish_before(scenario.cluster.fabric().netns(), port)?;
            }
        }
        let mut expectations = Expectations::default();
        for (family, backend, transport) in kinds() {
            let to = front(&scenario, backend.1, family);
            let pod = scenario.cluster.pod(backend.0);
            let ends = (to, pod.at(family, TARGET));
            let on_node = captures(&scenario, backend)?;
            let at_ends = captures_at(&[outside, &pod])?;
            expectations.check(format!("{to} {transport:?}"), echo(outside, transport, to));
            let (on_node, at_ends) = (seen(&on_node)?, seen(&at_ends)?);
            let is_unfinished = |frame: &Captured| frame.checksum == Checksum::Unfinished;
            let is_finished = |frame: &Captured| !frame.is_outgoing && !is_unfinished(frame);
            let outcome = if is_finished_between {
                check_legs(&at_ends, ends, &[1, 3], is_finished)
                    .and_then(|()| check_legs(&on_node, ends, &[0], is_finished))
            } else {
                check_legs(&on_node, ends, &ALL, is_unfinished)
                    .and_then(|()| check_legs(&at_ends, ends, &ALL, is_unfinished))
            };
            expectations
                .check(format!("{to} {transport:?}, finished {is_finished_between}"), outcome);
        }
        expectations.finish()?;
    }
    Ok(())
}

fn kinds() -> impl Iterator<Item = (Family, Backend, Transport)> {
    let backends = Family::ALL.into_iter().flat_map(|family| BACKENDS.map(|one| (family, one)));
    backends.flat_map(|(family, backend)| TRANSPORTS.map(|transport| (family, backend, transport)))
}

/// Has a socket send datagrams without checksum.
fn leave_out_checksums(socket: &UdpSocket) -> Result<()> {
    let on: libc::c_int = 1;
    let length = size_of_val(&on) as libc::socklen_t;
    let (fd, level, option) = (socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_NO_CHECK);
    // SAFETY: the kernel reads an int.
    let result = unsafe { libc::setsockopt(fd, level, option, (&raw const on).cast(), length) };
    ensure!(result == 0, "no SO_NO_CHECK: {}", std::io::Error::last_os_error());
    Ok(())
}

#[test]
fn a_datagram_without_checksum_gets_none() -> Result<()> {
    for (xdp, builder) in taken() {
        let scenario = start(builder, xdp)?;
        for backend in BACKENDS {
            let to = front(&scenario, backend.1 + THE_TESTS, Family::V4);
            let (outside, pod) = (scenario.cluster.outside(), scenario.cluster.pod(backend.0));
            let client = outside.datagrams(Family::V4, 0, SOON)?;
            let server = pod.datagrams(Family::V4, OWN, SOON)?;
            [&client, &server].into_iter().try_for_each(leave_out_checksums)?;
            let captures = captures_at(&[outside, &pod])?;
            for question in [&b"odd"[..], b"even"] {
                client.send_to(question, to)?;
                let mut buffer = [0; 16];
                let (length, from) = server.recv_from(&mut buffer)?;
                ensure!(&buffer[..length] == question, "--xdp {xdp}: {:x?}", &buffer[..length]);
                server.send_to(b"an answer", from)?;
                let (length, from) = client.recv_from(&mut buffer)?;
                ensure!(&buffer[..length] == b"an answer" && from == to, "--xdp {xdp}: {from}");
            }
            let ends = (to, pod.at(Family::V4, OWN));
            let is_without = |frame: &Captured| frame.checksum_field() == Some(0);
            let frames = seen(&captures)?;
            check_legs(&frames, ends, &ALL, is_without).with_context(|| format!("--xdp {xdp}"))?;
            let others = frames.iter().filter(|frame| !is_without(frame));
            let others = others.filter_map(|frame| leg(frame, ends.0, ends.1)).count();
            ensure!(others == 0, "--xdp {xdp}, {to}: {others} got a checksum");
        }
    }
    Ok(())
}

/// Sends and gets more than many windows.
fn transfer(scenario: &Scenario, backend: Backend, family: Family) -> Result<()> {
    const LENGTH: u64 = 4 << 20;
    let outside = scenario.cluster.outside();
    let payload = "0123456789abcde".repeat(100_000);
    let probe = Probe::tcp(front(scenario, backend.1, family)).payload(payload).timeout(SOON);
    let answer = outside.ask(probe)?;
    ensure!(answer.reached().is_some(), "up: {answer:?}");
    let to = front(scenario, backend.1 + DOWNLOADS, family);
    let report = outside.download(to, 1, LENGTH)?.finish(SOON)?;
    ensure!(report.ok == 1 && report.bytes == LENGTH, "down: {report:?}");
    Ok(())
}

/// Transfers, with right checksums where it is captured and frames among them on every leg of much that
/// `is_met` likes.
fn check_transfer(
    scenario: &Scenario,
    captures: &[Capture],
    backend: Backend,
    family: Family,
    is_met: impl Fn(&Captured) -> bool,
) -> Result<()> {
    transfer(scenario, backend, family)?;
    let (frames, pod) = (seen(captures)?, scenario.cluster.pod(backend.0));
    let up = (front(scenario, backend.1, family), pod.at(family, TARGET));
    let down = (front(scenario, backend.1 + DOWNLOADS, family), pod.at(family, BULK));
    check_legs(&frames, up, &ALL, &is_met)?;
    check_legs(&frames, down, &ALL[2..], &is_met)
}

fn each(check: impl Fn(Backend, Family) -> Result<()>) -> Result<()> {
    let mut expectations = Expectations::default();
    for backend in BACKENDS {
        for family in Family::ALL {
            expectations.check(format!("{} {family:?}", backend.0), check(backend, family));
        }
    }
    expectations.finish()
}

/// Several segments in one, as the sender made them and as the node merged them.
#[test]
fn segments_cross_as_one_packet() -> Result<()> {
    let is_several = |frame: &Captured| frame.bytes.len() > ORDINARY && frame.segment != 0;
    let scenario = start(Cluster::builder(), "off")?;
    each(|backend, family| {
        let captures = captures(&scenario, backend)?;
        check_transfer(&scenario, &captures, backend, family, is_several)
    })
    .context("made")?;
    let scenario = start(Cluster::builder().no_tx_checksum_offload(), "off")?;
    let (node, fabric) = (scenario.cluster.node(1), scenario.cluster.fabric().netns());
    offload::merge(node.netns(), "eth0")?;
    offload::merge(node.netns(), scenario.cluster.pod("b").host_device())?;
    let wire = Capture::on(fabric, "node1")?;
    each(|backend, family| {
        let captures = captures(&scenario, backend)?;
        transfer(&scenario, backend, family)?;
        let (frames, pod) = (seen(&captures)?, scenario.cluster.pod(backend.0));
        let up = (front(&scenario, backend.1, family), pod.at(family, TARGET));
        let down = (front(&scenario, backend.1 + DOWNLOADS, family), pod.at(family, BULK));
        check_legs(&frames, up, &ALL[..1], is_several)?;
        check_legs(&frames, down, &ALL[2..3], is_several)?;
        let sent = wire.take()?;
        let longest = sent.iter().filter(|frame| frame.is_outgoing).map(|frame| frame.bytes.len());
        let longest = longest.max().unwrap_or_default();
        ensure!(longest <= ORDINARY, "{longest} bytes came in at once");
        Ok(())
    })
    .context("merged")
}

/// Several datagrams in one (UDP_SEGMENT), both ways.
#[test]
fn datagrams_cross_as_one_packet() -> Result<()> {
    const COUNT: usize = 20;
    const LENGTH: u16 = 1000;
    let scenario = start(Cluster::builder(), "off")?;
    each(|backend, family| {
        let to = front(&scenario, backend.1 + THE_TESTS, family);
        let pod = scenario.cluster.pod(backend.0);
        let client = scenario.cluster.outside().datagrams(family, 0, SOON)?;
        let server = pod.datagrams(family, OWN, SOON)?;
        for socket in [&client, &server] {
            setsockopt(socket, sockopt::UdpGsoSegment, &LENGTH.into())?;
        }
        let captures = captures(&scenario, backend)?;
        let hear = |socket: &UdpSocket, expected: &[Vec<u8>]| -> Result<SocketAddr> {
            let mut buffer = [0; 2 * LENGTH as usize];
            let (mut heard, mut sender) = (Vec::new(), None);
            for _ in 0..COUNT {
                let (length, from) = socket.recv_from(&mut buffer)?;
                heard.push(buffer[..length].to_vec());
                sender = Some(from);
            }
            heard.sort();
            ensure!(heard == expected, "other datagrams than were sent");
            sender.context("nobody")
        };
        let all = |what: u8| -> Vec<Vec<u8>> {
            let one = |number| [&[number as u8, what], &[what; LENGTH as usize - 2][..]].concat();
            (0..COUNT).map(one).collect()
        };
        client.send_to(&all(b'?').concat(), to)?;
        let from = hear(&server, &all(b'?'))?;
        server.send_to(&all(b'!').concat(), from)?;
        ensure!(hear(&client, &all(b'!'))? == to, "the answer is from somebody else");
        let ends = (to, pod.at(family, OWN));
        let is_several = |frame: &Captured| frame.segment == LENGTH;
        check_legs(&seen(&captures)?, ends, &ALL, is_several)
    })
}

/// Gives every device between the client and the backends another MTU.
fn widen(scenario: &Scenario, mtu: u16) -> Result<()> {
    let cluster = &scenario.cluster;
    offload::set_mtu(cluster.fabric().netns(), &["node1", "node2", "outside", "br0"], mtu)?;
    offload::set_mtu(cluster.outside().netns(), &["eth0"], mtu)?;
    for (node, pod) in [(1, "b"), (2, "c")] {
        let (node, pod) = (cluster.node(node), cluster.pod(pod));
        offload::set_mtu(node.netns(), &["eth0", pod.host_device()], mtu)?;
        offload::set_mtu(pod.netns(), &["eth0"], mtu)?;
    }
    Ok(())
}

/// A datagram as large as the MTU lets through, both ways and in one piece.
fn check_datagram(
    scenario: &Scenario,
    captures: &[Capture],
    backend: Backend,
    family: Family,
    mtu: u16,
) -> Result<()> {
    // The server's answer has a greeting besides.
    const GREETING: u16 = 400;
    let payload = "0123456789".repeat(usize::from(mtu - GREETING) / 10);
    let to = front(scenario, backend.1, family);
    let answer = scenario.cluster.outside().ask(Probe::udp(to).payload(&payload).timeout(SOON))?;
    ensure!(answer.reached().is_some(), "{answer:?}");
    let ends = (to, scenario.cluster.pod(backend.0).at(family, TARGET));
    let is_whole = |frame: &Captured| frame.bytes.len() > payload.len() && frame.segment == 0;
    check_legs(&seen(captures)?, ends, &ALL, is_whole)
}

/// How often XDP of node 1 ended with a request that it took.
fn taken_by_xdp(scenario: &Scenario) -> Result<u64> {
    let counters = agent::get(&scenario.cluster.node(1), "counters")?;
    let rows = counters.as_array().context("no list of counters")?;
    let row = rows.iter().find(|row| row["hook"] == "xdp_device" && row["reason"] == "request");
    Ok(row.and_then(|row| row["count"].as_u64()).unwrap_or(0))
}

/// A device whose frames XDP has no room for is left to tc, which says so.
#[test]
fn frames_of_9000_bytes_cross() -> Result<()> {
    const REFUSED: &str = "tc: its driver rejects XDP, for example because of a large MTU";
    let offloads = || Cluster::builder();
    let finished = || Cluster::builder().no_tx_checksum_offload();
    for (builder, xdp, mtu, said) in [
        (offloads(), "off", 9000, "tc: --xdp off"),
        (finished(), "native", 9000, REFUSED),
        (finished(), "native", 3400, "XDP in the driver"),
        (finished(), "generic", 9000, "XDP in the stack"),
    ] {
        let mut scenario = start(builder, "off")?;
        widen(&scenario, mtu)?;
        scenario.take_agent(1)?.terminate()?;
        scenario.set_arguments(&[&["--socket-lb", "off", "--xdp", xdp][..], &SMALL_MAPS].concat());
        scenario.start_agent(1)?;
        let agent = scenario.agent(1)?;
        eventually(|| {
            let log = agent.process().stderr();
            let level = if said == REFUSED { "WARN" } else { "INFO" };
            let words = [level, "eth0", "packets are handled by", said];
            let is_said = |line: &str| words.iter().all(|word| line.contains(word));
            ensure!(log.lines().any(is_said), "no {words:?} in\n{log}");
            Ok(())
        })?;
        let what = || format!("--xdp {xdp}, MTU {mtu}");
        let is_long = |frame: &Captured| {
            let length = if frame.segment == 0 { frame.bytes.len() } else { frame.segment.into() };
            length > usize::from(mtu) - 200
        };
        each(|backend, family| {
            let captures =
                captures_at(&[scenario.cluster.outside(), &scenario.cluster.pod(backend.0)])?;
            check_transfer(&scenario, &captures, backend, family, is_long)?;
            check_datagram(&scenario, &captures, backend, family, mtu)
        })
        .with_context(what)?;
        let is_taken = taken_by_xdp(&scenario)? > 0;
        ensure!(is_taken == said.starts_with("XDP"), "{}: taken by XDP: {is_taken}", what());
    }
    Ok(())
}
