//! Direct server return and the size of packets: what goes to a backend's node has to leave
//! room for a tunnel, what comes from there has not.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::actors::host::{Host, Serve};
use lb_tests::harness::netns::topology::cluster::{Builder, Cluster};
use lb_tests::harness::netns::topology::plan::{Family, NODE_GATEWAY};
use lb_tests::harness::netns::traffic::capture::{Capture, Captured};
use lb_tests::harness::netns::traffic::offload;
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::frontends::Frontend;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario, TARGET};

/// The Services of the tests by number: echoes by a pod of node 1, by one of node 2 and by node
/// 2 itself; downloads and uploads by the pod on node 2.
const NEAR: u8 = 1;
const FAR: u8 = 2;
const HOST: u8 = 3;
const TRANSFERS: u8 = 4;
/// Where downloads and uploads are served.
const BULK: u16 = 9_000;

const SOON: Duration = Duration::from_secs(5);
/// How long a download may take.
const DOWNLOADED: Duration = Duration::from_secs(120);
/// The MTU of devices by default, and the longest frame that it allows.
const ORDINARY: u16 = 1500;
const ORDINARY_FRAME: usize = 1514;
/// What fewer let through: not much more than the least of IPv6, in a tunnel too.
const SMALL: u16 = 1340;

const FRONTENDS: [Frontend; 2] = [Frontend::NodePort(1), Frontend::Balancer];

fn start(builder: Builder, xdp: &str) -> Result<Scenario> {
    let fixed = ["--socket-lb", "off", "--external-mode", "dsr", "--xdp", xdp];
    let builder = builder.any_source().pod(1, "b").pod(2, "c");
    let mut scenario = Scenario::start(builder, &[&fixed[..], &SMALL_MAPS].concat())?;
    scenario.serve(&["b"])?;
    scenario.serve_these("c", &Serve::on(TARGET).bulk(BULK))?;
    scenario.serve_node(2)?;
    let host = scenario.node_endpoints(2);
    let (near, far) = (scenario.endpoints(&["b"]), scenario.endpoints(&["c"]));
    scenario.publish(&scenario.exposed("near", NEAR), &near)?;
    scenario.publish(&scenario.exposed("far", FAR), &far)?;
    scenario.publish(&scenario.exposed("host", HOST), &host)?;
    let transfers = scenario.empty_service("transfers", TRANSFERS).tcp(PORT, BULK);
    scenario.publish(&transfers.exposed(TRANSFERS), &far)?;
    scenario.cluster.fabric().route_external_to(1)?;
    Ok(scenario)
}

/// Bytes of a tunnel's header.
fn tunnel(family: Family) -> u16 {
    match family {
        Family::V4 => 20,
        Family::V6 => 40,
    }
}

/// Does `check` for these Services at both frontends, in both families.
fn each(
    scenario: &Scenario,
    expectations: &mut Expectations,
    numbers: &[u8],
    check: impl Fn(&Scenario, SocketAddr, u8) -> Result<()>,
) {
    for family in Family::ALL {
        for front in FRONTENDS {
            for number in numbers {
                let to = front.at(scenario, *number, family);
                expectations.check(to, check(scenario, to, *number));
            }
        }
    }
}

fn check_segments(scenario: &Scenario, to: SocketAddr, number: u8) -> Result<()> {
    let family = Family::of(to.ip());
    let headers = 20 + tunnel(family);
    let room = if number == NEAR { 0 } else { tunnel(family) };
    let capture = Capture::on(scenario.cluster.outside().netns(), "eth0")?;
    let answer = scenario.cluster.outside().tcp(to)?;
    ensure!(answer.reached().is_some(), "{answer:?}");
    let sizes: Vec<_> = capture.take()?.iter().filter_map(Captured::segment_size).collect();
    ensure!(sizes == [ORDINARY - headers - room], "segments of {sizes:?}");
    Ok(())
}

/// Level and name of options that set whether the kernel cuts a socket's packets, and tell the
/// MTU that it knows of the way.
fn mtu_options(to: SocketAddr) -> (libc::c_int, libc::c_int, libc::c_int) {
    match to {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_MTU),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_MTU),
    }
}

/// Has the kernel cut nothing that this socket sends.
fn forbid_fragments(socket: &impl AsFd, to: SocketAddr) -> Result<()> {
    let (level, option, _) = mtu_options(to);
    let value = libc::IP_PMTUDISC_DO;
    let (fd, length) = (socket.as_fd().as_raw_fd(), size_of_val(&value) as libc::socklen_t);
    // SAFETY: the kernel reads an int.
    let result = unsafe { libc::setsockopt(fd, level, option, (&raw const value).cast(), length) };
    ensure!(result == 0, "cannot forbid fragments: {}", std::io::Error::last_os_error());
    Ok(())
}

/// The MTU of the way to where a socket is connected to, as its kernel knows it.
fn known_mtu(socket: &impl AsFd, to: SocketAddr) -> Result<u16> {
    let (level, _, option) = mtu_options(to);
    let (fd, mut value) = (socket.as_fd().as_raw_fd(), 0);
    let mut length = size_of_val(&value) as libc::socklen_t;
    let place: *mut libc::c_int = &raw mut value;
    // SAFETY: the kernel writes an int.
    let result = unsafe { libc::getsockopt(fd, level, option, place.cast(), &raw mut length) };
    ensure!(result == 0, "no MTU: {}", std::io::Error::last_os_error());
    Ok(u16::try_from(value)?)
}

fn any(to: SocketAddr) -> IpAddr {
    match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Datagrams as large as a device lets through are refused by the node that would have to
/// tunnel them, and such as leave room get there; nothing is cut.
fn check_datagrams(scenario: &Scenario, to: SocketAddr) -> Result<()> {
    let family = Family::of(to.ip());
    let most = ORDINARY - tunnel(family);
    let headers = tunnel(family) + 8;
    let socket = scenario.cluster.outside().netns().run(|| {
        let socket = UdpSocket::bind((any(to), 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(SOON))?;
        Ok(socket)
    })?;
    forbid_fragments(&socket, to)?;
    let mut buffer = vec![0; 1 << 16];
    // The first opens the flow, the others belong to it.
    for length in [1000, ORDINARY, most, ORDINARY] {
        let payload = vec![b'x'; usize::from(length - headers)];
        let got = socket.send(&payload).and_then(|_| socket.recv(&mut buffer));
        if length > most {
            let error = got.err().context("too large, and yet answered")?;
            let is_told = error.raw_os_error() == Some(libc::EMSGSIZE);
            ensure!(is_told, "{length} bytes: {error}");
            let known = known_mtu(&socket, to)?;
            ensure!(known == most, "told of {known} bytes");
        } else {
            let got = got.with_context(|| format!("{length} bytes"))?;
            ensure!(buffer[..got].ends_with(&payload), "another answer");
        }
    }
    forget_mtus(scenario.cluster.outside(), family)
}

/// Datagrams that their sender has to cut: one error says that the fragments are too large.
fn check_fragments(scenario: &Scenario, to: SocketAddr) -> Result<()> {
    let payload = "fragment".repeat(1000);
    let outside = scenario.cluster.outside();
    let ask = || outside.ask(Probe::udp(to).payload(&payload).timeout(SOON));
    let first = ask()?;
    ensure!(first.error() == Some("EMSGSIZE"), "not told: {first:?}");
    for _ in 0..2 {
        let answer = ask()?;
        ensure!(answer.reached().is_some(), "{answer:?}");
    }
    forget_mtus(outside, Family::of(to.ip()))
}

/// Clears the path MTUs that a host has learned.
fn forget_mtus(host: &Host, family: Family) -> Result<()> {
    let number = if family == Family::V4 { 4 } else { 6 };
    let mut command = std::process::Command::new("ip");
    command.args([&format!("-{number}"), "route", "flush", "cache"]);
    host.output(command, SOON).map(drop)
}

/// Uploads and checks every byte.
fn upload(scenario: &Scenario, family: Family) -> Result<()> {
    const LENGTH: u64 = 10 << 20;
    for front in FRONTENDS {
        let to = front.at(scenario, TRANSFERS, family);
        let report = scenario.cluster.outside().upload(to, 1, LENGTH)?.finish(DOWNLOADED)?;
        println!("{to}: {report:?}");
        ensure!(report.ok == 1 && report.bytes == LENGTH, "{to}: {report:?}");
    }
    Ok(())
}

/// Of a client that is told: the size that it knows of the way at the end.
fn upload_and_ask(client: &Host, to: SocketAddr) -> Result<u16> {
    let mut stream = client.netns().run(|| Ok(TcpStream::connect_timeout(&to, SOON)?))?;
    stream.set_read_timeout(Some(SOON))?;
    let payload = vec![b'x'; 60_000];
    stream.write_all(&payload)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut said = Vec::new();
    stream.read_to_end(&mut said)?;
    ensure!(said.ends_with(&payload), "only {} bytes came back", said.len());
    known_mtu(&stream, to)
}

/// Uploads, of which the nodes between them let only small packets through: the client is told
/// how much fits beside the tunnel.
fn check_uploads(scenario: &mut Scenario, expectations: &mut Expectations) -> Result<()> {
    let before = scenario.agent(1)?.counted("too_big")?;
    let (node1, node2) = (scenario.cluster.node(1), scenario.cluster.node(2));
    for family in Family::ALL {
        let node2 = node2.ip(family);
        node1.netns().ip(&format!("route add {node2} dev eth0 mtu lock {SMALL}"))?;
        let expected = SMALL - tunnel(family);
        for front in FRONTENDS {
            let to = front.at(scenario, FAR, family);
            let known = upload_and_ask(scenario.cluster.outside(), to);
            let outcome = known.and_then(|known| {
                ensure!(known == expected, "told of {known} bytes");
                Ok(())
            });
            expectations.check(format!("{to}, little room between the nodes"), outcome);
        }
        expectations.check(format!("{family:?}"), upload(scenario, family));
        node1.netns().ip(&format!("route del {node2} dev eth0 mtu lock {SMALL}"))?;
        forget_mtus(scenario.cluster.outside(), family)?;
    }
    let told = scenario.agent(1)?.counted("too_big")? - before;
    expectations.is_true("too big at node 1", told > 0);
    Ok(())
}

/// Uploads, of which a router between the nodes lets only small packets through, as it tells the
/// node that tunnels them.
fn check_routed_uploads(scenario: &Scenario, expectations: &mut Expectations) -> Result<()> {
    let (node1, node2) = (scenario.cluster.node(1), scenario.cluster.node(2));
    let fabric = scenario.cluster.fabric().netns();
    for family in Family::ALL {
        let (node2, via) = (node2.ip(family), NODE_GATEWAY.get(family));
        let narrow = format!("{node2} dev br0 mtu lock {SMALL}");
        fabric.ip(&format!("route add {narrow}"))?;
        node1.netns().ip(&format!("route add {node2} via {via}"))?;
        for front in FRONTENDS {
            let to = front.at(scenario, FAR, family);
            let known = upload_and_ask(scenario.cluster.outside(), to);
            let outcome = known.and_then(|known| {
                ensure!(known == SMALL - tunnel(family), "told of {known} bytes");
                Ok(())
            });
            expectations.check(format!("{to}, a router between the nodes"), outcome);
        }
        expectations.check(format!("{family:?}"), upload(scenario, family));
        node1.netns().ip(&format!("route del {node2} via {via}"))?;
        fabric.ip(&format!("route del {narrow}"))?;
        forget_mtus(scenario.cluster.outside(), family)?;
    }
    Ok(())
}

/// Where the way back to the client lets only small packets through.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Narrow {
    /// On a router, which tells the frontend's node.
    BeforeTheClient,
    /// On the backend's node.
    AfterTheBackend,
}

/// A large download; whoever has to tell its sender of a small MTU can.
fn check_download(scenario: &mut Scenario, to: SocketAddr, narrow: Narrow) -> Result<()> {
    const LENGTH: u64 = 100 << 20;
    let before = scenario.agent(1)?.counted("icmp_translated")?;
    let report = scenario.cluster.outside().download(to, 1, LENGTH)?.finish(DOWNLOADED)?;
    println!("{narrow:?}, {to}: {report:?}");
    ensure!(report.ok == 1 && report.bytes == LENGTH, "{report:?}");
    let tunnelled = scenario.agent(1)?.counted("icmp_translated")? - before;
    let is_told = narrow == Narrow::BeforeTheClient;
    ensure!((tunnelled > 0) == is_told, "{tunnelled} errors came by node 1");
    forget_mtus(&scenario.cluster.pod("c"), Family::of(to.ip()))
}

fn check_downloads(scenario: &mut Scenario, expectations: &mut Expectations) -> Result<()> {
    let node2 = scenario.cluster.node(2);
    for family in Family::ALL {
        let client = scenario.cluster.outside().ip(family);
        for narrow in [Narrow::BeforeTheClient, Narrow::AfterTheBackend] {
            let route = match narrow {
                Narrow::BeforeTheClient => format!("{client} dev outside mtu lock {SMALL}"),
                Narrow::AfterTheBackend => {
                    format!("{client} via {} mtu lock {SMALL}", NODE_GATEWAY.get(family))
                }
            };
            let change = |scenario: &Scenario, how: &str| match narrow {
                Narrow::BeforeTheClient => {
                    scenario.cluster.fabric().netns().ip(&format!("route {how} {route}"))
                }
                Narrow::AfterTheBackend => node2.netns().ip(&format!("route {how} {route}")),
            };
            change(scenario, "add")?;
            for front in FRONTENDS {
                let to = front.at(scenario, TRANSFERS, family);
                expectations
                    .check(format!("{to}, {narrow:?}"), check_download(scenario, to, narrow));
            }
            change(scenario, "del")?;
        }
    }
    Ok(())
}

fn check(builder: Builder, xdp: &str) -> Result<()> {
    let mut scenario = start(builder, xdp)?;
    let mut expectations = Expectations::default();
    each(&scenario, &mut expectations, &[NEAR, FAR, HOST], check_segments);
    each(&scenario, &mut expectations, &[FAR, HOST], |scenario, to, _| {
        check_datagrams(scenario, to)
    });
    each(&scenario, &mut expectations, &[FAR, HOST], |scenario, to, _| {
        check_fragments(scenario, to)
    });
    check_uploads(&mut scenario, &mut expectations)?;
    check_downloads(&mut scenario, &mut expectations)?;
    check_routed_uploads(&scenario, &mut expectations)?;
    expectations.finish()
}

#[test]
fn sizes_by_tc() -> Result<()> {
    check(Cluster::builder(), "off")
}

#[test]
fn sizes_by_xdp_in_the_driver() -> Result<()> {
    check(Cluster::builder().no_tx_checksum_offload(), "native")
}

#[test]
fn sizes_by_xdp_in_the_stack() -> Result<()> {
    check(Cluster::builder().no_tx_checksum_offload(), "generic")
}

/// How many packets of several segments came to node 1, left it for node 2 in tunnels and came
/// there, during an upload. All checksums are right that the backend gets to see.
fn several_segments(scenario: &Scenario, family: Family) -> Result<[usize; 3]> {
    let (node1, node2) = (scenario.cluster.node(1), scenario.cluster.node(2));
    let tunnel = Some([&node1, &node2].map(|node| node.ip(family)));
    let pod = Capture::on(node2.netns(), scenario.cluster.pod("c").host_device())?;
    let captures = [Capture::on(node1.netns(), "eth0")?, Capture::on(node2.netns(), "eth0")?];
    upload(scenario, family)?;
    let [at_node1, at_node2] = captures.map(|capture| capture.take());
    let (at_node1, at_node2) = (at_node1?, at_node2?);
    let count = |frames: &[Captured], is_outgoing, is_encapsulated| {
        let passed = frames.iter().filter(|frame| frame.is_outgoing == is_outgoing);
        let passed = passed.filter(|frame| (frame.addresses() == tunnel) == is_encapsulated);
        passed.filter(|frame| frame.bytes.len() > ORDINARY_FRAME && frame.segment != 0).count()
    };
    for frame in pod.take()?.iter().filter(|frame| frame.ends().is_some()) {
        frame.check()?;
    }
    let at_node2 = count(&at_node2, false, true);
    Ok([count(&at_node1, false, false), count(&at_node1, true, true), at_node2])
}

/// Packets of several segments, as the sender made them and as nodes merged them, are put into
/// tunnels and taken out of them whole, whether devices cut them or the kernel does before.
#[test]
fn segments_go_through_the_tunnel_as_one_packet() -> Result<()> {
    const MADE: [bool; 3] = [true, true, true];
    const MADE_AND_CUT: [bool; 3] = [true, false, false];
    const MERGED_AND_CUT: [bool; 3] = [true, false, true];
    for expected in [MADE, MADE_AND_CUT, MERGED_AND_CUT] {
        let builder = Cluster::builder().any_source();
        let is_merged = expected == MERGED_AND_CUT;
        let builder = if is_merged { builder.no_tx_checksum_offload() } else { builder };
        let scenario = start(builder, "off")?;
        for node in scenario.cluster.nodes() {
            if is_merged {
                offload::merge(node.netns(), "eth0")?;
            } else if expected == MADE_AND_CUT {
                offload::finish_before(node.netns(), "eth0")?;
            }
        }
        for family in Family::ALL {
            let several = several_segments(&scenario, family)?;
            println!("{family:?}: {several:?}");
            ensure!(several.map(|count| count > 0) == expected, "{family:?}: {several:?}");
        }
    }
    Ok(())
}
