//! Odd packets of clients outside the cluster: long headers, the last hop, no checksum, and
//! what is addressed to a pod.

use lb_common::{
    abi::counter::Reason,
    balance::Answer,
    packet::{ACK, MAX_EXTENSION_HEADERS, SYN},
};

use super::outside::{balancer, client, exposed, node_port};
use super::setup::*;
use super::shape::padding;
use crate::{
    frame::{Body, Frame},
    scene::{End, Outcome, Talk, tuple},
};

rows! {
    BOTH => options_and_extension_headers_of_clients_outside_are_looked_past,
    BOTH => more_extension_headers_than_are_followed_are_left_alone,
    BOTH => payloads_of_every_length_keep_their_checksums_past_this_node,
    UDP_ONLY => a_datagram_of_a_client_outside_without_checksum_stays_without,
    BOTH => hops_end_where_this_node_forwards,
    BOTH => hops_are_the_stacks_where_it_routes,
    BOTH => what_is_for_a_pod_is_left_alone,
    BOTH => what_comes_from_nowhere_opens_no_flow,
    BOTH => who_claims_to_be_this_node_is_in_nobodys_way,
}

/// Where the backend is of which the packets go on by the stack, and by a look-up of ours.
const PLACES: [Where; 2] = [Where::Here, Where::Elsewhere];

/// Does `check` with a flow of a client outside to each kind of backend.
fn with_each<F: TestFamily>(
    bench: &mut Bench<F>,
    check: impl Fn(&mut Bench<F>, &Talk<F::Address>),
) {
    for place in PLACES {
        bench.lab.reset();
        bench.world = Default::default();
        exposed(bench, &[place]);
        let talk = bench.connect(Place::FromDevice, client::<F>(), node_port::<F>());
        check(bench, &talk);
    }
}

/// A frame of the backend's.
fn answer<F: TestFamily>(bench: &Bench<F>, talk: &Talk<F::Address>, flags: u8) -> Frame<F> {
    let to = at(talk.sent.source, talk.sent.source_port.get());
    Frame::of(bench.protocol, talk.backend(), to, flags)
}

/// The longest chains of headers that are followed.
fn long<F: TestFamily>() -> Vec<Vec<(u8, Vec<u8>)>> {
    let mut all = padding::<F>().to_vec();
    if F::NUMBER == 6 {
        all.push(chain(MAX_EXTENSION_HEADERS));
    }
    all
}

/// So many extension headers of IPv6, of every kind that is followed.
fn chain(count: usize) -> Vec<(u8, Vec<u8>)> {
    let kinds = [0, 43, 60].into_iter().chain(core::iter::repeat(60));
    kinds.take(count).map(|kind| (kind, vec![0, 1, 4, 0, 0, 0, 0])).collect()
}

fn options_and_extension_headers_of_clients_outside_are_looked_past<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    with_each(bench, |bench, talk| {
        let (place, back) = talk.way_back(tuple(talk.front, talk.client));
        for options in long::<F>() {
            let frame = Frame::of(bench.protocol, talk.client, talk.front, ACK).options(&options);
            bench.expect_frame(talk.place, &frame, Reason::Request, talk.end);
            let frame = answer(bench, talk, ACK).options(&options);
            bench.expect_frame(place, &frame, Reason::Reply, back);
        }
    });
    for (number, options) in (1u16..).zip(long::<F>()) {
        let from = at(F::outside(), 1000 + number);
        let frame = Frame::of(bench.protocol, from, node_port::<F>(), SYN).options(&options);
        let outcome = bench.send_frame(Place::FromDevice, &frame);
        assert_eq!(outcome.reason, Reason::FlowCreated, "{frame:?}");
        assert!(matches!(outcome.end, End::Forwarded(_)), "{outcome:?}");
    }
}

fn more_extension_headers_than_are_followed_are_left_alone<F: TestFamily>(bench: &mut Bench<F>) {
    if F::NUMBER == 4 {
        return;
    }
    with_each(bench, |bench, talk| {
        let options = chain(MAX_EXTENSION_HEADERS + 1);
        let (place, _) = talk.way_back(tuple(talk.front, talk.client));
        let before = bench.flow_counts();
        for from in [talk.client, at(F::outside(), 7)] {
            let frame = Frame::of(bench.protocol, from, talk.front, SYN).options(&options);
            bench.expect_frame(talk.place, &frame, Reason::NoFlow, End::Untouched);
        }
        let frame = answer(bench, talk, ACK).options(&options);
        bench.expect_frame(place, &frame, Reason::NoFlow, End::Untouched);
        assert_eq!(bench.flow_counts(), before);
    });
}

fn payloads_of_every_length_keep_their_checksums_past_this_node<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    let payload: Vec<u8> = (0..1400u32).map(|index| ((index * 7919) >> 3) as u8).collect();
    with_each(bench, |bench, talk| {
        let (place, back) = talk.way_back(tuple(talk.front, talk.client));
        for length in (0..20).chain([255, 256, 257, 1023, 1400]) {
            let frame = Frame::of(bench.protocol, talk.client, talk.front, ACK);
            let frame = frame.payload(&payload[..length]);
            bench.expect_frame(talk.place, &frame, Reason::Request, talk.end);
            let frame = answer(bench, talk, ACK).payload(&payload[..length]);
            bench.expect_frame(place, &frame, Reason::Reply, back);
        }
    });
}

fn a_datagram_of_a_client_outside_without_checksum_stays_without<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    with_each(bench, |bench, talk| {
        let frame = Frame::new(talk.client, talk.front, Body::UdpWithoutChecksum);
        bench.expect_frame(talk.place, &frame, Reason::Request, talk.end);
        let (place, back) = talk.way_back(tuple(talk.front, talk.client));
        let to = at(talk.sent.source, talk.sent.source_port.get());
        let frame = Frame::new(talk.backend(), to, Body::UdpWithoutChecksum);
        bench.expect_frame(place, &frame, Reason::Reply, back);
    });
}

fn hops_end_where_this_node_forwards<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Elsewhere]);
    let talk = bench.connect(Place::FromDevice, client::<F>(), node_port::<F>());
    let exceeded =
        Outcome { reason: Reason::TtlExceeded, end: End::Answered(Answer::TimeExceeded) };
    let new = at(F::outside(), 1000);
    for hops in [0, 1] {
        for (from, flags) in [(new, SYN), (talk.client, ACK)] {
            let frame = Frame::of(bench.protocol, from, talk.front, flags).hops(hops);
            assert_eq!(bench.send_frame(Place::FromDevice, &frame), exceeded, "{frame:?}");
        }
        let frame = answer(bench, &talk, ACK).hops(hops);
        assert_eq!(bench.send_frame(Place::FromDevice, &frame), exceeded, "{frame:?}");
    }
    // The last hop but one.
    let frame = Frame::of(bench.protocol, talk.client, talk.front, ACK).hops(2);
    bench.expect_frame(Place::FromDevice, &frame, Reason::Request, talk.end);
    bench.reply(&talk, ACK);
}

fn hops_are_the_stacks_where_it_routes<F: TestFamily>(bench: &mut Bench<F>) {
    for place in [Where::Here, Where::Host] {
        bench.lab.reset();
        bench.world = Default::default();
        exposed(bench, &[place]);
        let talk = bench.connect(Place::FromDevice, client::<F>(), node_port::<F>());
        for hops in [0, 1] {
            let frame = Frame::of(bench.protocol, talk.client, talk.front, ACK).hops(hops);
            bench.expect_frame(Place::FromDevice, &frame, Reason::Request, talk.end);
            let (place, back) = talk.way_back(tuple(talk.front, talk.client));
            let frame = answer(bench, &talk, ACK).hops(hops);
            bench.expect_frame(place, &frame, Reason::Reply, back);
        }
    }
}

fn what_is_for_a_pod_is_left_alone<F: TestFamily>(bench: &mut Bench<F>) {
    with_each(bench, |bench, talk| {
        let (before, untouched) = (bench.flow_counts(), End::Untouched);
        let stranger = at(F::outside(), 1000);
        for pod in [talk.backend(), at(talk.backend().address, 22)] {
            for from in [stranger, talk.client] {
                for flags in [SYN, ACK] {
                    let ends = [from, pod];
                    bench.expect(Place::FromDevice, ends, flags, Reason::NotService, untouched);
                }
                let ends = [from, pod];
                bench.expect(Place::ToPod, ends, SYN, Reason::NoFlow, untouched);
            }
            let ends = [pod, stranger];
            bench.expect(Place::FromPod, ends, ACK, Reason::NotService, untouched);
            bench.expect(Place::ToDeviceForwarded, ends, ACK, Reason::NoFlow, untouched);
        }
        assert_eq!(bench.flow_counts(), before);
        bench.request(talk, ACK);
        bench.reply(talk, ACK);
    });
}

/// Addresses that no packet on a wire may come from, this node's own among them.
fn martians<F: TestFamily>() -> Vec<F::Address> {
    let parts: [[u8; 2]; 3] = match F::NUMBER {
        4 => [[0, 0], [224, 1], [255, 255]],
        _ => [[0, 0], [0xff, 2], [0xff, 0x0e]],
    };
    let filled = |[first, second]: [u8; 2]| {
        let mut bytes =
            vec![if first == 255 && F::NUMBER == 4 { 255 } else { 0 }; F::ADDRESS_LENGTH];
        bytes[..2].copy_from_slice(&[first, second]);
        F::address(&bytes)
    };
    parts.map(filled).into_iter().chain([F::loopback(), F::node()]).collect()
}

fn what_comes_from_nowhere_opens_no_flow<F: TestFamily>(bench: &mut Bench<F>) {
    for place in [Where::Here, Where::Elsewhere, Where::Host] {
        bench.lab.reset();
        bench.world = Default::default();
        exposed(bench, &[place]);
        for source in martians::<F>() {
            for front in [node_port::<F>(), balancer::<F>(), web::<F>()] {
                let outcome = bench.send(Place::FromDevice, at(source, 1000), front, SYN);
                assert_eq!(outcome.end, End::Untouched, "{source:?} to {front:?}: {outcome:?}");
            }
        }
        assert_eq!(bench.flow_counts(), [0, 0]);
        bench.connect(Place::FromDevice, client::<F>(), node_port::<F>());
    }
}

/// The node's own connection to a backend, from the port that a stranger has guessed.
fn who_claims_to_be_this_node_is_in_nobodys_way<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Here]);
    let backend = bench.world.endpoint(1);
    bench.send(Place::FromDevice, process::<F>(), node_port::<F>(), SYN);
    let ends = [backend, process::<F>()];
    bench.expect(Place::FromPod, ends, SYN | ACK, Reason::NoFlow, End::Untouched);
}
