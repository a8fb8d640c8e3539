//! ICMP errors about translated flows (docs/contract.md, section 7): source, destination and the
//! packet that they quote.

use lb_common::{
    abi::{counter::Reason, flow::Tuple},
    packet::{ACK, FIN, RST, SYN},
};

use super::outside::{NODE_PORT, balancer, client, exposed, node_port};
use super::setup::*;
use crate::{
    flow::{TestFlow, tuple},
    frame::{Body, ETHERNET, Frame},
    interpreter::{Fate, Outcome},
    world::seconds,
};

cases! {
    BOTH => errors_of_a_backend_reach_the_client,
    BOTH => errors_of_a_client_reach_the_backend,
    BOTH => a_router_keeps_its_address_where_its_errors_may_pass,
    BOTH => errors_about_a_handshake_reach_the_client,
    BOTH => every_kind_of_error_is_translated,
    BOTH => a_redirect_is_left_alone,
    BOTH => quotes_of_every_length_are_translated,
    BOTH => quotes_with_options_are_translated,
    BOTH => errors_change_nothing_of_the_flow,
    BOTH => errors_about_no_known_flow_are_left_alone,
    BOTH => errors_about_an_expired_flow_are_left_alone,
    BOTH => errors_to_others_than_the_sender_are_left_alone,
    BOTH => errors_that_cannot_be_read_are_left_alone,
    BOTH => an_error_whose_ttl_ends_here_is_not_forwarded,
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
    let fate = bytes.len().min(ETHERNET + length);
    Frame::new(at(from, 0), at(to, 0), kind::<F>()).payload(&bytes[ETHERNET..fate])
}

/// The error of `reporter` about the packet `sent`.
fn about<F: TestFamily>(
    scene: &Scene<F>,
    reporter: F::Address,
    sent: &Tuple<F::Address>,
) -> Frame<F> {
    let from = at(sent.source, sent.source_port.get());
    let to = at(sent.destination, sent.destination_port.get());
    error(reporter, sent.source, &Frame::of(scene.protocol, from, to, ACK), 200)
}

/// The addresses of an error.
fn ends<F: TestFamily>(source: F::Address, destination: F::Address) -> Tuple<F::Address> {
    tuple(at(source, 0), at(destination, 0))
}

#[track_caller]
fn expect<F: TestFamily>(
    scene: &mut Scene<F>,
    site: TestSite,
    frame: &Frame<F>,
    fate: Fate<F::Address>,
    quoted: Tuple<F::Address>,
) {
    scene.expect_frame(site, frame, Reason::IcmpTranslated, fate);
    assert_eq!(scene.interpreter.quoted(), Some(quoted), "{frame:?} at {site:?}");
}

/// Does `check` with a flow of every client to every kind of backend.
pub(super) fn with_all<F: TestFamily>(
    scene: &mut Scene<F>,
    check: fn(&mut Scene<F>, &TestFlow<F::Address>),
) {
    let frontends = [
        (TestSite::FromPod, pod::<F>(), web::<F>()),
        (TestSite::FromPod, pod::<F>(), node_port::<F>()),
        (TestSite::ToDevice, process::<F>(), web::<F>()),
        (TestSite::FromDevice, client::<F>(), web::<F>()),
        (TestSite::FromDevice, client::<F>(), node_port::<F>()),
        (TestSite::FromDevice, client::<F>(), balancer::<F>()),
        (TestSite::Loopback, process::<F>(), node_port::<F>()),
        (TestSite::Loopback, at(F::loopback(), 50_001), at(F::loopback(), NODE_PORT)),
    ];
    for (site, client, frontend) in frontends {
        for backend in [Location::LocalPod, Location::OtherNode, Location::ThisHost] {
            scene.reset();
            exposed(scene, &[backend]);
            let flow = scene.connect(site, client, frontend);
            // A process of this node gets packets of local clients without translation.
            let straight = matches!(flow.fate, Fate::Translated(_));
            if backend != Location::ThisHost || !straight || site == TestSite::Loopback {
                check(scene, &flow);
            }
        }
    }
    scene.reset();
    let index = scene.world.add_service(web::<F>(), scene.protocol);
    scene.world.add_backend(index, at(F::pod(1), 8080), Location::LocalPod);
    scene.update();
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    check(scene, &flow);
}

fn errors_of_a_backend_reach_the_client<F: TestFamily>(scene: &mut Scene<F>) {
    with_all(scene, |scene, flow| {
        let frame = about(scene, flow.sent.destination, &flow.sent);
        let translated = ends::<F>(flow.frontend.address, flow.client.address);
        let (site, fate) = flow.reply_path(translated);
        expect(scene, site, &frame, fate, tuple(flow.client, flow.frontend));
        scene.reply(flow, ACK);
    });
}

fn errors_of_a_client_reach_the_backend<F: TestFamily>(scene: &mut Scene<F>) {
    with_all(scene, |scene, flow| {
        let frame = about(scene, flow.client.address, &tuple(flow.frontend, flow.client));
        let translated = ends::<F>(flow.sent.source, flow.sent.destination);
        expect(scene, flow.site, &frame, flow.request_fate(translated), flow.sent.reversed());
        scene.request(flow, ACK);
    });
}

fn a_router_keeps_its_address_where_its_errors_may_pass<F: TestFamily>(scene: &mut Scene<F>) {
    let router = F::remote_pod(250);
    exposed(scene, &[Location::OtherNode]);
    for (site, who) in clients::<F>() {
        let flow = scene.connect(site, who, web::<F>());
        let frame = about(scene, router, &flow.sent);
        let (site, fate) = flow.reply_path(ends::<F>(router, who.address));
        expect(scene, site, &frame, fate, tuple(who, web::<F>()));
    }
    let flow = scene.connect(TestSite::FromDevice, client::<F>(), node_port::<F>());
    let frame = about(scene, router, &flow.sent);
    let (site, fate) = flow.reply_path(ends::<F>(node_port::<F>().address, F::outside()));
    expect(scene, site, &frame, fate, tuple(flow.client, flow.frontend));
    let frame = about(scene, router, &tuple(flow.frontend, flow.client));
    let fate = flow.request_fate(ends::<F>(flow.sent.source, flow.sent.destination));
    expect(scene, flow.site, &frame, fate, flow.sent.reversed());

    scene.reset();
    exposed(scene, &[Location::LocalPod]);
    let flow = scene.connect(TestSite::FromDevice, client::<F>(), balancer::<F>());
    let frame = about(scene, router, &tuple(flow.frontend, flow.client));
    let fate = flow.request_fate(ends::<F>(router, flow.sent.destination));
    expect(scene, flow.site, &frame, fate, flow.sent.reversed());
}

fn errors_about_a_handshake_reach_the_client<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::OtherNode]);
    let flows = [(TestSite::FromPod, pod::<F>()), (TestSite::FromDevice, client::<F>())];
    for (site, who) in flows {
        let flow = scene.open(site, who, web::<F>());
        let frame = about(scene, flow.sent.destination, &flow.sent);
        let (site, fate) = flow.reply_path(ends::<F>(flow.frontend.address, flow.client.address));
        expect(scene, site, &frame, fate, tuple(flow.client, flow.frontend));
    }
}

fn every_kind_of_error_is_translated<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let kinds: &[_] = if F::NUMBER == 4 {
        &[(3, 0), (3, 1), (3, 3), (3, 4), (3, 13), (11, 0), (11, 1), (12, 0)]
    } else {
        &[(1, 0), (1, 3), (1, 4), (2, 0), (3, 0), (3, 1), (4, 0), (4, 1)]
    };
    for (icmp_type, code) in kinds {
        let mut frame = about(scene, flow.sent.destination, &flow.sent);
        frame.body = Body::Icmp(*icmp_type, *code);
        let (site, fate) = flow.reply_path(ends::<F>(flow.frontend.address, flow.client.address));
        expect(scene, site, &frame, fate, tuple(flow.client, flow.frontend));
    }
}

fn a_redirect_is_left_alone<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let mut frame = about(scene, F::node(), &flow.sent);
    frame.body = Body::Icmp(F::REDIRECT, 1);
    is_left_alone(scene, TestSite::ToPod, &frame);
}

fn quotes_of_every_length_are_translated<F: TestFamily>(scene: &mut Scene<F>) {
    let header = if F::NUMBER == 4 { 20 } else { 40 };
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let (from, to) = (at(flow.sent.source, flow.sent.source_port.get()), flow.backend());
    let quoted = Frame::of(scene.protocol, from, to, ACK).payload(&[7; 1300]);
    let (site, fate) = flow.reply_path(ends::<F>(flow.frontend.address, flow.client.address));
    for length in (8..60).chain([127, 128, 129, 520, 1200]) {
        let frame = error::<F>(to.address, from.address, &quoted, header + length);
        expect(scene, site, &frame, fate, tuple(flow.client, flow.frontend));
    }
}

fn quotes_with_options_are_translated<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let (from, to) = (at(flow.sent.source, flow.sent.source_port.get()), flow.backend());
    let (site, fate) = flow.reply_path(ends::<F>(flow.frontend.address, flow.client.address));
    for options in &super::shape::padding::<F>()[..2] {
        let quoted = Frame::of(scene.protocol, from, to, ACK).options(options);
        let frame = error::<F>(to.address, from.address, &quoted, 200).options(options);
        expect(scene, site, &frame, fate, tuple(flow.client, flow.frontend));
    }
    let first = Frame::of(scene.protocol, from, to, ACK).fragment(0, true);
    let frame = error::<F>(to.address, from.address, &first, 200);
    expect(scene, site, &frame, fate, tuple(flow.client, flow.frontend));
}

fn errors_change_nothing_of_the_flow<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.wait(10);
    let before = scene.interpreter.flows();
    for flags in [RST, FIN | ACK, SYN] {
        let (from, to) = (at(flow.sent.source, flow.sent.source_port.get()), flow.backend());
        let quoted = Frame::of(scene.protocol, from, to, flags);
        let frame = error::<F>(to.address, from.address, &quoted, 200);
        let (site, fate) = flow.reply_path(ends::<F>(flow.frontend.address, flow.client.address));
        expect(scene, site, &frame, fate, tuple(flow.client, flow.frontend));
    }
    assert_eq!(scene.interpreter.flows(), before);
}

/// Asserts that an error passes untouched, or, addressed to a live ClusterIP, is dropped.
#[track_caller]
fn is_left_alone<F: TestFamily>(scene: &mut Scene<F>, site: TestSite, frame: &Frame<F>) {
    let outcome = scene.send_frame(site, frame);
    let expected = if frame.destination.address == web::<F>().address {
        Outcome { reason: Reason::IcmpError, fate: Fate::Dropped }
    } else {
        Outcome { reason: Reason::NoFlow, fate: Fate::Untouched }
    };
    assert_eq!(outcome, expected, "{frame:?} at {site:?}");
    assert_eq!(scene.interpreter.quoted(), None);
}

fn errors_about_no_known_flow_are_left_alone<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::OtherNode]);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let mut other = flow.sent;
    other.source_port = pod::<F>().port;
    other.destination_port = web::<F>().port;
    let frame = about(scene, other.destination, &other);
    is_left_alone(scene, TestSite::ToPod, &frame);
    let strange = tuple(web::<F>(), at(F::pod(1), 1));
    let frame = about(scene, F::pod(1), &strange);
    is_left_alone(scene, TestSite::FromPod, &frame);
    let frame = about(scene, F::outside(), &tuple(node_port::<F>(), client::<F>()));
    is_left_alone(scene, TestSite::FromDevice, &frame);
    let frame = about(scene, F::outside(), &tuple(at(F::remote_pod(9), 1), client::<F>()));
    let untouched = (Reason::NotService, Fate::Untouched);
    scene.expect_frame(TestSite::FromDevice, &frame, untouched.0, untouched.1);
    scene.expect_lookups(0);
}

fn errors_about_an_expired_flow_are_left_alone<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let flow = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.wait(seconds::TCP_SYN + 1);
    let frame = about(scene, flow.sent.destination, &flow.sent);
    is_left_alone(scene, TestSite::ToPod, &frame);
}

fn errors_to_others_than_the_sender_are_left_alone<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let mut frame = about(scene, flow.sent.destination, &flow.sent);
    frame.destination = at(F::pod(2), 0);
    is_left_alone(scene, TestSite::ToPod, &frame);
    let mut frame = about(scene, flow.client.address, &tuple(flow.frontend, flow.client));
    frame.destination = at(F::node(), 0);
    is_left_alone(scene, TestSite::FromPod, &frame);
}

fn errors_that_cannot_be_read_are_left_alone<F: TestFamily>(scene: &mut Scene<F>) {
    let header = if F::NUMBER == 4 { 20 } else { 40 };
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let (from, to) = (at(flow.sent.source, flow.sent.source_port.get()), flow.backend());
    let quoted = Frame::of(scene.protocol, from, to, ACK);
    for length in 0..header + 4 {
        let frame = error::<F>(to.address, from.address, &quoted, length);
        is_left_alone(scene, TestSite::ToPod, &frame);
    }
    let later = quoted.clone().fragment(1480, false);
    let ping = Frame::new(from, to, Body::Icmp(F::ECHO_REQUEST, 0));
    for quoted in [later, ping] {
        let frame = error::<F>(to.address, from.address, &quoted, 200);
        is_left_alone(scene, TestSite::ToPod, &frame);
    }
    let mut frame = error::<F>(to.address, from.address, &quoted, 200);
    frame.payload[0] ^= 0xf0;
    is_left_alone(scene, TestSite::ToPod, &frame);
}

fn an_error_whose_ttl_ends_here_is_not_forwarded<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::OtherNode]);
    let flow = scene.connect(TestSite::FromDevice, client::<F>(), node_port::<F>());
    let mut bytes = about(scene, flow.sent.destination, &flow.sent).bytes();
    bytes[F::TTL] = 1;
    let outcome = scene.interpreter.send(TestSite::FromDevice, &bytes);
    assert_eq!(outcome, Outcome { reason: Reason::TtlExceeded, fate: Fate::Dropped });
}
