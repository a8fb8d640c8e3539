//! Direct server return: which packets are tunnelled to another node, what becomes of those
//! that another node has tunnelled here, and how long flows live that are seen one way.

use lb_common::{
    abi::{
        counter::Reason,
        flow::Tuple,
        frontend::{FrontendKey, FrontendKind},
        service::Service,
    },
    balance::FlowTable,
    packet::{ACK, FIN, RST, SYN},
};

use super::outside::{NODE_PORT, balancer, client, exposed, fronts, here, node_port, policy};
use super::setup::*;
use crate::{
    frame::{Body, Frame},
    scene::{End, Talk, tuple},
    world::seconds,
};

rows! {
    BOTH => a_request_is_tunnelled_as_it_came,
    BOTH => a_backend_here_needs_no_tunnel,
    BOTH => clients_that_are_pods_or_nodes_get_the_nodes_address,
    BOTH => what_no_tunnel_leads_to_gets_the_nodes_address,
    BOTH => policies_hold_before_the_tunnel,
    BOTH => a_request_at_the_end_of_its_hops_is_not_tunnelled,
    BOTH => a_tunnelled_request_reaches_a_backend_here,
    BOTH => a_tunnelled_request_goes_to_backends_here_only,
    BOTH => a_tunnelled_request_without_a_backend_here_is_dropped,
    BOTH => what_came_in_a_tunnel_is_never_tunnelled_again,
    BOTH => strangers_tunnels_are_left_alone,
    BOTH => what_is_for_nobody_here_stays_in_its_tunnel,
    BOTH => errors_about_replies_find_the_backend,
    BOTH => errors_of_a_backend_reach_the_client_from_the_service,
    UDP_ONLY => fragments_are_tunnelled_and_unpacked,
    TCP_ONLY => the_segment_size_leaves_room_for_the_tunnel,
    TCP_ONLY => a_flow_seen_one_way_is_established_by_its_client,
    TCP_ONLY => a_flow_seen_one_way_ends_with_its_client,
    UDP_ONLY => a_datagram_flow_seen_one_way_keeps_its_backend,
    UDP_ONLY => a_datagram_flow_seen_one_way_leaves_a_backend_that_is_gone,
}

/// The tunnel from this node to that of backends elsewhere.
fn tunnel<F: TestFamily>() -> End<F::Address> {
    End::Tunnelled(tuple(at(F::node(), 0), at(F::other_node(), 0)))
}

/// As [`exposed`], in DSR mode.
fn exposed_directly<F: TestFamily>(bench: &mut Bench<F>, places: &[Where]) -> u32 {
    let index = exposed(bench, places);
    let any = FrontendKey::<F::Address>::of_any_node(node_port::<F>().port, bench.protocol);
    let front = Endpoint { address: any.address, port: any.port };
    bench.world.add_front_of(FrontendKind::NODE_PORT, index, front, bench.protocol);
    policy(bench, index, Service::DSR);
    index
}

/// What clients outside ask another node for that tunnels it here.
fn remote_fronts<F: TestFamily>() -> [Endpoint<F::Address>; 2] {
    [at(F::other_node(), NODE_PORT), balancer::<F>()]
}

/// A frame of the row's protocol that another node tunnels here.
fn tunnelled<F: TestFamily>(
    bench: &Bench<F>,
    from: Endpoint<F::Address>,
    to: Endpoint<F::Address>,
    flags: u8,
) -> Frame<F> {
    Frame::of(bench.protocol, from, to, flags).tunnel(F::other_node(), F::node())
}

/// Opens a flow of which the requests are tunnelled here, to [`here`].
#[track_caller]
fn open<F: TestFamily>(bench: &mut Bench<F>, front: Endpoint<F::Address>) -> Talk<F::Address> {
    let sent = tuple(client::<F>(), here::<F>());
    let frame = tunnelled(bench, client::<F>(), front, SYN);
    bench.expect_frame(Place::FromDevice, &frame, Reason::FlowCreated, End::Onward(sent));
    let end = End::Onward(sent);
    Talk { place: Place::FromDevice, client: client::<F>(), front, end, sent }
}

#[track_caller]
fn answer<F: TestFamily>(bench: &mut Bench<F>, talk: &Talk<F::Address>, flags: u8) {
    let back = tuple(talk.front, talk.client);
    let is_clamped = bench.is_tcp() && flags & SYN != 0;
    let end = if is_clamped { End::Clamped(back) } else { End::Onward(back) };
    let outcome = bench.answer(talk, Place::ToDeviceForwarded, flags);
    assert_eq!((outcome.reason, outcome.end), (Reason::Reply, end));
}

/// Sends another tunnelled packet of the flow and asserts that it reaches the backend.
#[track_caller]
fn ask<F: TestFamily>(bench: &mut Bench<F>, talk: &Talk<F::Address>, flags: u8) {
    let frame = tunnelled(bench, talk.client, talk.front, flags);
    bench.expect_frame(Place::FromDevice, &frame, Reason::Request, talk.end);
}

fn a_request_is_tunnelled_as_it_came<F: TestFamily>(bench: &mut Bench<F>) {
    exposed_directly(bench, &[Where::Elsewhere]);
    for front in fronts::<F>() {
        let ends = [client::<F>(), front];
        bench.expect(Place::FromDevice, ends, SYN, Reason::FlowCreated, tunnel::<F>());
        bench.expect(Place::FromDevice, ends, ACK, Reason::Request, tunnel::<F>());
        bench.expect(Place::FromDevice, ends, ACK, Reason::Request, tunnel::<F>());
        bench.expect_lookups(1);
    }
    // One direction of each, and none of a handshake.
    assert_eq!(bench.flow_counts(), [2, 0]);
}

fn a_backend_here_needs_no_tunnel<F: TestFamily>(bench: &mut Bench<F>) {
    for place in [Where::Here, Where::Host] {
        bench.lab.reset();
        bench.world = Default::default();
        exposed_directly(bench, &[place]);
        let talk = bench.open(Place::FromDevice, client::<F>(), node_port::<F>());
        assert!(matches!(talk.end, End::Onward(_)), "{talk:?}");
    }
}

fn clients_that_are_pods_or_nodes_get_the_nodes_address<F: TestFamily>(bench: &mut Bench<F>) {
    exposed_directly(bench, &[Where::Elsewhere]);
    for client in [at(F::remote_pod(8), 45_000), at(F::other_node(), 45_000)] {
        for front in fronts::<F>() {
            let talk = bench.connect(Place::FromDevice, client, front);
            assert!(matches!(talk.end, End::Forwarded(_)), "{talk:?}");
        }
    }
    for (place, client) in clients::<F>() {
        let talk = bench.connect(place, client, balancer::<F>());
        assert!(!matches!(talk.end, End::Tunnelled(_)), "{talk:?}");
    }
}

fn what_no_tunnel_leads_to_gets_the_nodes_address<F: TestFamily>(bench: &mut Bench<F>) {
    // A ClusterIP, a backend whose node is not known, and an address of this node that the
    // others do not know it by.
    exposed_directly(bench, &[Where::Elsewhere]);
    let talk = bench.connect(Place::FromDevice, client::<F>(), web::<F>());
    assert!(matches!(talk.end, End::Forwarded(_)), "{talk:?}");
    bench.world.nodes.retain(|node| *node != F::node());
    bench.lab.reset();
    bench.update();
    let talk = bench.connect(Place::FromDevice, client::<F>(), node_port::<F>());
    assert!(matches!(talk.end, End::Forwarded(_)), "{talk:?}");
    bench.lab.reset();
    bench.world = Default::default();
    exposed_directly(bench, &[Where::Elsewhere]);
    for backend in &mut bench.world.backends {
        backend.node = F::Address::default();
    }
    bench.update();
    let talk = bench.connect(Place::FromDevice, client::<F>(), balancer::<F>());
    assert!(matches!(talk.end, End::Forwarded(_)), "{talk:?}");
}

fn policies_hold_before_the_tunnel<F: TestFamily>(bench: &mut Bench<F>) {
    let index = exposed_directly(bench, &[Where::Elsewhere]);
    policy(bench, index, Service::DSR | Service::EXTERNAL_LOCAL);
    for front in fronts::<F>() {
        let ends = [client::<F>(), front];
        bench.expect(Place::FromDevice, ends, SYN, Reason::NoLocalEndpoint, End::Dropped);
    }
    bench.world.restrict(index, &[]);
    policy(bench, index, Service::DSR);
    let ends = [client::<F>(), balancer::<F>()];
    bench.expect(Place::FromDevice, ends, SYN, Reason::SourceNotAllowed, End::Dropped);
}

fn a_request_at_the_end_of_its_hops_is_not_tunnelled<F: TestFamily>(bench: &mut Bench<F>) {
    exposed_directly(bench, &[Where::Elsewhere]);
    let ends = [client::<F>(), node_port::<F>()];
    bench.expect(Place::FromDevice, ends, SYN, Reason::FlowCreated, tunnel::<F>());
    let frame = Frame::of(bench.protocol, ends[0], ends[1], ACK).hops(1);
    let told = End::Answered(lb_common::balance::Answer::TimeExceeded);
    bench.expect_frame(Place::FromDevice, &frame, Reason::TtlExceeded, told);
}

fn a_tunnelled_request_reaches_a_backend_here<F: TestFamily>(bench: &mut Bench<F>) {
    for front in remote_fronts::<F>() {
        bench.lab.reset();
        bench.world = Default::default();
        exposed_directly(bench, &[Where::Here]);
        let talk = open(bench, front);
        answer(bench, &talk, SYN | ACK);
        for _ in 0..2 {
            ask(bench, &talk, ACK);
        }
        bench.expect_lookups(1 + 2);
        answer(bench, &talk, ACK);
        bench.expect_lookups(1);
        // The mode is the other node's affair, and so is the policy.
        assert_eq!(bench.flow_counts(), [2, 0]);
    }
    bench.lab.reset();
    bench.world = Default::default();
    let index = exposed_directly(bench, &[Where::Here]);
    policy(bench, index, 0);
    open(bench, balancer::<F>());
}

fn a_tunnelled_request_goes_to_backends_here_only<F: TestFamily>(bench: &mut Bench<F>) {
    let places = [Where::Elsewhere, Where::Here, Where::Elsewhere];
    exposed_directly(bench, &places);
    for port in 1000..1020 {
        let from = at(F::outside(), port);
        let frame = tunnelled(bench, from, balancer::<F>(), SYN);
        let end = End::Onward(tuple(from, here::<F>()));
        bench.expect_frame(Place::FromDevice, &frame, Reason::FlowCreated, end);
    }
}

fn a_tunnelled_request_without_a_backend_here_is_dropped<F: TestFamily>(bench: &mut Bench<F>) {
    for places in [&[][..], &[Where::Elsewhere]] {
        bench.lab.reset();
        bench.world = Default::default();
        exposed_directly(bench, places);
        for front in remote_fronts::<F>() {
            let frame = tunnelled(bench, client::<F>(), front, SYN);
            let (reason, end) = (Reason::NoLocalEndpoint, End::Dropped);
            bench.expect_frame(Place::FromDevice, &frame, reason, end);
            if bench.is_tcp() {
                let frame = tunnelled(bench, client::<F>(), front, ACK);
                let (reason, end) = (Reason::UnknownTcpFlow, End::Dropped);
                bench.expect_frame(Place::FromDevice, &frame, reason, end);
            }
        }
    }
}

fn what_came_in_a_tunnel_is_never_tunnelled_again<F: TestFamily>(bench: &mut Bench<F>) {
    let index = exposed_directly(bench, &[Where::Elsewhere]);
    let ends = [client::<F>(), balancer::<F>()];
    bench.expect(Place::FromDevice, ends, SYN, Reason::FlowCreated, tunnel::<F>());
    bench.expect(Place::FromDevice, ends, ACK, Reason::Request, tunnel::<F>());
    let frame = tunnelled(bench, ends[0], ends[1], SYN);
    bench.expect_frame(Place::FromDevice, &frame, Reason::NoLocalEndpoint, End::Dropped);
    let frame = tunnelled(bench, ends[0], ends[1], ACK);
    let reason = if bench.is_tcp() { Reason::UnknownTcpFlow } else { Reason::NoLocalEndpoint };
    bench.expect_frame(Place::FromDevice, &frame, reason, End::Dropped);
    bench.world.add_backend(index, here::<F>(), Where::Here);
    bench.update();
    open(bench, balancer::<F>());
}

fn strangers_tunnels_are_left_alone<F: TestFamily>(bench: &mut Bench<F>) {
    exposed_directly(bench, &[Where::Here]);
    let protocol = bench.protocol;
    let plain = |from| Frame::of(protocol, from, balancer::<F>(), SYN);
    let client = client::<F>();
    let pod = at(F::remote_pod(8), 45_000);
    let node = at(F::other_node(), 45_000);
    let frames = [
        // From nobody we know.
        plain(client).tunnel(F::outside(), F::node()),
        plain(client).tunnel(F::remote_pod(8), F::node()),
        // To somebody else.
        plain(client).tunnel(F::other_node(), F::pod(3)),
        // What a CNI tunnels.
        plain(pod).tunnel(F::other_node(), F::node()),
        plain(node).tunnel(F::other_node(), F::node()),
    ];
    for frame in frames {
        let outcome = bench.send_frame(Place::FromDevice, &frame);
        assert_eq!(outcome.end, End::Untouched, "{frame:?}");
        assert!([Reason::NoFlow, Reason::NotService].contains(&outcome.reason), "{outcome:?}");
    }
    assert_eq!(bench.flow_counts(), [0, 0]);
    // The way out of a pod, or of this node, is no way in.
    let frame = plain(client).tunnel(F::other_node(), F::node());
    for place in [Place::FromPod, Place::ToDevice, Place::ToDeviceForwarded, Place::Loopback] {
        assert_eq!(bench.send_frame(place, &frame).end, End::Untouched, "{place:?}");
    }
}

fn what_is_for_nobody_here_stays_in_its_tunnel<F: TestFamily>(bench: &mut Bench<F>) {
    exposed_directly(bench, &[Where::Here]);
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
            let frame = tunnelled(bench, client, to, flags);
            let outcome = bench.send_frame(Place::FromDevice, &frame);
            assert_eq!(outcome.end, End::Untouched, "{frame:?}");
        }
    }
    let protocol = if F::NUMBER == 4 { 4 } else { 41 };
    for body in [Body::Other(protocol), Body::Other(132), Body::Icmp(F::ECHO_REQUEST, 0)] {
        let frame = Frame::new(client, balancer::<F>(), body).tunnel(F::other_node(), F::node());
        assert_eq!(bench.send_frame(Place::FromDevice, &frame).end, End::Untouched, "{frame:?}");
    }
    // A tunnel in a tunnel.
    let inside = Frame::<F>::of(bench.protocol, client, balancer::<F>(), SYN)
        .tunnel(F::other_node(), F::node());
    let twice = crate::tunnel::wrapped::<F>(&inside.bytes(), [F::other_node(), F::node()]);
    assert_eq!(bench.lab.send(Place::FromDevice, &twice).end, End::Untouched);
    assert_eq!(bench.flow_counts(), [0, 0]);
}

/// The error of a router about `sent`.
fn error<F: TestFamily>(bench: &Bench<F>, sent: &Tuple<F::Address>) -> Frame<F> {
    let [from, to] = [at(sent.source, 0), at(sent.destination, 0)];
    let [source_port, destination_port] = [sent.source_port, sent.destination_port];
    let from = Endpoint { port: source_port, ..from };
    let to = Endpoint { port: destination_port, ..to };
    let quoted = Frame::<F>::of(bench.protocol, from, to, ACK).bytes();
    let kind = Body::Icmp(F::SOME_ICMP_ERROR, 1);
    Frame::new(at(F::vip_elsewhere(77), 0), at(sent.source, 0), kind).payload(&quoted[14..])
}

fn errors_about_replies_find_the_backend<F: TestFamily>(bench: &mut Bench<F>) {
    // The node that clients send to passes them on.
    exposed_directly(bench, &[Where::Elsewhere]);
    for front in fronts::<F>() {
        let ends = [client::<F>(), front];
        bench.expect(Place::FromDevice, ends, SYN, Reason::FlowCreated, tunnel::<F>());
        let frame = error(bench, &tuple(front, client::<F>()));
        bench.expect_frame(Place::FromDevice, &frame, Reason::IcmpTranslated, tunnel::<F>());
        let last = frame.hops(1);
        bench.expect_frame(Place::FromDevice, &last, Reason::TtlExceeded, End::Dropped);
    }
    // The backend's node knows whom they are for, and what was sent.
    for front in remote_fronts::<F>() {
        bench.lab.reset();
        bench.world = Default::default();
        exposed_directly(bench, &[Where::Here]);
        let talk = open(bench, front);
        answer(bench, &talk, SYN | ACK);
        let frame = error(bench, &tuple(front, client::<F>()));
        let frame = frame.tunnel(F::other_node(), F::node());
        let onward = tuple(at(F::vip_elsewhere(77), 0), at(here::<F>().address, 0));
        let end = End::Onward(onward);
        bench.expect_frame(Place::FromDevice, &frame, Reason::IcmpTranslated, end);
        assert_eq!(bench.lab.quoted(), Some(talk.sent.reversed()));
    }
}

fn errors_of_a_backend_reach_the_client_from_the_service<F: TestFamily>(bench: &mut Bench<F>) {
    exposed_directly(bench, &[Where::Here]);
    let front = at(F::other_node(), NODE_PORT);
    let talk = open(bench, front);
    let quoted = Frame::<F>::of(bench.protocol, talk.client, here::<F>(), SYN).bytes();
    let kind = Body::Icmp(F::SOME_ICMP_ERROR, 1);
    let [from, to] = [at(here::<F>().address, 0), at(talk.client.address, 0)];
    let frame = Frame::<F>::new(from, to, kind).payload(&quoted[14..]);
    let end = End::Onward(tuple(at(front.address, 0), to));
    bench.expect_frame(Place::ToDeviceForwarded, &frame, Reason::IcmpTranslated, end);
    assert_eq!(bench.lab.quoted(), Some(tuple(talk.client, front)));
}

fn fragments_are_tunnelled_and_unpacked<F: TestFamily>(bench: &mut Bench<F>) {
    exposed_directly(bench, &[Where::Elsewhere]);
    let ends = [client::<F>(), node_port::<F>()];
    let first = |to| Frame::<F>::of(UDP, ends[0], to, 0).fragment_of(9, 0, true);
    let later = |to| Frame::<F>::new(ends[0], to, Body::Other(UDP));
    let later = |to| later(to).fragment_of(9, 16, false);
    let frames = [first(ends[1]), later(ends[1])];
    let front = at(F::other_node(), NODE_PORT);
    let arriving = [first(front), later(front)].map(|it| it.tunnel(F::other_node(), F::node()));
    bench.expect_frame(Place::FromDevice, &frames[0], Reason::FlowCreated, tunnel::<F>());
    bench.expect_frame(Place::FromDevice, &frames[1], Reason::Request, tunnel::<F>());
    bench.lab.reset();
    bench.world = Default::default();
    exposed_directly(bench, &[Where::Here]);
    let sent = tuple(ends[0], here::<F>());
    let end = End::Onward(sent);
    bench.expect_frame(Place::FromDevice, &arriving[0], Reason::FlowCreated, end);
    let end = End::Onward(tuple(at(sent.source, 0), at(sent.destination, 0)));
    bench.expect_frame(Place::FromDevice, &arriving[1], Reason::Request, end);
}

fn the_segment_size_leaves_room_for_the_tunnel<F: TestFamily>(bench: &mut Bench<F>) {
    exposed_directly(bench, &[Where::Here]);
    let front = balancer::<F>();
    let talk = open(bench, front);
    answer(bench, &talk, SYN | ACK);
    // Without the option, or with one that is too small already, nothing changes.
    let back = End::Onward(tuple(front, talk.client));
    for options in [&[][..], &[1, 1, 1, 1], &[2, 4, 1, 0], &[1, 2, 4, 5, 0xb4, 1, 1, 1]] {
        let mut frame = Frame::<F>::of(TCP, here::<F>(), talk.client, SYN | ACK);
        frame.tcp_options = options.to_vec();
        bench.expect_frame(Place::ToDeviceForwarded, &frame, Reason::Reply, back);
    }
    // A client that came without a tunnel keeps its segments.
    let other = at(F::outside(), 1000);
    let talk = bench.open(Place::FromDevice, other, front);
    bench.reply(&talk, SYN | ACK);
}

fn a_flow_seen_one_way_is_established_by_its_client<F: TestFamily>(bench: &mut Bench<F>) {
    exposed_directly(bench, &[Where::Elsewhere]);
    let ends = [client::<F>(), node_port::<F>()];
    bench.expect(Place::FromDevice, ends, SYN, Reason::FlowCreated, tunnel::<F>());
    assert_eq!(bench.flow_counts(), [0, 1]);
    bench.expect(Place::FromDevice, ends, SYN, Reason::Request, tunnel::<F>());
    assert_eq!(bench.flow_counts(), [0, 1]);
    bench.expect(Place::FromDevice, ends, ACK, Reason::Request, tunnel::<F>());
    assert_eq!(bench.flow_counts(), [1, 0]);
    bench.wait(seconds::TCP_ESTABLISHED - 1);
    bench.expect(Place::FromDevice, ends, ACK, Reason::Request, tunnel::<F>());
    bench.wait(seconds::TCP_ESTABLISHED + 1);
    bench.expect(Place::FromDevice, ends, ACK, Reason::UnknownTcpFlow, End::Untouched);
}

fn a_flow_seen_one_way_ends_with_its_client<F: TestFamily>(bench: &mut Bench<F>) {
    for (flags, lives) in [(FIN | ACK, seconds::TCP_FIN_ONE_WAY), (RST | ACK, seconds::TCP_CLOSING)]
    {
        bench.lab.reset();
        bench.world = Default::default();
        exposed_directly(bench, &[Where::Elsewhere]);
        let ends = [client::<F>(), node_port::<F>()];
        bench.expect(Place::FromDevice, ends, SYN, Reason::FlowCreated, tunnel::<F>());
        for flags in [ACK, flags, ACK] {
            bench.expect(Place::FromDevice, ends, flags, Reason::Request, tunnel::<F>());
        }
        // The client may still be receiving, and says so.
        for _ in 0..3 {
            bench.wait(lives - 1);
            bench.expect(Place::FromDevice, ends, ACK, Reason::Request, tunnel::<F>());
        }
        bench.wait(lives + 1);
        bench.expect(Place::FromDevice, ends, ACK, Reason::UnknownTcpFlow, End::Untouched);
        bench.expect(Place::FromDevice, ends, SYN, Reason::FlowCreated, tunnel::<F>());
    }
}

fn a_datagram_flow_seen_one_way_keeps_its_backend<F: TestFamily>(bench: &mut Bench<F>) {
    exposed_directly(bench, &[Where::Elsewhere]);
    let ends = [client::<F>(), node_port::<F>()];
    bench.expect(Place::FromDevice, ends, 0, Reason::FlowCreated, tunnel::<F>());
    bench.wait(seconds::UDP_ANSWERED - 1);
    bench.expect(Place::FromDevice, ends, 0, Reason::Request, tunnel::<F>());
    bench.wait(seconds::UDP_ANSWERED + 1);
    bench.expect(Place::FromDevice, ends, 0, Reason::FlowCreated, tunnel::<F>());
}

fn a_datagram_flow_seen_one_way_leaves_a_backend_that_is_gone<F: TestFamily>(bench: &mut Bench<F>) {
    let index = exposed_directly(bench, &[Where::Elsewhere]);
    let ends = [client::<F>(), node_port::<F>()];
    bench.expect(Place::FromDevice, ends, 0, Reason::FlowCreated, tunnel::<F>());
    let gone = bench.world.backends.len() as u32 - 1;
    bench.world.add_backend(index, here::<F>(), Where::Here);
    bench.world.remove_backend(gone);
    bench.update();
    let end = End::Onward(tuple(ends[0], here::<F>()));
    bench.expect(Place::FromDevice, ends, 0, Reason::FlowCreated, end);
    assert_eq!(bench.lab.flows(FlowTable::Flows).len(), 2);
}
