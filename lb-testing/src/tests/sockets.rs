//! The decision on connect() and sendmsg(), on the host.

use lb_common::{
    abi::{
        address::{Be16, Ipv4, Ipv6},
        counter::Reason,
        frontend::{Frontend, FrontendKey, FrontendKind, TCP, UDP},
        service::Service,
        settings::{MAX_PREFIXES, PortRange, Settings},
        traffic::NO_SERVICE,
    },
    balance::socket::{self, Caller, Decision},
};

use crate::{
    family::TestFamily,
    tables::{FakeTables, Lookups},
    world::{Location, TICKS, World, at, seconds},
};

#[derive(Clone, Copy)]
struct Socket {
    netns: u64,
    is_node: bool,
    datagrams: Option<u64>,
}

impl Caller for Socket {
    fn netns(&self) -> u64 {
        self.netns
    }

    fn is_node(&self) -> bool {
        self.is_node
    }

    fn datagram_socket(&self) -> Option<u64> {
        self.datagrams
    }
}

const STREAM: Socket = Socket { netns: 1 << 40 | 7, is_node: false, datagrams: None };

struct Node<F: TestFamily> {
    world: World<F>,
    tables: FakeTables<F>,
}

impl<F: TestFamily> Node<F> {
    /// A Service at port 80 of the first VIP, with backends on another node.
    fn new(protocol: u8, backends: u8) -> (Self, u32, Vec<u32>) {
        let mut world = World::default();
        let index = world.add_service(at(F::vip(1), 80), protocol);
        let mut add =
            |number| world.add_backend(index, at(F::remote_pod(number), 8080), Location::OtherNode);
        let ids = (1..=backends).map(&mut add).collect();
        (Self { world, tables: FakeTables::default() }, index, ids)
    }

    fn call(&mut self, vip: u8, port: u16, protocol: u8, caller: Socket) -> Decision<F::Address> {
        self.tables.load(&self.world);
        self.tables.lookups = Lookups::default();
        let (to, settings) = (at(F::vip(vip), port), &self.world.settings);
        socket::decide(to, protocol, &caller, settings, &mut self.tables)
    }

    fn backend(&mut self, protocol: u8, caller: Socket) -> F::Address {
        match self.call(1, 80, protocol, caller) {
            Decision::Translate(to) => to.address,
            other => panic!("{other:?}"),
        }
    }
}

fn answers<F: TestFamily>() {
    for protocol in [TCP, UDP] {
        let (mut node, index, ids) = Node::<F>::new(protocol, 1);
        let translated = Decision::Translate(at(F::remote_pod(1), 8080));
        assert_eq!(node.call(1, 80, protocol, STREAM), translated);
        assert_eq!(node.tables.lookups.hashes(), 1);
        let other = if protocol == TCP { UDP } else { TCP };
        let no_port = Decision::Refuse(Reason::NoSuchPort, NO_SERVICE);
        assert_eq!(node.call(1, 80, other, STREAM), no_port);
        assert_eq!(node.call(1, 81, protocol, STREAM), no_port);
        let unknown = Decision::Untouched(Reason::UnknownAddress);
        assert_eq!(node.call(9, 80, protocol, STREAM), unknown);
        let outside = at(F::outside(), 80);
        node.tables.lookups = Lookups::default();
        let decision =
            socket::decide(outside, protocol, &STREAM, &node.world.settings, &mut node.tables);
        assert_eq!(decision, Decision::Untouched(Reason::NotService));
        assert_eq!(node.tables.lookups, Lookups::default());
        node.world.services[index as usize].flags |= Service::INTERNAL_LOCAL;
        let none_here = Decision::Refuse(Reason::NoLocalEndpoint, index);
        assert_eq!(node.call(1, 80, protocol, STREAM), none_here);
        node.world.services[index as usize].flags = 0;
        node.world.settings.flags |= Settings::DRAINING;
        for port in [80, 81] {
            let left = Decision::Untouched(Reason::Draining);
            assert_eq!(node.call(1, port, protocol, STREAM), left);
        }
        node.world.settings.flags &= !Settings::DRAINING;
        node.world.drain(ids[0]);
        let none = Decision::Refuse(Reason::NoEndpoint, index);
        assert_eq!(node.call(1, 80, protocol, STREAM), none);
    }
}

fn another_port_of_an_external_address<F: TestFamily>() {
    for protocol in [TCP, UDP] {
        let (mut node, index, _) = Node::<F>::new(protocol, 1);
        let external = at(F::vip(2), 80);
        node.world.add_frontend_of_kind(FrontendKind::EXTERNAL, index, external, protocol);
        let translated = Decision::Translate(at(F::remote_pod(1), 8080));
        assert_eq!(node.call(2, 80, protocol, STREAM), translated);
        let left = Decision::Untouched(Reason::UnknownAddress);
        assert_eq!(node.call(2, 22, protocol, STREAM), left);
    }
}

#[test]
fn a_call_to_another_port_of_an_external_address_is_left_alone() {
    another_port_of_an_external_address::<Ipv4>();
    another_port_of_an_external_address::<Ipv6>();
}

#[test]
fn a_call_is_translated_refused_or_left_alone() {
    answers::<Ipv4>();
    answers::<Ipv6>();
}

/// A node with more addresses than fit, so that any address may be one; its node ports have a
/// frontend of any node and one of the loopback address.
fn own_namespace<F: TestFamily>() {
    let (mut node, index, _) = Node::<F>::new(TCP, 1);
    node.world.settings.node_ports = PortRange { first: 30_080, count: 1 };
    node.world.settings.ipv4.node_address_count = MAX_PREFIXES as u32 + 1;
    node.world.settings.ipv6.node_address_count = MAX_PREFIXES as u32 + 1;
    let port = Be16::new(30_080);
    let frontend =
        Frontend { service: index, kind: FrontendKind::NODE_PORT, ..Frontend::default() };
    for address in [F::Address::default(), F::loopback()] {
        node.world.frontends.push((FrontendKey::new(address, port, TCP), frontend));
    }
    node.tables.load(&node.world);
    for address in [F::Address::default(), F::loopback()] {
        let to = lb_common::balance::Endpoint { address, port };
        let decision = socket::decide(to, TCP, &STREAM, &node.world.settings, &mut node.tables);
        let untouched = matches!(decision, Decision::Untouched(_));
        assert!(untouched, "a pod means itself by {address:?}: {decision:?}");
    }
}

#[test]
fn a_pod_that_asks_its_own_namespace_is_left_alone() {
    own_namespace::<Ipv4>();
    own_namespace::<Ipv6>();
}

fn affinity<F: TestFamily>() {
    let (mut node, index, ids) = Node::<F>::new(TCP, 3);
    node.world.services[index as usize].affinity_seconds = 600;
    let sockets = (0..40).map(|number| Socket { netns: 1 << 40 | number, ..STREAM });
    let sockets: Vec<Socket> = sockets.collect();
    let round = |node: &mut Node<F>| -> Vec<F::Address> {
        sockets.iter().map(|socket| node.backend(TCP, *socket)).collect()
    };
    let first = round(&mut node);
    node.tables.clock = node.tables.clock.wrapping_add(599 * TICKS);
    assert_eq!(round(&mut node), first);
    node.tables.clock = node.tables.clock.wrapping_add(599 * TICKS);
    assert_eq!(round(&mut node), first);
    node.world.drain(ids[0]);
    let second = round(&mut node);
    assert!(!second.contains(&F::remote_pod(1)) && first.contains(&F::remote_pod(1)));
    node.tables.clock = node.tables.clock.wrapping_add(601 * TICKS);
    assert_ne!(round(&mut node), second);
}

#[test]
fn a_network_namespace_keeps_to_its_backend() {
    affinity::<Ipv4>();
    affinity::<Ipv6>();
}

fn datagrams<F: TestFamily>() {
    let (mut node, _, ids) = Node::<F>::new(UDP, 3);
    let sender = |cookie| Socket { netns: 1, is_node: false, datagrams: Some(cookie) };
    let round = |node: &mut Node<F>| -> Vec<F::Address> {
        (0..40).map(|cookie| node.backend(UDP, sender(cookie))).collect()
    };
    let first = round(&mut node);
    assert!((1..=3).all(|number| first.contains(&F::remote_pod(number))));
    node.tables.clock = node.tables.clock.wrapping_add((seconds::UDP_STREAM - 1) * TICKS);
    node.world.drain(ids[0]);
    assert_eq!(round(&mut node), first, "a draining backend keeps its senders");
    node.world.remove_backend(ids[0]);
    let second = round(&mut node);
    assert!(!second.contains(&F::remote_pod(1)));
    let kept = first.iter().zip(&second).filter(|(one, two)| one == two).count();
    let stayed = first.iter().filter(|backend| **backend != F::remote_pod(1)).count();
    assert_eq!(kept, stayed);
}

#[test]
fn a_datagram_socket_keeps_to_its_backend_until_that_is_gone() {
    datagrams::<Ipv4>();
    datagrams::<Ipv6>();
}
