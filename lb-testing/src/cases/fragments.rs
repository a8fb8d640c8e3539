//! IP fragments (docs/contract.md, section 7): later fragments follow the first one.

use lb_common::{
    abi::{counter::Reason, flow::Tuple},
    balance::Answer,
    packet::{ACK, SYN},
};

use super::icmp::with_all;
use super::outside::{client, exposed, node_port};
use super::setup::*;
use crate::{
    flow::{self, TestFlow, tuple},
    frame::{Body, Frame},
    interpreter::{Fate, Outcome},
    world::TICKS,
};

cases! {
    BOTH => all_fragments_of_a_request_take_the_same_path,
    BOTH => all_fragments_of_a_reply_take_the_same_path,
    BOTH => a_fragmented_packet_opens_a_flow,
    BOTH => fragments_of_different_datagrams_are_kept_apart,
    BOTH => a_fragment_before_the_first_is_dropped_if_it_is_for_a_service,
    BOTH => fragments_for_others_are_left_alone,
    BOTH => fragments_are_forgotten,
    BOTH => a_refused_datagram_is_refused_once,
    BOTH => later_fragments_do_not_change_the_flow,
    UDP_ONLY => a_datagram_all_in_one_fragment_is_whole,
    UDP_ONLY => fragments_of_other_protocols_are_dropped,
    BOTH => a_later_fragment_whose_ttl_ends_here_is_not_forwarded,
}

/// The offset of the bytes behind the first fragment.
const LATER: [(u16, bool); 2] = [(1480, true), (2960, false)];

fn frame<F: TestFamily>(scene: &Scene<F>, ends: [Endpoint<F::Address>; 2]) -> Frame<F> {
    Frame::of(scene.protocol, ends[0], ends[1], ACK)
}

/// The tuple of a later fragment, which has no ports.
fn without_ports<F: TestFamily>(tuple: &Tuple<F::Address>) -> Tuple<F::Address> {
    flow::tuple(at(tuple.source, 0), at(tuple.destination, 0))
}

/// Sends the fragments of a datagram of a known flow, and expects the same outcome for all.
#[track_caller]
fn send_all<F: TestFamily>(
    scene: &mut Scene<F>,
    site: TestSite,
    frame: &Frame<F>,
    reason: Reason,
    translated: Tuple<F::Address>,
    fate: impl Fn(Tuple<F::Address>) -> Fate<F::Address>,
) {
    let first = frame.clone().fragment(0, true);
    scene.expect_frame(site, &first, reason, fate(translated));
    for (offset, more) in LATER {
        let later = frame.clone().fragment(offset, more);
        scene.expect_frame(site, &later, reason, fate(without_ports::<F>(&translated)));
        // FRAGMENTS, and the table of flows: replies first.
        scene.expect_lookups(if reason == Reason::Reply { 2 } else { 3 });
    }
}

fn all_fragments_of_a_request_take_the_same_path<F: TestFamily>(scene: &mut Scene<F>) {
    with_all(scene, |scene, flow| {
        let frame = frame(scene, [flow.client, flow.frontend]);
        send_all(scene, flow.site, &frame, Reason::Request, flow.sent, |translated| {
            flow.request_fate(translated)
        });
    });
}

fn all_fragments_of_a_reply_take_the_same_path<F: TestFamily>(scene: &mut Scene<F>) {
    with_all(scene, |scene, flow| {
        let to = at(flow.sent.source, flow.sent.source_port.get());
        let frame = frame(scene, [flow.backend(), to]);
        let back = tuple(flow.frontend, flow.client);
        let (site, _) = flow.reply_path(back);
        send_all(scene, site, &frame, Reason::Reply, back, |translated| {
            flow.reply_path(translated).1
        });
    });
}

fn a_fragmented_packet_opens_a_flow<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 4);
    for port in 1000..1020 {
        let ends = [from_port(pod::<F>(), port), web::<F>()];
        let frame = Frame::of(scene.protocol, ends[0], ends[1], SYN);
        let first = frame.clone().fragment_of(port, 0, true);
        let opened = scene.send_frame(TestSite::FromPod, &first);
        assert_eq!(opened.reason, Reason::FlowCreated);
        let translated = opened.fate.tuple().expect("it is translated");
        for (offset, more) in LATER {
            let later = frame.clone().fragment_of(port, offset, more);
            let fate = Fate::Translated(without_ports::<F>(&translated));
            scene.expect_frame(TestSite::FromPod, &later, Reason::Request, fate);
        }
    }
}

fn fragments_of_different_datagrams_are_kept_apart<F: TestFamily>(scene: &mut Scene<F>) {
    let other = at(F::vip(1), 81);
    let index = scene.world.add_service(other, scene.protocol);
    scene.world.add_backend(index, at(F::remote_pod(9), 9090), Location::OtherNode);
    service(scene, 1);
    let ends = [[pod::<F>(), web::<F>()], [pod::<F>(), other]];
    let flows = ends.map(|[from, to]| scene.connect(TestSite::FromPod, from, to));
    let send =
        |scene: &mut Scene<F>, flow: &TestFlow<F::Address>, number: u16, part: (u16, bool)| {
            let frame =
                frame(scene, [flow.client, flow.frontend]).fragment_of(number, part.0, part.1);
            let translated = if part.0 == 0 { flow.sent } else { without_ports::<F>(&flow.sent) };
            scene.expect_frame(
                TestSite::FromPod,
                &frame,
                Reason::Request,
                Fate::Translated(translated),
            );
        };
    send(scene, &flows[0], 1, (0, true));
    send(scene, &flows[1], 2, (0, true));
    send(scene, &flows[0], 1, LATER[0]);
    send(scene, &flows[1], 2, LATER[0]);
    send(scene, &flows[0], 1, LATER[1]);
    // A client reuses an identification.
    send(scene, &flows[1], 1, (0, true));
    send(scene, &flows[1], 1, LATER[1]);
}

fn a_fragment_before_the_first_is_dropped_if_it_is_for_a_service<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    exposed(scene, &[Location::OtherNode]);
    for (site, client) in clients::<F>() {
        let flow = scene.connect(site, client, web::<F>());
        let later = frame(scene, [flow.client, flow.frontend]).fragment_of(77, 1480, false);
        scene.expect_frame(site, &later, Reason::Fragment, Fate::Dropped);
        let unknown = frame(scene, [client, at(F::vip(9), 80)]).fragment(1480, false);
        let outcome = scene.send_frame(site, &unknown);
        let leaves = matches!(site, TestSite::ToDevice);
        assert_eq!(outcome.fate, if leaves { Fate::Dropped } else { Fate::Untouched });
    }
    let untouched = (Reason::NoFlow, Fate::Untouched);
    let to_node = frame(scene, [client::<F>(), node_port::<F>()]).fragment(1480, false);
    scene.expect_frame(TestSite::FromDevice, &to_node, untouched.0, untouched.1);
    let into = frame(scene, [web::<F>(), pod::<F>()]).fragment(1480, false);
    scene.expect_frame(TestSite::ToPod, &into, untouched.0, untouched.1);
    scene.expect_lookups(1);
}

fn fragments_for_others_are_left_alone<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    for (offset, more) in [(0, true), (1480, true), (1480, false)] {
        let [(enters, pod), (leaves, process)] = clients::<F>();
        let of_pod = frame(scene, [pod, at(F::outside(), 80)]).fragment(offset, more);
        scene.expect_frame(enters, &of_pod, Reason::NotService, Fate::Untouched);
        scene.expect_lookups(0);
        let of_process = frame(scene, [process, at(F::outside(), 80)]).fragment(offset, more);
        scene.expect_frame(leaves, &of_process, Reason::NoFlow, Fate::Untouched);
        scene.expect_lookups(1);
    }
    assert_eq!(scene.flow_counts(), [0, 0]);
}

fn fragments_are_forgotten<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let frame = frame(scene, [flow.client, flow.frontend]);
    scene.expect_frame(
        TestSite::FromPod,
        &frame.clone().fragment(0, true),
        Reason::Request,
        Fate::Translated(flow.sent),
    );
    let translated = Fate::Translated(without_ports::<F>(&flow.sent));
    let later = frame.fragment(1480, false);
    scene.interpreter.advance(28 * TICKS);
    scene.expect_frame(TestSite::FromPod, &later, Reason::Request, translated);
    scene.interpreter.advance(3 * TICKS);
    scene.expect_frame(TestSite::FromPod, &later, Reason::Fragment, Fate::Dropped);
}

fn a_refused_datagram_is_refused_once<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 0);
    let refusal = scene.refusal();
    let frame = Frame::of(scene.protocol, pod::<F>(), web::<F>(), SYN);
    let first = frame.clone().fragment(0, true);
    scene.expect_frame(TestSite::FromPod, &first, Reason::NoEndpoint, refusal);
    let later = frame.fragment(1480, false);
    scene.expect_frame(TestSite::FromPod, &later, Reason::Fragment, Fate::Dropped);
}

fn later_fragments_do_not_change_the_flow<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let frame = frame(scene, [flow.client, flow.frontend]);
    let first = frame.clone().fragment(0, true);
    scene.expect_frame(TestSite::FromPod, &first, Reason::Request, Fate::Translated(flow.sent));
    let before = scene.interpreter.flows();
    // Every bit is set where a TCP header has its flags.
    let later = frame.payload(&[0xff; 40]).fragment(1480, true);
    let translated = Fate::Translated(without_ports::<F>(&flow.sent));
    scene.expect_frame(TestSite::FromPod, &later, Reason::Request, translated);
    assert_eq!(scene.interpreter.flows(), before);
}

fn a_datagram_all_in_one_fragment_is_whole<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let atomic = frame(scene, [flow.client, flow.frontend]).fragment(0, false);
    scene.expect_frame(TestSite::FromPod, &atomic, Reason::Request, Fate::Translated(flow.sent));
}

fn fragments_of_other_protocols_are_dropped<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let (from, to) = (pod::<F>(), web::<F>());
    for body in [Body::Icmp(F::ECHO_REQUEST, 0), Body::Other(132)] {
        for (offset, more) in [(0, true), (1480, false)] {
            let frame = Frame::<F>::new(from, to, body.clone()).fragment(offset, more);
            scene.expect_frame(TestSite::FromPod, &frame, Reason::Fragment, Fate::Dropped);
        }
    }
    let ping = Frame::<F>::new(from, to, Body::Icmp(F::ECHO_REQUEST, 0));
    let answered = Fate::Answered(Answer::Echo);
    scene.expect_frame(TestSite::FromPod, &ping, Reason::EchoAnswered, answered);
}

fn a_later_fragment_whose_ttl_ends_here_is_not_forwarded<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::OtherNode]);
    let flow = scene.connect(TestSite::FromDevice, client::<F>(), node_port::<F>());
    let frame = frame(scene, [flow.client, flow.frontend]);
    let first = frame.clone().fragment(0, true);
    scene.expect_frame(TestSite::FromDevice, &first, Reason::Request, flow.fate);
    let mut later = frame.fragment(1480, false).bytes();
    later[F::TTL] = 1;
    let outcome = scene.interpreter.send(TestSite::FromDevice, &later);
    assert_eq!(outcome, Outcome { reason: Reason::TtlExceeded, fate: Fate::Dropped });
}
