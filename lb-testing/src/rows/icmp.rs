//! ICMP errors about translated flows (docs/semantics.md, section 7): who gets them, from whom, and
//! what they say was sent.

use lb_common::{
    abi::{counter::Reason, flow::Tuple},
    balance::FlowTable,
    packet::{ACK, FIN, RST, SYN},
};

use super::outside::{NODE_PORT, balancer, client, exposed, node_port};
use super::setup::*;
use crate::{
    bench::{End, Outcome, Talk, tuple},
    frame::{Body, ETHERNET, Frame},
    world::seconds,
};

rows! {
    BOTH => errors_of_a_backend_reach_the_client,
    BOTH => errors_of_a_client_reach_the_backend,
    BOTH => a_router_stays_who_it_is_where_it_is_let_through,
    BOTH => errors_about_a_handshake_reach_the_client,
    BOTH => every_kind_of_error_is_translated,
    BOTH => a_redirect_is_left_alone,
    BOTH => quotes_of_every_length_are_translated,
    BOTH => quotes_with_options_are_translated,
    BOTH => errors_change_nothing_of_the_flow,
    BOTH => errors_about_no_known_flow_are_left_alone,
    BOTH => errors_about_a_flow_that_is_over_are_left_alone,
    BOTH => errors_for_somebody_else_than_the_sender_are_left_alone,
    BOTH => errors_that_cannot_be_read_are_left_alone,
    BOTH => an_error_at_the_end_of_its_hops_is_not_forwarded,
}

/// Any kind of error.
fn kind<F: TestFamily>() -> Body {
    Body::Icmp(F::SOME_ICMP_ERROR, 1)
}

/// An error that quotes the first `length` bytes of `quoted` behind its Ethernet header.
fn error<F: TestFamily>(
    from: F::Address,
    to: F::Address,
    quoted: &Frame<F>,
    length: usize,
) -> Frame<F> {
    let bytes = quoted.bytes();
    let end = bytes.len().min(ETHERNET + length);
    Frame::new(at(from, 0), at(to, 0), kind::<F>()).payload(&bytes[ETHERNET..end])
}

/// The error of `reporter` about a packet as `sent`.
fn about<F: TestFamily>(
    bench: &Bench<F>,
    reporter: F::Address,
    sent: &Tuple<F::Address>,
) -> Frame<F> {
    let from = at(sent.source, sent.source_port.get());
    let to = at(sent.destination, sent.destination_port.get());
    error(reporter, sent.source, &Frame::of(bench.protocol, from, to, ACK), 200)
}

/// The addresses of an error.
fn ends<F: TestFamily>(source: F::Address, destination: F::Address) -> Tuple<F::Address> {
    tuple(at(source, 0), at(destination, 0))
}

#[track_caller]
fn expect<F: TestFamily>(
    bench: &mut Bench<F>,
    place: Place,
    frame: &Frame<F>,
    end: End<F::Address>,
    quoted: Tuple<F::Address>,
) {
    bench.expect_frame(place, frame, Reason::IcmpTranslated, end);
    assert_eq!(bench.lab.quoted(), Some(quoted), "{frame:?} at {place:?}");
}

/// Does `check` with a flow of every client to every kind of backend.
pub(super) fn with_all<F: TestFamily>(
    bench: &mut Bench<F>,
    check: fn(&mut Bench<F>, &Talk<F::Address>),
) {
    let fronts = [
        (Place::FromPod, pod::<F>(), web::<F>()),
        (Place::FromPod, pod::<F>(), node_port::<F>()),
        (Place::ToDevice, process::<F>(), web::<F>()),
        (Place::FromDevice, client::<F>(), web::<F>()),
        (Place::FromDevice, client::<F>(), node_port::<F>()),
        (Place::FromDevice, client::<F>(), balancer::<F>()),
        (Place::Loopback, process::<F>(), node_port::<F>()),
        (Place::Loopback, at(F::loopback(), 50_001), at(F::loopback(), NODE_PORT)),
    ];
    for (place, client, front) in fronts {
        for backend in [Where::Here, Where::Elsewhere, Where::Host] {
            bench.lab.reset();
            bench.world = Default::default();
            exposed(bench, &[backend]);
            let talk = bench.connect(place, client, front);
            // A process of this node gets the packets of clients that it can see unchanged.
            let straight = matches!(talk.end, End::Onward(_));
            if backend != Where::Host || !straight || place == Place::Loopback {
                check(bench, &talk);
            }
        }
    }
    bench.lab.reset();
    bench.world = Default::default();
    let index = bench.world.add_service(web::<F>(), bench.protocol);
    bench.world.add_backend(index, at(F::pod(1), 8080), Where::Here);
    bench.update();
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    check(bench, &talk);
}

fn errors_of_a_backend_reach_the_client<F: TestFamily>(bench: &mut Bench<F>) {
    with_all(bench, |bench, talk| {
        let frame = about(bench, talk.sent.destination, &talk.sent);
        let onward = ends::<F>(talk.front.address, talk.client.address);
        let (place, end) = talk.way_back(onward);
        expect(bench, place, &frame, end, tuple(talk.client, talk.front));
        bench.reply(talk, ACK);
    });
}

fn errors_of_a_client_reach_the_backend<F: TestFamily>(bench: &mut Bench<F>) {
    with_all(bench, |bench, talk| {
        let frame = about(bench, talk.client.address, &tuple(talk.front, talk.client));
        let onward = ends::<F>(talk.sent.source, talk.sent.destination);
        expect(bench, talk.place, &frame, talk.way_there(onward), talk.sent.reversed());
        bench.request(talk, ACK);
    });
}

fn a_router_stays_who_it_is_where_it_is_let_through<F: TestFamily>(bench: &mut Bench<F>) {
    let router = F::remote_pod(250);
    exposed(bench, &[Where::Elsewhere]);
    for (place, who) in clients::<F>() {
        let talk = bench.connect(place, who, web::<F>());
        let frame = about(bench, router, &talk.sent);
        let (place, end) = talk.way_back(ends::<F>(router, who.address));
        expect(bench, place, &frame, end, tuple(who, web::<F>()));
    }
    let talk = bench.connect(Place::FromDevice, client::<F>(), node_port::<F>());
    let frame = about(bench, router, &talk.sent);
    let (place, end) = talk.way_back(ends::<F>(node_port::<F>().address, F::outside()));
    expect(bench, place, &frame, end, tuple(talk.client, talk.front));
    let frame = about(bench, router, &tuple(talk.front, talk.client));
    let end = talk.way_there(ends::<F>(talk.sent.source, talk.sent.destination));
    expect(bench, talk.place, &frame, end, talk.sent.reversed());

    bench.lab.reset();
    bench.world = Default::default();
    exposed(bench, &[Where::Here]);
    let talk = bench.connect(Place::FromDevice, client::<F>(), balancer::<F>());
    let frame = about(bench, router, &tuple(talk.front, talk.client));
    let end = talk.way_there(ends::<F>(router, talk.sent.destination));
    expect(bench, talk.place, &frame, end, talk.sent.reversed());
}

fn errors_about_a_handshake_reach_the_client<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Elsewhere]);
    let flows = [(Place::FromPod, pod::<F>()), (Place::FromDevice, client::<F>())];
    for (place, who) in flows {
        let talk = bench.open(place, who, web::<F>());
        let frame = about(bench, talk.sent.destination, &talk.sent);
        let (place, end) = talk.way_back(ends::<F>(talk.front.address, talk.client.address));
        expect(bench, place, &frame, end, tuple(talk.client, talk.front));
    }
}

fn every_kind_of_error_is_translated<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    let kinds: &[_] = if F::NUMBER == 4 {
        &[(3, 0), (3, 1), (3, 3), (3, 4), (3, 13), (11, 0), (11, 1), (12, 0)]
    } else {
        &[(1, 0), (1, 3), (1, 4), (2, 0), (3, 0), (3, 1), (4, 0), (4, 1)]
    };
    for (icmp_type, code) in kinds {
        let mut frame = about(bench, talk.sent.destination, &talk.sent);
        frame.body = Body::Icmp(*icmp_type, *code);
        let (place, end) = talk.way_back(ends::<F>(talk.front.address, talk.client.address));
        expect(bench, place, &frame, end, tuple(talk.client, talk.front));
    }
}

fn a_redirect_is_left_alone<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    let mut frame = about(bench, F::node(), &talk.sent);
    frame.body = Body::Icmp(F::REDIRECT, 1);
    is_left_alone(bench, Place::ToPod, &frame);
}

fn quotes_of_every_length_are_translated<F: TestFamily>(bench: &mut Bench<F>) {
    let header = if F::NUMBER == 4 { 20 } else { 40 };
    service(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    let (from, to) = (at(talk.sent.source, talk.sent.source_port.get()), talk.backend());
    let quoted = Frame::of(bench.protocol, from, to, ACK).payload(&[7; 1300]);
    let (place, end) = talk.way_back(ends::<F>(talk.front.address, talk.client.address));
    for length in (8..60).chain([127, 128, 129, 520, 1200]) {
        let frame = error::<F>(to.address, from.address, &quoted, header + length);
        expect(bench, place, &frame, end, tuple(talk.client, talk.front));
    }
}

fn quotes_with_options_are_translated<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    let (from, to) = (at(talk.sent.source, talk.sent.source_port.get()), talk.backend());
    let (place, end) = talk.way_back(ends::<F>(talk.front.address, talk.client.address));
    for options in &super::shape::padding::<F>()[..2] {
        let quoted = Frame::of(bench.protocol, from, to, ACK).options(options);
        let frame = error::<F>(to.address, from.address, &quoted, 200).options(options);
        expect(bench, place, &frame, end, tuple(talk.client, talk.front));
    }
    let first = Frame::of(bench.protocol, from, to, ACK).fragment(0, true);
    let frame = error::<F>(to.address, from.address, &first, 200);
    expect(bench, place, &frame, end, tuple(talk.client, talk.front));
}

fn errors_change_nothing_of_the_flow<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    bench.wait(10);
    let before = bench.lab.flows(FlowTable::Flows);
    for flags in [RST, FIN | ACK, SYN] {
        let (from, to) = (at(talk.sent.source, talk.sent.source_port.get()), talk.backend());
        let quoted = Frame::of(bench.protocol, from, to, flags);
        let frame = error::<F>(to.address, from.address, &quoted, 200);
        let (place, end) = talk.way_back(ends::<F>(talk.front.address, talk.client.address));
        expect(bench, place, &frame, end, tuple(talk.client, talk.front));
    }
    assert_eq!(bench.lab.flows(FlowTable::Flows), before);
}

/// Asserts that an error at each place goes on as it came, or, addressed to a live
/// ClusterIP, ends there.
#[track_caller]
fn is_left_alone<F: TestFamily>(bench: &mut Bench<F>, place: Place, frame: &Frame<F>) {
    let outcome = bench.send_frame(place, frame);
    let expected = if frame.destination.address == web::<F>().address {
        Outcome { reason: Reason::IcmpError, end: End::Dropped }
    } else {
        Outcome { reason: Reason::NoFlow, end: End::Untouched }
    };
    assert_eq!(outcome, expected, "{frame:?} at {place:?}");
    assert_eq!(bench.lab.quoted(), None);
}

fn errors_about_no_known_flow_are_left_alone<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Elsewhere]);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    let mut other = talk.sent;
    other.source_port = pod::<F>().port;
    other.destination_port = web::<F>().port;
    let frame = about(bench, other.destination, &other);
    is_left_alone(bench, Place::ToPod, &frame);
    let strange = tuple(web::<F>(), at(F::pod(1), 1));
    let frame = about(bench, F::pod(1), &strange);
    is_left_alone(bench, Place::FromPod, &frame);
    let frame = about(bench, F::outside(), &tuple(node_port::<F>(), client::<F>()));
    is_left_alone(bench, Place::FromDevice, &frame);
    let frame = about(bench, F::outside(), &tuple(at(F::remote_pod(9), 1), client::<F>()));
    let untouched = (Reason::NotService, End::Untouched);
    bench.expect_frame(Place::FromDevice, &frame, untouched.0, untouched.1);
    bench.expect_lookups(0);
}

fn errors_about_a_flow_that_is_over_are_left_alone<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    let talk = bench.open(Place::FromPod, pod::<F>(), web::<F>());
    bench.wait(seconds::TCP_SYN + 1);
    let frame = about(bench, talk.sent.destination, &talk.sent);
    is_left_alone(bench, Place::ToPod, &frame);
}

fn errors_for_somebody_else_than_the_sender_are_left_alone<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    let mut frame = about(bench, talk.sent.destination, &talk.sent);
    frame.destination = at(F::pod(2), 0);
    is_left_alone(bench, Place::ToPod, &frame);
    let mut frame = about(bench, talk.client.address, &tuple(talk.front, talk.client));
    frame.destination = at(F::node(), 0);
    is_left_alone(bench, Place::FromPod, &frame);
}

fn errors_that_cannot_be_read_are_left_alone<F: TestFamily>(bench: &mut Bench<F>) {
    let header = if F::NUMBER == 4 { 20 } else { 40 };
    service(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    let (from, to) = (at(talk.sent.source, talk.sent.source_port.get()), talk.backend());
    let quoted = Frame::of(bench.protocol, from, to, ACK);
    for length in 0..header + 4 {
        let frame = error::<F>(to.address, from.address, &quoted, length);
        is_left_alone(bench, Place::ToPod, &frame);
    }
    let later = quoted.clone().fragment(1480, false);
    let ping = Frame::new(from, to, Body::Icmp(F::ECHO_REQUEST, 0));
    for quoted in [later, ping] {
        let frame = error::<F>(to.address, from.address, &quoted, 200);
        is_left_alone(bench, Place::ToPod, &frame);
    }
    let mut frame = error::<F>(to.address, from.address, &quoted, 200);
    frame.payload[0] ^= 0xf0;
    is_left_alone(bench, Place::ToPod, &frame);
}

fn an_error_at_the_end_of_its_hops_is_not_forwarded<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Elsewhere]);
    let talk = bench.connect(Place::FromDevice, client::<F>(), node_port::<F>());
    let mut bytes = about(bench, talk.sent.destination, &talk.sent).bytes();
    bytes[F::HOPS] = 1;
    let outcome = bench.lab.send(Place::FromDevice, &bytes);
    assert_eq!(outcome, Outcome { reason: Reason::TtlExceeded, end: End::Dropped });
}
