//! Direct server return: which requests are encapsulated and sent to another node, what happens
//! to those that another node has encapsulated, and how long flows live of which this node sees
//! one direction only.

use lb_common::{
    abi::{
        counter::Reason,
        flow::Tuple,
        frontend::{FrontendKey, FrontendKind},
        service::Service,
        settings::Settings,
    },
    packet::{ACK, FIN, RST, SYN},
};

use super::outside::{NODE_PORT, balancer, client, exposed, frontends, here, node_port, policy};
use super::setup::*;
use crate::{
    flow::{TestFlow, tuple},
    frame::{Body, Frame},
    interpreter::Fate,
    world::seconds,
};

cases! {
    BOTH => a_request_is_encapsulated_as_it_came,
    BOTH => a_request_for_a_backend_here_is_not_encapsulated,
    BOTH => requests_of_pods_and_nodes_are_not_encapsulated,
    BOTH => requests_that_cannot_be_encapsulated_are_masqueraded,
    BOTH => policies_apply_before_encapsulation,
    BOTH => a_request_whose_ttl_ends_here_is_not_encapsulated,
    BOTH => an_encapsulated_request_reaches_a_backend_here,
    BOTH => an_encapsulated_request_goes_to_backends_here_only,
    BOTH => an_encapsulated_request_without_a_backend_here_is_dropped,
    BOTH => a_decapsulated_request_is_never_encapsulated_again,
    BOTH => tunnels_of_others_are_left_alone,
    BOTH => tunnels_are_accepted_only_for_services_that_use_them,
    BOTH => a_pod_cannot_forge_a_tunnel,
    BOTH => an_encapsulated_request_arrives_at_a_node_address_that_is_a_frontend,
    BOTH => an_encapsulated_packet_of_no_service_here_stays_encapsulated,
    BOTH => errors_about_replies_find_the_backend,
    BOTH => errors_of_a_backend_reach_the_client_from_the_service,
    UDP_ONLY => fragments_are_encapsulated_and_decapsulated,
    TCP_ONLY => the_mss_leaves_room_for_the_outer_header,
    TCP_ONLY => a_flow_seen_one_way_is_established_by_its_client,
    TCP_ONLY => a_flow_seen_one_way_ends_with_its_client,
    UDP_ONLY => a_datagram_flow_seen_one_way_keeps_its_backend,
    UDP_ONLY => a_datagram_flow_seen_one_way_leaves_a_backend_that_is_gone,
}

/// The outer header from this node to the node of remote backends.
fn outer_header<F: TestFamily>() -> Fate<F::Address> {
    Fate::Encapsulated(tuple(at(F::node(), 0), at(F::other_node(), 0)))
}

/// As [`exposed`], in DSR mode.
fn exposed_directly<F: TestFamily>(scene: &mut Scene<F>, locations: &[Location]) -> u32 {
    let index = exposed(scene, locations);
    let any = FrontendKey::<F::Address>::of_any_node(node_port::<F>().port, scene.protocol);
    let frontend = Endpoint { address: any.address, port: any.port };
    scene.world.add_frontend_of_kind(FrontendKind::NODE_PORT, index, frontend, scene.protocol);
    scene.world.settings.flags |= Settings::DSR;
    policy(scene, index, Service::DSR);
    index
}

/// The frontend at which clients outside reach another node, which encapsulates their requests
/// and sends them here.
fn remote_frontends<F: TestFamily>() -> [Endpoint<F::Address>; 2] {
    [at(F::other_node(), NODE_PORT), balancer::<F>()]
}

/// A frame of the case's protocol that another node has encapsulated and sent here.
fn encapsulated<F: TestFamily>(
    scene: &Scene<F>,
    from: Endpoint<F::Address>,
    to: Endpoint<F::Address>,
    flags: u8,
) -> Frame<F> {
    Frame::of(scene.protocol, from, to, flags).encapsulated(F::other_node(), F::node())
}

/// Opens a flow whose requests another node encapsulates, to [`here`].
#[track_caller]
fn open<F: TestFamily>(
    scene: &mut Scene<F>,
    frontend: Endpoint<F::Address>,
) -> TestFlow<F::Address> {
    let sent = tuple(client::<F>(), here::<F>());
    let frame = encapsulated(scene, client::<F>(), frontend, SYN);
    scene.expect_frame(TestSite::FromDevice, &frame, Reason::FlowCreated, Fate::Translated(sent));
    let fate = Fate::Translated(sent);
    TestFlow { site: TestSite::FromDevice, client: client::<F>(), frontend, fate, sent }
}

#[track_caller]
fn answer<F: TestFamily>(scene: &mut Scene<F>, flow: &TestFlow<F::Address>, flags: u8) {
    let back = tuple(flow.frontend, flow.client);
    let is_clamped = scene.is_tcp() && flags & SYN != 0;
    let fate = if is_clamped { Fate::MssClamped(back) } else { Fate::Translated(back) };
    let outcome = scene.answer(flow, TestSite::ToDeviceForwarded, flags);
    assert_eq!((outcome.reason, outcome.fate), (Reason::Reply, fate));
}

/// Sends another encapsulated packet of the flow and asserts that it reaches the backend.
#[track_caller]
fn ask<F: TestFamily>(scene: &mut Scene<F>, flow: &TestFlow<F::Address>, flags: u8) {
    let frame = encapsulated(scene, flow.client, flow.frontend, flags);
    scene.expect_frame(TestSite::FromDevice, &frame, Reason::Request, flow.fate);
}

fn a_request_is_encapsulated_as_it_came<F: TestFamily>(scene: &mut Scene<F>) {
    exposed_directly(scene, &[Location::OtherNode]);
    for frontend in frontends::<F>() {
        let ends = [client::<F>(), frontend];
        scene.expect(TestSite::FromDevice, ends, SYN, Reason::FlowCreated, outer_header::<F>());
        scene.expect(TestSite::FromDevice, ends, ACK, Reason::Request, outer_header::<F>());
        scene.expect(TestSite::FromDevice, ends, ACK, Reason::Request, outer_header::<F>());
        scene.expect_lookups(1);
    }
    // One entry for each flow, and none of a handshake.
    assert_eq!(scene.flow_counts(), [2, 0]);
}

fn a_request_for_a_backend_here_is_not_encapsulated<F: TestFamily>(scene: &mut Scene<F>) {
    for location in [Location::LocalPod, Location::ThisHost] {
        scene.reset();
        exposed_directly(scene, &[location]);
        let flow = scene.open(TestSite::FromDevice, client::<F>(), node_port::<F>());
        assert!(matches!(flow.fate, Fate::Translated(_)), "{flow:?}");
    }
}

fn requests_of_pods_and_nodes_are_not_encapsulated<F: TestFamily>(scene: &mut Scene<F>) {
    exposed_directly(scene, &[Location::OtherNode]);
    for client in [at(F::remote_pod(8), 45_000), at(F::other_node(), 45_000)] {
        for frontend in frontends::<F>() {
            let flow = scene.connect(TestSite::FromDevice, client, frontend);
            assert!(matches!(flow.fate, Fate::Forwarded(_)), "{flow:?}");
        }
    }
    for (site, client) in clients::<F>() {
        let flow = scene.connect(site, client, balancer::<F>());
        assert!(!matches!(flow.fate, Fate::Encapsulated(_)), "{flow:?}");
    }
}

fn requests_that_cannot_be_encapsulated_are_masqueraded<F: TestFamily>(scene: &mut Scene<F>) {
    // A ClusterIP; an address of this node that other nodes do not know; a backend whose node is
    // not known.
    exposed_directly(scene, &[Location::OtherNode]);
    let flow = scene.connect(TestSite::FromDevice, client::<F>(), web::<F>());
    assert!(matches!(flow.fate, Fate::Forwarded(_)), "{flow:?}");
    scene.world.nodes.retain(|node| *node != F::node());
    scene.forget();
    let flow = scene.connect(TestSite::FromDevice, client::<F>(), node_port::<F>());
    assert!(matches!(flow.fate, Fate::Forwarded(_)), "{flow:?}");
    scene.reset();
    exposed_directly(scene, &[Location::OtherNode]);
    for backend in &mut scene.world.backends {
        backend.node = F::Address::default();
    }
    scene.update();
    let flow = scene.connect(TestSite::FromDevice, client::<F>(), balancer::<F>());
    assert!(matches!(flow.fate, Fate::Forwarded(_)), "{flow:?}");
}

fn policies_apply_before_encapsulation<F: TestFamily>(scene: &mut Scene<F>) {
    let index = exposed_directly(scene, &[Location::OtherNode]);
    policy(scene, index, Service::DSR | Service::EXTERNAL_LOCAL);
    for frontend in frontends::<F>() {
        let ends = [client::<F>(), frontend];
        scene.expect(TestSite::FromDevice, ends, SYN, Reason::NoLocalEndpoint, Fate::Dropped);
    }
    scene.world.restrict(index, &[]);
    policy(scene, index, Service::DSR);
    let ends = [client::<F>(), balancer::<F>()];
    scene.expect(TestSite::FromDevice, ends, SYN, Reason::SourceNotAllowed, Fate::Dropped);
}

fn a_request_whose_ttl_ends_here_is_not_encapsulated<F: TestFamily>(scene: &mut Scene<F>) {
    exposed_directly(scene, &[Location::OtherNode]);
    let ends = [client::<F>(), node_port::<F>()];
    scene.expect(TestSite::FromDevice, ends, SYN, Reason::FlowCreated, outer_header::<F>());
    let frame = Frame::of(scene.protocol, ends[0], ends[1], ACK).ttl(1);
    let told = Fate::Answered(lb_common::balance::Answer::TimeExceeded);
    scene.expect_frame(TestSite::FromDevice, &frame, Reason::TtlExceeded, told);
}

fn an_encapsulated_request_reaches_a_backend_here<F: TestFamily>(scene: &mut Scene<F>) {
    for frontend in remote_frontends::<F>() {
        scene.reset();
        exposed_directly(scene, &[Location::LocalPod]);
        let flow = open(scene, frontend);
        answer(scene, &flow, SYN | ACK);
        for _ in 0..2 {
            ask(scene, &flow, ACK);
        }
        scene.expect_lookups(1 + 3);
        answer(scene, &flow, ACK);
        scene.expect_lookups(1);
        assert_eq!(scene.flow_counts(), [1, 0]);
    }
}

fn an_encapsulated_request_goes_to_backends_here_only<F: TestFamily>(scene: &mut Scene<F>) {
    let locations = [Location::OtherNode, Location::LocalPod, Location::OtherNode];
    exposed_directly(scene, &locations);
    for port in 1000..1020 {
        let from = at(F::outside(), port);
        let frame = encapsulated(scene, from, balancer::<F>(), SYN);
        let fate = Fate::Translated(tuple(from, here::<F>()));
        scene.expect_frame(TestSite::FromDevice, &frame, Reason::FlowCreated, fate);
    }
}

fn an_encapsulated_request_without_a_backend_here_is_dropped<F: TestFamily>(scene: &mut Scene<F>) {
    for locations in [&[][..], &[Location::OtherNode]] {
        scene.reset();
        exposed_directly(scene, locations);
        for frontend in remote_frontends::<F>() {
            let frame = encapsulated(scene, client::<F>(), frontend, SYN);
            let (reason, fate) = (Reason::NoLocalEndpoint, Fate::Dropped);
            scene.expect_frame(TestSite::FromDevice, &frame, reason, fate);
            if scene.is_tcp() {
                let frame = encapsulated(scene, client::<F>(), frontend, ACK);
                let (reason, fate) = (Reason::UnknownTcpFlow, Fate::Dropped);
                scene.expect_frame(TestSite::FromDevice, &frame, reason, fate);
            }
        }
    }
}

fn a_decapsulated_request_is_never_encapsulated_again<F: TestFamily>(scene: &mut Scene<F>) {
    let index = exposed_directly(scene, &[Location::OtherNode]);
    let ends = [client::<F>(), balancer::<F>()];
    scene.expect(TestSite::FromDevice, ends, SYN, Reason::FlowCreated, outer_header::<F>());
    scene.expect(TestSite::FromDevice, ends, ACK, Reason::Request, outer_header::<F>());
    let frame = encapsulated(scene, ends[0], ends[1], SYN);
    scene.expect_frame(TestSite::FromDevice, &frame, Reason::NoLocalEndpoint, Fate::Dropped);
    let frame = encapsulated(scene, ends[0], ends[1], ACK);
    let reason = if scene.is_tcp() { Reason::UnknownTcpFlow } else { Reason::NoLocalEndpoint };
    scene.expect_frame(TestSite::FromDevice, &frame, reason, Fate::Dropped);
    scene.world.add_backend(index, here::<F>(), Location::LocalPod);
    scene.update();
    open(scene, balancer::<F>());
}

fn tunnels_of_others_are_left_alone<F: TestFamily>(scene: &mut Scene<F>) {
    exposed_directly(scene, &[Location::LocalPod]);
    let bridge = route_pods_by_overlay(scene);
    let protocol = scene.protocol;
    let plain = |from| Frame::of(protocol, from, balancer::<F>(), SYN);
    let client = client::<F>();
    let pod = at(F::remote_pod(8), 45_000);
    let node = at(F::other_node(), 45_000);
    let frames = [
        // The outer source is not a node.
        plain(client).encapsulated(F::outside(), F::node()),
        plain(client).encapsulated(F::remote_pod(8), F::node()),
        // The outer destination is not this node.
        plain(client).encapsulated(F::other_node(), F::pod(3)),
        // It is an address of this node, and no Node object's: no node sends there.
        plain(client).encapsulated(F::other_node(), bridge),
        // A CNI encapsulates traffic of pods and nodes.
        plain(pod).encapsulated(F::other_node(), F::node()),
        plain(node).encapsulated(F::other_node(), F::node()),
    ];
    for frame in frames {
        let outcome = scene.send_frame(TestSite::FromDevice, &frame);
        assert_eq!(outcome.fate, Fate::Untouched, "{frame:?}");
        assert!([Reason::NoFlow, Reason::NotService].contains(&outcome.reason), "{outcome:?}");
    }
    assert_eq!(scene.flow_counts(), [0, 0]);
    // Only packets from an external device are decapsulated.
    let frame = plain(client).encapsulated(F::other_node(), F::node());
    for site in [TestSite::ToDevice, TestSite::ToDeviceForwarded, TestSite::Loopback] {
        assert_eq!(scene.send_frame(site, &frame).fate, Fate::Untouched, "{site:?}");
    }
}

fn tunnels_are_accepted_only_for_services_that_use_them<F: TestFamily>(scene: &mut Scene<F>) {
    let index = exposed_directly(scene, &[Location::LocalPod]);
    policy(scene, index, 0);
    let frame = encapsulated(scene, client::<F>(), balancer::<F>(), SYN);
    scene.expect_frame(TestSite::FromDevice, &frame, Reason::UnaskedTunnel, Fate::Dropped);
    scene.world.settings.flags &= !Settings::DSR;
    scene.update();
    let outcome = scene.send_frame(TestSite::FromDevice, &frame);
    assert_eq!(outcome.fate, Fate::Untouched);
    assert_eq!(scene.flow_counts(), [0, 0]);
}

fn a_pod_cannot_forge_a_tunnel<F: TestFamily>(scene: &mut Scene<F>) {
    exposed_directly(scene, &[Location::LocalPod]);
    let inside = Frame::<F>::of(scene.protocol, client::<F>(), balancer::<F>(), SYN);
    for to in [F::node(), F::other_node()] {
        let frame = inside.clone().encapsulated(F::pod(1), to);
        scene.expect_frame(TestSite::FromPod, &frame, Reason::UnaskedTunnel, Fate::Dropped);
    }
    // Pods may use tunnels of their own.
    let frame = inside.encapsulated(F::pod(1), F::outside());
    assert_eq!(scene.send_frame(TestSite::FromPod, &frame).fate, Fate::Untouched);
}

fn an_encapsulated_request_arrives_at_a_node_address_that_is_a_frontend<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    exposed_directly(scene, &[Location::LocalPod]);
    let settings = F::settings_mut(&mut scene.world.settings);
    let [gate, _] = F::service_prefixes();
    let prefix = Prefix { address: F::node().masked(gate.mask), mask: gate.mask };
    settings.service_prefixes[settings.service_prefix_count as usize] = prefix;
    settings.service_prefix_count += 1;
    scene.update();
    open(scene, balancer::<F>());
}

fn an_encapsulated_packet_of_no_service_here_stays_encapsulated<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    exposed_directly(scene, &[Location::LocalPod]);
    let client = client::<F>();
    let others = [
        at(F::pod(3), 8080),
        at(F::outside(), 80),
        at(F::other_node(), 22),
        at(F::remote_pod(3), NODE_PORT),
        at(balancer::<F>().address, 81),
        web::<F>(),
    ];
    for to in others {
        for flags in [SYN, ACK] {
            let frame = encapsulated(scene, client, to, flags);
            let outcome = scene.send_frame(TestSite::FromDevice, &frame);
            assert_eq!(outcome.fate, Fate::Untouched, "{frame:?}");
        }
    }
    let protocol = if F::NUMBER == 4 { 4 } else { 41 };
    for body in [Body::Other(protocol), Body::Other(132), Body::Icmp(F::ECHO_REQUEST, 0)] {
        let frame =
            Frame::new(client, balancer::<F>(), body).encapsulated(F::other_node(), F::node());
        assert_eq!(
            scene.send_frame(TestSite::FromDevice, &frame).fate,
            Fate::Untouched,
            "{frame:?}"
        );
    }
    // Encapsulated twice.
    let inside = Frame::<F>::of(scene.protocol, client, balancer::<F>(), SYN)
        .encapsulated(F::other_node(), F::node());
    let twice = crate::tunnel::encapsulated::<F>(&inside.bytes(), [F::other_node(), F::node()]);
    assert_eq!(scene.interpreter.send(TestSite::FromDevice, &twice).fate, Fate::Untouched);
    assert_eq!(scene.flow_counts(), [0, 0]);
}

/// The error of a router about `sent`.
fn error<F: TestFamily>(scene: &Scene<F>, sent: &Tuple<F::Address>) -> Frame<F> {
    let [from, to] = [at(sent.source, 0), at(sent.destination, 0)];
    let [source_port, destination_port] = [sent.source_port, sent.destination_port];
    let from = Endpoint { port: source_port, ..from };
    let to = Endpoint { port: destination_port, ..to };
    let quoted = Frame::<F>::of(scene.protocol, from, to, ACK).bytes();
    let kind = Body::Icmp(F::SOME_ICMP_ERROR, 1);
    Frame::new(at(F::vip_outside_cidrs(77), 0), at(sent.source, 0), kind).payload(&quoted[14..])
}

fn errors_about_replies_find_the_backend<F: TestFamily>(scene: &mut Scene<F>) {
    // The node that clients send to encapsulates errors too.
    exposed_directly(scene, &[Location::OtherNode]);
    for frontend in frontends::<F>() {
        let ends = [client::<F>(), frontend];
        scene.expect(TestSite::FromDevice, ends, SYN, Reason::FlowCreated, outer_header::<F>());
        let frame = error(scene, &tuple(frontend, client::<F>()));
        scene.expect_frame(
            TestSite::FromDevice,
            &frame,
            Reason::IcmpTranslated,
            outer_header::<F>(),
        );
        let last = frame.ttl(1);
        scene.expect_frame(TestSite::FromDevice, &last, Reason::TtlExceeded, Fate::Dropped);
    }
    // The backend's node knows the flow, and restores what was sent.
    for frontend in remote_frontends::<F>() {
        scene.reset();
        exposed_directly(scene, &[Location::LocalPod]);
        let flow = open(scene, frontend);
        answer(scene, &flow, SYN | ACK);
        let frame = error(scene, &tuple(frontend, client::<F>()));
        let frame = frame.encapsulated(F::other_node(), F::node());
        let translated = tuple(at(F::vip_outside_cidrs(77), 0), at(here::<F>().address, 0));
        let fate = Fate::Translated(translated);
        scene.expect_frame(TestSite::FromDevice, &frame, Reason::IcmpTranslated, fate);
        assert_eq!(scene.interpreter.quoted(), Some(flow.sent.reversed()));
    }
}

fn errors_of_a_backend_reach_the_client_from_the_service<F: TestFamily>(scene: &mut Scene<F>) {
    exposed_directly(scene, &[Location::LocalPod]);
    let frontend = at(F::other_node(), NODE_PORT);
    let flow = open(scene, frontend);
    let quoted = Frame::<F>::of(scene.protocol, flow.client, here::<F>(), SYN).bytes();
    let kind = Body::Icmp(F::SOME_ICMP_ERROR, 1);
    let [from, to] = [at(here::<F>().address, 0), at(flow.client.address, 0)];
    let frame = Frame::<F>::new(from, to, kind).payload(&quoted[14..]);
    let fate = Fate::Translated(tuple(at(frontend.address, 0), to));
    scene.expect_frame(TestSite::ToDeviceForwarded, &frame, Reason::IcmpTranslated, fate);
    assert_eq!(scene.interpreter.quoted(), Some(tuple(flow.client, frontend)));
}

fn fragments_are_encapsulated_and_decapsulated<F: TestFamily>(scene: &mut Scene<F>) {
    exposed_directly(scene, &[Location::OtherNode]);
    let ends = [client::<F>(), node_port::<F>()];
    let first = |to| Frame::<F>::of(UDP, ends[0], to, 0).fragment_of(9, 0, true);
    let later = |to| Frame::<F>::new(ends[0], to, Body::Other(UDP));
    let later = |to| later(to).fragment_of(9, 16, false);
    let frames = [first(ends[1]), later(ends[1])];
    let frontend = at(F::other_node(), NODE_PORT);
    let arriving =
        [first(frontend), later(frontend)].map(|it| it.encapsulated(F::other_node(), F::node()));
    scene.expect_frame(TestSite::FromDevice, &frames[0], Reason::FlowCreated, outer_header::<F>());
    scene.expect_frame(TestSite::FromDevice, &frames[1], Reason::Request, outer_header::<F>());
    scene.reset();
    exposed_directly(scene, &[Location::LocalPod]);
    let sent = tuple(ends[0], here::<F>());
    let fate = Fate::Translated(sent);
    scene.expect_frame(TestSite::FromDevice, &arriving[0], Reason::FlowCreated, fate);
    let fate = Fate::Translated(tuple(at(sent.source, 0), at(sent.destination, 0)));
    scene.expect_frame(TestSite::FromDevice, &arriving[1], Reason::Request, fate);
}

fn the_mss_leaves_room_for_the_outer_header<F: TestFamily>(scene: &mut Scene<F>) {
    exposed_directly(scene, &[Location::LocalPod]);
    let frontend = balancer::<F>();
    let flow = open(scene, frontend);
    answer(scene, &flow, SYN | ACK);
    // Without the option, or with a small MSS, nothing changes.
    let back = Fate::Translated(tuple(frontend, flow.client));
    for options in [&[][..], &[1, 1, 1, 1], &[2, 4, 1, 0], &[1, 2, 4, 5, 0xb4, 1, 1, 1]] {
        let mut frame = Frame::<F>::of(TCP, here::<F>(), flow.client, SYN | ACK);
        frame.tcp_options = options.to_vec();
        scene.expect_frame(TestSite::ToDeviceForwarded, &frame, Reason::Reply, back);
    }
    // A request that was not encapsulated keeps its MSS.
    let other = at(F::outside(), 1000);
    let flow = scene.open(TestSite::FromDevice, other, frontend);
    scene.reply(&flow, SYN | ACK);
}

fn a_flow_seen_one_way_is_established_by_its_client<F: TestFamily>(scene: &mut Scene<F>) {
    exposed_directly(scene, &[Location::OtherNode]);
    let ends = [client::<F>(), node_port::<F>()];
    scene.expect(TestSite::FromDevice, ends, SYN, Reason::FlowCreated, outer_header::<F>());
    assert_eq!(scene.flow_counts(), [0, 1]);
    scene.expect(TestSite::FromDevice, ends, SYN, Reason::Request, outer_header::<F>());
    assert_eq!(scene.flow_counts(), [0, 1]);
    scene.expect(TestSite::FromDevice, ends, ACK, Reason::Request, outer_header::<F>());
    assert_eq!(scene.flow_counts(), [1, 0]);
    scene.wait(seconds::TCP_ESTABLISHED - 1);
    scene.expect(TestSite::FromDevice, ends, ACK, Reason::Request, outer_header::<F>());
    scene.wait(seconds::TCP_ESTABLISHED + 1);
    scene.expect(TestSite::FromDevice, ends, ACK, Reason::UnknownTcpFlow, Fate::Untouched);
}

fn a_flow_seen_one_way_ends_with_its_client<F: TestFamily>(scene: &mut Scene<F>) {
    for (flags, lives) in [(FIN | ACK, seconds::TCP_FIN_ONE_WAY), (RST | ACK, seconds::TCP_RESET)] {
        scene.reset();
        exposed_directly(scene, &[Location::OtherNode]);
        let ends = [client::<F>(), node_port::<F>()];
        scene.expect(TestSite::FromDevice, ends, SYN, Reason::FlowCreated, outer_header::<F>());
        for flags in [ACK, flags, ACK] {
            scene.expect(TestSite::FromDevice, ends, flags, Reason::Request, outer_header::<F>());
        }
        // The client may still be receiving, and acknowledges. After an RST it only repeats that.
        let again = if flags & RST != 0 { flags } else { ACK };
        for _ in 0..3 {
            scene.wait(lives - 1);
            scene.expect(TestSite::FromDevice, ends, again, Reason::Request, outer_header::<F>());
        }
        scene.wait(lives + 1);
        scene.expect(TestSite::FromDevice, ends, RST, Reason::UnknownTcpFlow, Fate::Untouched);
        scene.expect(TestSite::FromDevice, ends, SYN, Reason::FlowCreated, outer_header::<F>());
    }
}

fn a_datagram_flow_seen_one_way_keeps_its_backend<F: TestFamily>(scene: &mut Scene<F>) {
    exposed_directly(scene, &[Location::OtherNode]);
    let ends = [client::<F>(), node_port::<F>()];
    scene.expect(TestSite::FromDevice, ends, 0, Reason::FlowCreated, outer_header::<F>());
    for wait in [seconds::UDP - 1, 2, seconds::UDP_STREAM - 1] {
        scene.wait(wait);
        scene.expect(TestSite::FromDevice, ends, 0, Reason::Request, outer_header::<F>());
    }
    scene.wait(seconds::UDP_STREAM + 1);
    scene.expect(TestSite::FromDevice, ends, 0, Reason::FlowCreated, outer_header::<F>());
}

fn a_datagram_flow_seen_one_way_leaves_a_backend_that_is_gone<F: TestFamily>(scene: &mut Scene<F>) {
    let index = exposed_directly(scene, &[Location::OtherNode]);
    let ends = [client::<F>(), node_port::<F>()];
    scene.expect(TestSite::FromDevice, ends, 0, Reason::FlowCreated, outer_header::<F>());
    let gone = scene.world.backends.len() as u32 - 1;
    scene.world.add_backend(index, here::<F>(), Location::LocalPod);
    scene.world.remove_backend(gone);
    scene.update();
    let fate = Fate::Translated(tuple(ends[0], here::<F>()));
    scene.expect(TestSite::FromDevice, ends, 0, Reason::FlowCreated, fate);
    assert_eq!(scene.interpreter.flows().len(), 1);
}
