//! The text of each kind of explanation, over tables in memory.

mod lab;

use lb_common::{
    abi::{
        address::{Address4, Be16, Ipv4},
        affinity::{Affinity, AffinityKey},
        backend::Backend,
        flow::{ANSWERED, Action, CONFIRMED, Flow, FlowKey, RESET, Tuple},
        frontend::{FrontendKind, TCP},
        service::Service,
        settings::Settings,
    },
    balance::{NewFlow, Tables},
};
use lb_testing::{
    family::TestFamily,
    world::{Location, World, at},
};

use super::{At, ExplainError, Explanation};
use crate::{maps::flow_table::Flows as _, options::values::Protocol};

use lab::Lab;

/// A Service with a backend here and one elsewhere; also a load balancer's.
fn world() -> (World<Ipv4>, u32) {
    let mut world = World::<Ipv4>::default();
    let index = world.add_service(at(Ipv4::vip(1), 80), TCP);
    world.add_frontend_of_kind(
        FrontendKind::EXTERNAL,
        index,
        at(Ipv4::vip_outside_cidrs(9), 80),
        TCP,
    );
    world.add_frontend_of_kind(FrontendKind::NODE_PORT, index, at(Ipv4::node(), 30_080), TCP);
    world.add_backend(index, at(Ipv4::pod(2), 8080), Location::LocalPod);
    world.add_backend(index, at(Ipv4::remote_pod(2), 8080), Location::OtherNode);
    (world, index)
}

#[track_caller]
fn says(explained: &Explanation, expected: &[&str]) {
    let text = explained.to_string();
    let mut rest = text.as_str();
    for line in expected {
        let found = rest.find(line).unwrap_or_else(|| panic!("no {line:?} in its place:\n{text}"));
        rest = &rest[found + line.len()..];
    }
}

const VIP: fn(u16) -> (Address4, u16) = |port| (Ipv4::vip(1), port);
const BALANCER: fn() -> (Address4, u16) = || (Ipv4::vip_outside_cidrs(9), 80);

fn pod() -> Address4 {
    Ipv4::pod(1)
}

fn eth0() -> At {
    At::Device("eth0".to_owned())
}

#[test]
fn a_new_flow_shows_every_backend_that_it_may_get() {
    let lab = Lab::new(world().0);
    let explained = lab.ask(pod(), VIP(80), Protocol::Tcp, At::Pod);
    says(
        &explained,
        &[
            "10.1.0.1:40000 -> 10.96.0.1:80/tcp",
            "none: no connect-time hook for TCP is attached",
            "from_pod veth1: 10.1.0.1:40000 -> 10.96.0.1:80",
            "from_pod, at tc ingress of veth1",
            "no entry",
            "10.96.0.1:80/tcp is a ClusterIP frontend of default/web1",
            "internalTrafficPolicy Cluster: the cluster set, 2 backends",
            "2 of 2 eligible",
            "10.1.0.2:8080 (on this node), sees 10.1.0.1, through veth1",
            "10.2.0.2:8080 (on another node), sees 10.1.0.1, through eth0 via 192.0.2.11",
            "one of 2 at random",
            "for example 10.1.0.1:40000 -> 10.",
            "unchanged: the backend sees the client's address",
            "counted as from_pod flow_created",
            "outcome: for example ",
        ],
    );
}

/// Client, destination, `--at`, and the expected texts.
type Refused<'a> = (Address4, (Address4, u16), At, &'a [&'a str]);

#[test]
fn a_rejected_or_dropped_packet_says_why() {
    let (mut world, index) = world();
    world.services[index as usize].flags |= Service::EXTERNAL_LOCAL;
    world.backends[1].sets = 0;
    let away = world.backends[2];
    world.backends.clear();
    world.backends.extend([Backend::default(), Backend::default(), away]);
    world.drain(1);
    let empty = world.add_service(at(Ipv4::vip(2), 80), TCP);
    assert!(empty > index);
    let lab = Lab::new(world);
    let outside = Ipv4::outside();
    let rows: [Refused; 5] = [
        (
            pod(),
            VIP(81),
            At::Pod,
            &[
                "is a ClusterIP of default/web2, which has no port 81/tcp",
                "no_such_port",
                "outcome: the Service has no such port: refused",
            ],
        ),
        (
            pod(),
            (Ipv4::vip(2), 80),
            At::Pod,
            &[
                "the cluster set, 0 backends",
                "the Service has no endpoint",
                "with a TCP RST",
                "from_pod no_endpoint",
                "outcome: the Service has no endpoint",
            ],
        ),
        (
            outside,
            BALANCER(),
            eth0(),
            &[
                "XDP in the driver runs first and leaves the packet to tc",
                "client outside the cluster, externalTrafficPolicy Local: the local set, 0 backends",
                "10.2.0.2:8080 (on another node) not eligible: it is not on this node",
                "from_device no_local_endpoint",
                "outcome: the traffic policy is Local",
            ],
        ),
        (
            pod(),
            (Ipv4::vip(7), 80),
            At::Pod,
            &[
                "10.96.0.7 is in a ServiceCIDR, but no Service on this node has it",
                "from_pod unknown_address",
                "to_device eth0",
                "to_device untranslated_leaving",
            ],
        ),
        (
            outside,
            (Ipv4::pod(2), 8080),
            eth0(),
            &[
                "neither addressed to a Service nor a reply of one: untouched (counted as from_device \
                 not_service)",
                "outcome: delivered through veth1, as 198.51.100.7:40000 -> 10.1.0.2:8080",
            ],
        ),
    ];
    for (from, to, at, expected) in rows {
        says(&lab.ask(from, to, Protocol::Tcp, at), expected);
    }
}

#[test]
fn a_source_that_becomes_the_node_s_says_why() {
    let (mut world, index) = world();
    world.drain(1);
    let lab = Lab::new(world.clone());
    let outside = Ipv4::outside();
    says(
        &lab.ask(outside, BALANCER(), Protocol::Tcp, eth0()),
        &[
            "10.2.0.2:8080 (on another node), sees 192.0.2.10, through eth0 via 192.0.2.11",
            "the only eligible backend",
            "becomes this node's address (SNAT): the reply must come back through this node; its port",
            "outcome: leaves through eth0 via 192.0.2.11, as 192.0.2.10:",
        ],
    );
    world.services[index as usize].flags |= Service::DSR;
    let lab = Lab::new(world.clone());
    says(
        &lab.ask(outside, BALANCER(), Protocol::Tcp, eth0()),
        &["none: encapsulated to node 192.0.2.11", "outcome: leaves encapsulated to 192.0.2.11"],
    );
    says(
        &lab.ask(Ipv4::remote_pod(9), BALANCER(), Protocol::Tcp, eth0()),
        &["client is a pod of another node", "is ignored", "no DSR: the client is a pod"],
    );
    world.backends[1].sets = 0;
    world.add_backend(index, at(pod(), 8080), Location::LocalPod);
    world.drain(2);
    let lab = Lab::new(world);
    says(
        &lab.ask(pod(), VIP(80), Protocol::Tcp, At::Pod),
        &[
            "back out of the ingress interface",
            "becomes this node's address (SNAT): the backend is the client itself",
            "outcome: delivered back out of veth1",
        ],
    );
}

#[test]
fn the_settings_are_described() {
    let mut lab = Lab::new(world().0);
    lab.world.settings.flags |= Settings::MASQUERADE_ALL;
    let masqueraded = lab.ask(pod(), VIP(80), Protocol::Tcp, At::Pod);
    says(
        &masqueraded,
        &["sees 192.0.2.10", "becomes this node's address (SNAT): --masquerade-all"],
    );
    lab.world.settings.flags = Settings::DRAINING;
    let left = lab.ask(pod(), VIP(80), Protocol::Tcp, At::Pod);
    says(&left, &["`cleanup --drain` runs", "counted as from_pod draining"]);
}

#[test]
fn affinity_and_source_ranges_are_described() {
    let (mut world, index) = world();
    world.services[index as usize].affinity_seconds = 60;
    world.restrict(index, &[]);
    let lab = Lab::new(world);
    let key = AffinityKey {
        service: index,
        kind: lb_common::abi::affinity::BY_ADDRESS,
        client: [pod().be32, 0, 0, 0],
    };
    let bound = Affinity { backend: 2, generation: 1, last_seen: 1_000_000 - 2_500 };
    lab.tables.borrow_mut().bind(&key, &bound);
    says(
        &lab.ask(pod(), VIP(80), Protocol::Tcp, At::Pod),
        &[
            "ClientIP for 60 s: entry for 10.2.0.2:8080, used 10 s ago",
            "the backend of the affinity entry",
            "outcome: leaves",
        ],
    );
    let other = lab.ask(Ipv4::pod(3), VIP(80), Protocol::Tcp, At::Pod);
    says(&other, &["no entry for this client yet", "the backend that this client gets until"]);
    says(
        &lab.ask(Ipv4::outside(), BALANCER(), Protocol::Tcp, eth0()),
        &[
            "198.51.100.7 is not in loadBalancerSourceRanges (10.2.0.0/24)",
            "from_device source_not_allowed",
        ],
    );
}

#[test]
fn a_known_flow_decides_alone() {
    let (world, index) = world();
    let lab = Lab::new(world);
    let explained = lab.ask(pod(), VIP(80), Protocol::Tcp, At::Pod);
    let to = explained.path[0].new_destination.clone().expect("a destination");
    let id = if to.starts_with("10.1.") { 1 } else { 2 };
    let backend = lab.world.backends[id];
    let mut key = FlowKey { protocol: u32::from(TCP), ..FlowKey::default() };
    (key.tuple.source, key.tuple.destination) = (pod(), Ipv4::vip(1));
    (key.tuple.source_port, key.tuple.destination_port) = (Be16::new(40_000), Be16::new(80));
    let rewrite =
        Tuple { destination: backend.address, destination_port: backend.port, ..key.tuple };
    let insert = |state, ticks: u32| {
        lab.flows.live().for_each(|flow| assert!(lab.flows.remove_unchanged(&flow)));
        let mut new = NewFlow::default();
        new.flow = Flow {
            rewrite,
            action: Action::REQUEST,
            state,
            generation: 1,
            backend: id as u32,
            service: index,
            last_seen: lab.world.settings.time(1_000_000 - ticks),
            ..Flow::default()
        };
        new.reply_key.set_reverse(&rewrite, key.protocol);
        new.reply_action = Action::REPLY;
        lab.flows
            .insert(&key, &mut new, &lab.world.settings.flow_lifetimes)
            .expect("room for a flow");
    };
    insert(ANSWERED | CONFIRMED, 500);
    let known = lab.ask(pod(), VIP(80), Protocol::Tcp, At::Pod);
    says(
        &known,
        &[
            &format!("existing entry to its backend {to}, answered, idle for 2 s of 86400 s"),
            "from the same port: goes to the same backend",
            "a packet of a known flow, from its client: translated (counted as from_pod request)",
        ],
    );
    assert_eq!((known.connect, known.path[0].backends.len()), (None, 0));
    insert(RESET, 250 * 111);
    let expired = lab.ask(pod(), VIP(80), Protocol::Tcp, At::Pod);
    says(&expired, &["reset, idle for 111 s of 110 s: expired, ignored", "flow_created"]);
}

#[test]
fn sockets_are_described_before_packets() {
    let mut lab = Lab::new(world().0);
    lab.has_sockets = true;
    let explained = lab.ask(pod(), VIP(80), Protocol::Tcp, At::Pod);
    says(
        &explained,
        &[
            "connect()\n",
            "connect4, for every process",
            "2 backends",
            "counted as connect4 socket_translated",
            "The rest applies to packets of sockets that this hook did not translate:",
            "outcome: the socket is connected directly to one of 2 backends",
        ],
    );
    let refused = lab.ask(pod(), VIP(81), Protocol::Tcp, At::Pod);
    says(&refused, &["outcome: connect() fails with ECONNREFUSED"]);
    let udp = lab.ask(pod(), VIP(80), Protocol::Udp, At::Pod);
    says(&udp, &["no connect-time hook for UDP is attached"]);
    lab.world.settings.flags |= Settings::ONLY_NODE_SOCKETS;
    let left = lab.ask(pod(), VIP(80), Protocol::Tcp, At::Pod);
    says(
        &left,
        &["--socket-lb node leaves sockets of pods to the packet path", "outcome: for example"],
    );
    let own = lab.ask(Ipv4::node(), VIP(80), Protocol::Tcp, At::Node);
    says(
        &own,
        &["connect4, for", "to_device eth0", "unchanged, the node's own", "outcome: the socket"],
    );
}

#[test]
fn missing_programs_and_a_wrong_at_are_described() {
    let mut lab = Lab::new(world().0);
    let ask = |lab: &Lab, from, at| lab.try_ask(from, VIP(80), Protocol::Tcp, at);
    let error = |result: Result<Explanation, ExplainError>| result.expect_err("none").to_string();
    let text = error(ask(&lab, Ipv4::node(), At::Pod));
    assert!(text.ends_with("is an address of this node, not a pod of this node: give --at node"));
    let text = error(ask(&lab, Ipv4::outside(), At::Pod));
    assert!(text.ends_with("not a pod of this node: give --at eth0"), "{text}");
    let text = error(ask(&lab, pod(), At::Node));
    assert!(text.contains("is not an address of this node"), "{text}");
    let text = error(ask(&lab, pod(), At::Device("eth9".to_owned())));
    assert!(text.starts_with("--at eth9: no such device"), "{text}");
    let tun = lab.ask(pod(), VIP(80), Protocol::Tcp, At::Device("tun0".to_owned()));
    says(&tun, &["from_device tun0", "no lb program is attached to tun0", "to_device eth0"]);
    lab.has_pods = false;
    let bare = lab.ask(pod(), (Ipv4::vip(7), 80), Protocol::Tcp, At::Pod);
    says(&bare, &["no lb program is attached to veth1", "untranslated_leaving"]);
    assert!(!bare.path[0].attached);
    let nowhere = (Address4::from(std::net::Ipv4Addr::new(240, 0, 0, 1)), 80);
    let lost = lab.ask(Ipv4::node(), nowhere, Protocol::Udp, At::Node);
    says(&lost, &["outcome: dropped: the kernel has no route to 240.0.0.1"]);
}
