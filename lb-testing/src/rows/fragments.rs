//! IP fragments (docs/semantics.md, section 7): all of a datagram get what its first one gets.

use lb_common::{
    abi::{counter::Reason, flow::Tuple},
    balance::{Answer, FlowTable},
    packet::{ACK, SYN},
};

use super::icmp::with_all;
use super::outside::{client, exposed, node_port};
use super::setup::*;
use crate::{
    bench::{End, Outcome, Talk, tuple},
    frame::{Body, Frame},
    world::TICKS,
};

rows! {
    BOTH => all_fragments_of_a_request_go_the_same_way,
    BOTH => all_fragments_of_a_reply_go_the_same_way,
    BOTH => a_fragmented_packet_opens_a_flow,
    BOTH => fragments_of_different_datagrams_are_kept_apart,
    BOTH => a_fragment_before_the_first_is_dropped_if_it_is_for_a_service,
    BOTH => fragments_for_others_are_left_alone_without_a_look_up,
    BOTH => fragments_are_forgotten,
    BOTH => a_refused_datagram_is_refused_once,
    BOTH => later_fragments_say_nothing_of_the_flow,
    UDP_ONLY => a_datagram_all_in_one_fragment_is_whole,
    UDP_ONLY => fragments_of_what_services_do_not_carry_are_dropped,
    BOTH => a_later_fragment_at_the_end_of_its_hops_is_not_forwarded,
}

/// Where a frame's bytes behind the first fragment belong.
const LATER: [(u16, bool); 2] = [(1480, true), (2960, false)];

fn frame<F: TestFamily>(bench: &Bench<F>, ends: [Endpoint<F::Address>; 2]) -> Frame<F> {
    Frame::of(bench.protocol, ends[0], ends[1], ACK)
}

/// A tuple without ports: what is to be seen of a fragment that has none.
fn without_ports<F: TestFamily>(tuple: &Tuple<F::Address>) -> Tuple<F::Address> {
    crate::bench::tuple(at(tuple.source, 0), at(tuple.destination, 0))
}

/// Sends the fragments of a datagram of a known flow, and expects the same of all.
#[track_caller]
fn send_all<F: TestFamily>(
    bench: &mut Bench<F>,
    place: Place,
    frame: &Frame<F>,
    reason: Reason,
    onward: Tuple<F::Address>,
    end: impl Fn(Tuple<F::Address>) -> End<F::Address>,
) {
    let first = frame.clone().fragment(0, true);
    bench.expect_frame(place, &first, reason, end(onward));
    for (offset, more) in LATER {
        let later = frame.clone().fragment(offset, more);
        bench.expect_frame(place, &later, reason, end(without_ports::<F>(&onward)));
        bench.expect_lookups(2);
    }
}

fn all_fragments_of_a_request_go_the_same_way<F: TestFamily>(bench: &mut Bench<F>) {
    with_all(bench, |bench, talk| {
        let frame = frame(bench, [talk.client, talk.front]);
        send_all(bench, talk.place, &frame, Reason::Request, talk.sent, |onward| {
            talk.way_there(onward)
        });
    });
}

fn all_fragments_of_a_reply_go_the_same_way<F: TestFamily>(bench: &mut Bench<F>) {
    with_all(bench, |bench, talk| {
        let to = at(talk.sent.source, talk.sent.source_port.get());
        let frame = frame(bench, [talk.backend(), to]);
        let back = tuple(talk.front, talk.client);
        let (place, _) = talk.way_back(back);
        send_all(bench, place, &frame, Reason::Reply, back, |onward| talk.way_back(onward).1);
    });
}

fn a_fragmented_packet_opens_a_flow<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 4);
    for port in 1000..1020 {
        let ends = [from_port(pod::<F>(), port), web::<F>()];
        let frame = Frame::of(bench.protocol, ends[0], ends[1], SYN);
        let first = frame.clone().fragment_of(port, 0, true);
        let opened = bench.send_frame(Place::FromPod, &first);
        assert_eq!(opened.reason, Reason::FlowCreated);
        let onward = opened.end.tuple().expect("it is translated");
        for (offset, more) in LATER {
            let later = frame.clone().fragment_of(port, offset, more);
            let end = End::Onward(without_ports::<F>(&onward));
            bench.expect_frame(Place::FromPod, &later, Reason::Request, end);
        }
    }
}

fn fragments_of_different_datagrams_are_kept_apart<F: TestFamily>(bench: &mut Bench<F>) {
    let other = at(F::vip(1), 81);
    let index = bench.world.add_service(other, bench.protocol);
    bench.world.add_backend(index, at(F::remote_pod(9), 9090), Where::Elsewhere);
    service(bench, 1);
    let ends = [[pod::<F>(), web::<F>()], [pod::<F>(), other]];
    let talks = ends.map(|[from, to]| bench.connect(Place::FromPod, from, to));
    let send = |bench: &mut Bench<F>, talk: &Talk<F::Address>, number: u16, part: (u16, bool)| {
        let frame = frame(bench, [talk.client, talk.front]).fragment_of(number, part.0, part.1);
        let onward = if part.0 == 0 { talk.sent } else { without_ports::<F>(&talk.sent) };
        bench.expect_frame(Place::FromPod, &frame, Reason::Request, End::Onward(onward));
    };
    send(bench, &talks[0], 1, (0, true));
    send(bench, &talks[1], 2, (0, true));
    send(bench, &talks[0], 1, LATER[0]);
    send(bench, &talks[1], 2, LATER[0]);
    send(bench, &talks[0], 1, LATER[1]);
    // A number is used again.
    send(bench, &talks[1], 1, (0, true));
    send(bench, &talks[1], 1, LATER[1]);
}

fn a_fragment_before_the_first_is_dropped_if_it_is_for_a_service<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    exposed(bench, &[Where::Elsewhere]);
    for (place, client) in clients::<F>() {
        let talk = bench.connect(place, client, web::<F>());
        let later = frame(bench, [talk.client, talk.front]).fragment_of(77, 1480, false);
        bench.expect_frame(place, &later, Reason::Fragment, End::Dropped);
        let unknown = frame(bench, [client, at(F::vip(9), 80)]).fragment(1480, false);
        let outcome = bench.send_frame(place, &unknown);
        let leaves = matches!(place, Place::ToDevice);
        assert_eq!(outcome.end, if leaves { End::Dropped } else { End::Untouched });
    }
    let untouched = (Reason::NoFlow, End::Untouched);
    let to_node = frame(bench, [client::<F>(), node_port::<F>()]).fragment(1480, false);
    bench.expect_frame(Place::FromDevice, &to_node, untouched.0, untouched.1);
    let into = frame(bench, [web::<F>(), pod::<F>()]).fragment(1480, false);
    bench.expect_frame(Place::ToPod, &into, untouched.0, untouched.1);
    bench.expect_lookups(1);
}

fn fragments_for_others_are_left_alone_without_a_look_up<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    for (offset, more) in [(0, true), (1480, true), (1480, false)] {
        for (place, client) in clients::<F>() {
            let frame = frame(bench, [client, at(F::outside(), 80)]).fragment(offset, more);
            bench.expect_frame(place, &frame, Reason::NotService, End::Untouched);
            bench.expect_lookups(0);
        }
    }
    assert_eq!(bench.flow_counts(), [0, 0]);
}

fn fragments_are_forgotten<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    let frame = frame(bench, [talk.client, talk.front]);
    bench.expect_frame(
        Place::FromPod,
        &frame.clone().fragment(0, true),
        Reason::Request,
        End::Onward(talk.sent),
    );
    let onward = End::Onward(without_ports::<F>(&talk.sent));
    let later = frame.fragment(1480, false);
    bench.lab.pass(28 * TICKS);
    bench.expect_frame(Place::FromPod, &later, Reason::Request, onward);
    bench.lab.pass(3 * TICKS);
    bench.expect_frame(Place::FromPod, &later, Reason::Fragment, End::Dropped);
}

fn a_refused_datagram_is_refused_once<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 0);
    let refusal = bench.refusal();
    let frame = Frame::of(bench.protocol, pod::<F>(), web::<F>(), SYN);
    let first = frame.clone().fragment(0, true);
    bench.expect_frame(Place::FromPod, &first, Reason::NoEndpoint, refusal);
    let later = frame.fragment(1480, false);
    bench.expect_frame(Place::FromPod, &later, Reason::Fragment, End::Dropped);
}

fn later_fragments_say_nothing_of_the_flow<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    let frame = frame(bench, [talk.client, talk.front]);
    let first = frame.clone().fragment(0, true);
    bench.expect_frame(Place::FromPod, &first, Reason::Request, End::Onward(talk.sent));
    let before = bench.lab.flows(FlowTable::Flows);
    // What would be the flags of a TCP header are all set.
    let later = frame.payload(&[0xff; 40]).fragment(1480, true);
    let onward = End::Onward(without_ports::<F>(&talk.sent));
    bench.expect_frame(Place::FromPod, &later, Reason::Request, onward);
    assert_eq!(bench.lab.flows(FlowTable::Flows), before);
}

fn a_datagram_all_in_one_fragment_is_whole<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    let atomic = frame(bench, [talk.client, talk.front]).fragment(0, false);
    bench.expect_frame(Place::FromPod, &atomic, Reason::Request, End::Onward(talk.sent));
}

fn fragments_of_what_services_do_not_carry_are_dropped<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    let (from, to) = (pod::<F>(), web::<F>());
    for body in [Body::Icmp(F::ECHO_REQUEST, 0), Body::Other(132)] {
        for (offset, more) in [(0, true), (1480, false)] {
            let frame = Frame::<F>::new(from, to, body.clone()).fragment(offset, more);
            bench.expect_frame(Place::FromPod, &frame, Reason::Fragment, End::Dropped);
        }
    }
    let ping = Frame::<F>::new(from, to, Body::Icmp(F::ECHO_REQUEST, 0));
    let answered = End::Answered(Answer::Echo);
    bench.expect_frame(Place::FromPod, &ping, Reason::EchoAnswered, answered);
}

fn a_later_fragment_at_the_end_of_its_hops_is_not_forwarded<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Elsewhere]);
    let talk = bench.connect(Place::FromDevice, client::<F>(), node_port::<F>());
    let frame = frame(bench, [talk.client, talk.front]);
    let first = frame.clone().fragment(0, true);
    bench.expect_frame(Place::FromDevice, &first, Reason::Request, talk.end);
    let mut later = frame.fragment(1480, false).bytes();
    later[F::HOPS] = 1;
    let outcome = bench.lab.send(Place::FromDevice, &later);
    assert_eq!(outcome, Outcome { reason: Reason::TtlExceeded, end: End::Dropped });
}
