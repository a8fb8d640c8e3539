//! ICMP errors, a smaller MTU on the way and IP fragments through Services, as real sockets
//! see them.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::host::{Host, Serve};
use lb_tests::harness::netns::topology::cluster::{Builder, Cluster};
use lb_tests::harness::netns::topology::plan::{Family, balancer_ip, cidr, cluster_ip};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario};
use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt,
};

/// The Services of the tests by number: served on node 1 and on node 2, and by pods there
/// where nobody listens.
const NEAR: u8 = 1;
const FAR: u8 = 2;
const CLOSED_NEAR: u8 = 3;
const CLOSED_FAR: u8 = 4;
/// A server of downloads on node 2, and its port there.
const DOWNLOADS: u8 = 5;
const BULK: u16 = 9_000;
/// The length of a download.
const LENGTH: u64 = 100 << 20;

/// How long an answer, or an error, may take.
const SOON: Duration = Duration::from_secs(5);
/// How long a download may take.
const DOWNLOADED: Duration = Duration::from_secs(120);
/// Smaller than any other MTU here, and as much as IPv6 needs.
const SMALL: u16 = 1300;

fn node_port(number: u8) -> u16 {
    30_000 + u16::from(number)
}

/// How node 1 takes packets, as `--xdp` says it.
const TAKEN: [&str; 3] = ["off", "native", "generic"];

fn start() -> Result<Scenario> {
    start_with(Cluster::builder(), "off")
}

/// XDP on veths needs checksums that are finished.
fn start_taken(xdp: &str) -> Result<Scenario> {
    let builder = Cluster::builder();
    start_with(if xdp == "off" { builder } else { builder.no_tx_checksum_offload() }, xdp)
}

fn start_with(builder: Builder, xdp: &str) -> Result<Scenario> {
    let builder = builder.pod(1, "a").pod(1, "b").pod(1, "closed1").pod(2, "c").pod(2, "closed2");
    let cluster = cidr::cluster();
    let arguments = ["--socket-lb", "off", "--cluster-cidr", &cluster, "--xdp", xdp];
    let mut scenario = Scenario::start(builder, &[&arguments[..], &SMALL_MAPS].concat())?;
    scenario.serve(&["b", "c"])?;
    scenario.serve_these("c", &Serve::default().bulk(BULK))?;
    let downloads = scenario.empty_service("downloads", DOWNLOADS).tcp(PORT, BULK);
    scenario.publish(&downloads.exposed(DOWNLOADS), &scenario.endpoints(&["c"]))?;
    for (name, number, pod) in [
        ("near", NEAR, "b"),
        ("far", FAR, "c"),
        ("closed-near", CLOSED_NEAR, "closed1"),
        ("closed-far", CLOSED_FAR, "closed2"),
    ] {
        let service = scenario.service(name, number);
        let service = service.node_port(node_port(number)).balancer(balancer_ip(number));
        scenario.publish(&service, &scenario.endpoints(&[pod]))?;
    }
    scenario.cluster.fabric().route_external_to(1)?;
    Ok(scenario)
}

/// Does `try_one` for every client and every front end that it has of these Services, in both
/// families.
fn try_all(
    scenario: &Scenario,
    expectations: &mut Expectations,
    numbers: &[u8],
    try_one: impl Fn(&Host, SocketAddr) -> Result<()>,
) {
    let (pod, node, outside) =
        (scenario.cluster.pod("a"), scenario.cluster.node(1), scenario.cluster.outside());
    for family in Family::ALL {
        for &number in numbers {
            let inside: SocketAddr = (cluster_ip(number).get(family), PORT).into();
            let port = node.at(family, node_port(number));
            let balancer: SocketAddr = (balancer_ip(number).get(family), PORT).into();
            for (client, to) in
                [(&**pod, inside), (&**node, inside), (outside, port), (outside, balancer)]
            {
                expectations.check(format!("{} -> {to}", client.name()), try_one(client, to));
            }
        }
    }
}

#[test]
fn a_datagram_to_a_closed_port_is_refused() -> Result<()> {
    let scenario = start()?;
    let mut expectations = Expectations::default();
    try_all(&scenario, &mut expectations, &[CLOSED_NEAR, CLOSED_FAR], |client, to| {
        let answer = client.ask(Probe::udp(to).connected().timeout(SOON))?;
        ensure!(answer.error() == Some("ECONNREFUSED"), "{answer:?}");
        Ok(())
    });
    expectations.finish()
}

#[test]
fn datagrams_in_fragments_come_and_go() -> Result<()> {
    let scenario = start()?;
    let mut expectations = Expectations::default();
    let payload = "fragment".repeat(1000);
    try_all(&scenario, &mut expectations, &[NEAR, FAR], |client, to| {
        let answer = client.ask(Probe::udp(to).payload(&payload).timeout(SOON))?;
        ensure!(answer.reached().is_some(), "{answer:?}");
        Ok(())
    });
    expectations.finish()
}

/// Sends and receives more than a window over TCP.
fn transfer(client: &Host, to: SocketAddr) -> Result<()> {
    let payload = "0123456789".repeat(6_000);
    let answer = client.ask(Probe::new(Transport::Tcp, to).payload(payload).timeout(SOON))?;
    ensure!(answer.reached().is_some(), "{answer:?}");
    Ok(())
}

/// Downloads through node 1 from a backend on node 2, in both families, and checks every byte.
fn download(scenario: &Scenario) -> Result<()> {
    for family in Family::ALL {
        let to = scenario.cluster.node(1).at(family, node_port(DOWNLOADS));
        let report = scenario.cluster.outside().download(to, 1, LENGTH)?.finish(DOWNLOADED)?;
        println!("{to}: {report:?}");
        ensure!(report.ok == 1 && report.bytes == LENGTH, "{to}: {report:?}");
    }
    Ok(())
}

/// How often a program of node 1 ended for this reason.
fn counted(scenario: &mut Scenario, hook: &str, reason: &str) -> Result<u64> {
    let counters = scenario.agent(1)?.get("counters")?;
    let row = counters
        .as_array()
        .into_iter()
        .flatten()
        .find(|row| row["hook"] == hook && row["reason"] == reason);
    Ok(row.and_then(|row| row["count"].as_u64()).unwrap_or(0))
}

/// Packets of every size, and large ones that a device is to cut (GSO).
#[test]
fn transfers_get_through_a_small_mtu_before_the_backend() -> Result<()> {
    for builder in [Cluster::builder(), Cluster::builder().no_tx_checksum_offload()] {
        let mut scenario = start_with(builder, "off")?;
        let (node1, node2) = (scenario.cluster.node(1), scenario.cluster.node(2));
        for (family, pods) in Family::ALL.into_iter().zip(node2.pod_cidrs()) {
            let via = node2.ip(family);
            node1.netns().ip(&format!("route replace {pods} via {via} mtu lock {SMALL}"))?;
        }
        let mut expectations = Expectations::default();
        try_all(&scenario, &mut expectations, &[FAR], transfer);
        for hook in ["from_device", "to_device"] {
            expectations.is_true(
                format!("too big at {hook}"),
                counted(&mut scenario, hook, "too_big")? > 0,
            );
        }
        expectations.finish()?;
    }
    Ok(())
}

/// Transfers and downloads by clients, of which `narrow` lets only small packets through.
fn check_narrow(narrow: impl Fn(&Scenario, Family) -> Result<()>) -> Result<()> {
    for xdp in TAKEN {
        let mut scenario = start_taken(xdp)?;
        for family in Family::ALL {
            narrow(&scenario, family)?;
        }
        download(&scenario).with_context(|| format!("--xdp {xdp}"))?;
        if xdp == "off" {
            let mut expectations = Expectations::default();
            try_all(&scenario, &mut expectations, &[NEAR, FAR], transfer);
            expectations.finish()?;
        } else {
            // tc has the replies where the way that XDP would have to remember is the narrow one.
            let requests = counted(&mut scenario, "xdp_device", "request")?;
            ensure!(requests > 0, "--xdp {xdp}: none by XDP");
        }
    }
    Ok(())
}

#[test]
fn transfers_get_through_a_small_mtu_before_the_client() -> Result<()> {
    check_narrow(|scenario, family| {
        let client = scenario.cluster.outside().ip(family);
        let route = format!("route replace {client} dev outside mtu lock {SMALL}");
        scenario.cluster.fabric().netns().ip(&route)
    })
}

#[test]
fn transfers_get_through_a_small_mtu_after_the_node_that_answers() -> Result<()> {
    check_narrow(|scenario, family| {
        let client = scenario.cluster.outside().ip(family);
        let via = lb_tests::harness::netns::topology::plan::NODE_GATEWAY.get(family);
        let route = format!("route replace {client} via {via} mtu lock {SMALL}");
        scenario.cluster.node(1).netns().ip(&route)
    })
}

/// The router that a datagram with so many hops ends at, as its sender is told.
fn end_of_hops(client: &Host, to: SocketAddr, hops: u8) -> Result<IpAddr> {
    client.netns().run(|| {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(SOON))?;
        if to.is_ipv4() {
            setsockopt(&socket, sockopt::Ipv4Ttl, &hops.into())?;
            setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv6Ttl, &hops.into())?;
            setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
        }
        socket.send(b"how far")?;
        let error = socket.recv(&mut [0; 64]).err().context("somebody answered")?;
        let is_told = error.raw_os_error() == Some(Errno::EHOSTUNREACH as i32);
        ensure!(is_told, "no time exceeded: {error}");
        let mut space = cmsg_space!([u8; 128]);
        let mut part = [0; 64];
        let mut parts = [std::io::IoSliceMut::new(&mut part)];
        let message = recvmsg::<SockaddrStorage>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_ERRQUEUE,
        )?;
        let reporter = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::Ipv4RecvErr(_, Some(from)) => {
                Some(IpAddr::from(u32::from_be(from.sin_addr.s_addr).to_be_bytes()))
            }
            ControlMessageOwned::Ipv6RecvErr(_, Some(from)) => {
                Some(IpAddr::from(from.sin6_addr.s6_addr))
            }
            _ => None,
        });
        reporter.context("the error does not say whose it is")
    })
}

#[test]
fn a_client_is_told_where_its_hops_end() -> Result<()> {
    let scenario = start()?;
    let (node1, node2) = (scenario.cluster.node(1), scenario.cluster.node(2));
    let mut expectations = Expectations::default();
    for family in Family::ALL {
        let inside: SocketAddr = (cluster_ip(FAR).get(family), PORT).into();
        let port = node1.at(family, node_port(FAR));
        let near = node1.at(family, node_port(NEAR));
        let pod = scenario.cluster.pod("a");
        let cases: [(&Host, SocketAddr, u8, IpAddr); 5] = [
            (&pod, inside, 2, node2.ip(family)),
            (&node1, inside, 1, node2.ip(family)),
            // The node that forwards answers itself, and for who is behind it.
            (scenario.cluster.outside(), port, 2, port.ip()),
            (scenario.cluster.outside(), port, 3, port.ip()),
            // Its stack does, for the pod behind it.
            (scenario.cluster.outside(), near, 2, near.ip()),
        ];
        for (client, to, hops, reporter) in cases {
            let what = format!("{} -> {to} in {hops}", client.name());
            let found = end_of_hops(client, to, hops);
            expectations.check(
                what,
                found.and_then(|found| {
                    ensure!(found == reporter, "told by {found}, not {reporter}");
                    Ok(())
                }),
            );
        }
        // The first router of a pod: any address of its node.
        let found = end_of_hops(&pod, inside, 1);
        expectations.check(format!("{inside} in 1"), found.map(drop));
    }
    expectations.finish()
}
