//! Unusual packets of clients outside the cluster: long headers, a TTL that ends, no checksum,
//! and packets addressed to a pod.

use lb_common::{
    abi::counter::Reason,
    balance::Answer,
    packet::{ACK, MAX_EXTENSION_HEADERS, SYN},
};

use super::outside::{balancer, client, exposed, node_port};
use super::setup::*;
use super::shape::padding;
use crate::{
    flow::{TestFlow, tuple},
    frame::{Body, Frame},
    interpreter::{Fate, Outcome},
};

cases! {
    BOTH => options_and_extension_headers_of_clients_outside_are_looked_past,
    BOTH => more_extension_headers_than_are_followed_are_left_alone,
    BOTH => payloads_of_every_length_keep_their_checksums_past_this_node,
    UDP_ONLY => a_datagram_of_a_client_outside_without_checksum_stays_without,
    BOTH => the_ttl_ends_where_this_node_forwards,
    BOTH => the_stack_decrements_the_ttl_where_it_routes,
    BOTH => packets_to_a_pod_are_left_alone,
    BOTH => a_source_that_no_host_can_have_opens_no_flow,
    BOTH => a_forged_node_address_blocks_no_connection_of_the_node,
    BOTH => a_frame_for_another_host_is_not_looked_at,
}

/// A backend whose packets the stack routes, and one whose packets lb forwards.
const LOCATIONS: [Location; 2] = [Location::LocalPod, Location::OtherNode];

/// Runs `check` with a flow of a client outside to each kind of backend.
fn with_each<F: TestFamily>(
    scene: &mut Scene<F>,
    check: impl Fn(&mut Scene<F>, &TestFlow<F::Address>),
) {
    for location in LOCATIONS {
        scene.reset();
        exposed(scene, &[location]);
        let flow = scene.connect(TestSite::FromDevice, client::<F>(), node_port::<F>());
        check(scene, &flow);
    }
}

/// A frame that the backend sends.
fn answer<F: TestFamily>(scene: &Scene<F>, flow: &TestFlow<F::Address>, flags: u8) -> Frame<F> {
    let to = at(flow.sent.source, flow.sent.source_port.get());
    Frame::of(scene.protocol, flow.backend(), to, flags)
}

/// The longest chains of headers that the parser follows.
fn long<F: TestFamily>() -> Vec<Vec<(u8, Vec<u8>)>> {
    let mut all = padding::<F>().to_vec();
    if F::NUMBER == 6 {
        all.push(chain(MAX_EXTENSION_HEADERS));
    }
    all
}

/// So many IPv6 extension headers, of every kind that the parser follows.
fn chain(count: usize) -> Vec<(u8, Vec<u8>)> {
    let kinds = [0, 43, 60].into_iter().chain(core::iter::repeat(60));
    kinds.take(count).map(|kind| (kind, vec![0, 1, 4, 0, 0, 0, 0])).collect()
}

fn options_and_extension_headers_of_clients_outside_are_looked_past<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    with_each(scene, |scene, flow| {
        let (site, back) = flow.reply_path(tuple(flow.frontend, flow.client));
        for options in long::<F>() {
            let frame =
                Frame::of(scene.protocol, flow.client, flow.frontend, ACK).options(&options);
            scene.expect_frame(flow.site, &frame, Reason::Request, flow.fate);
            let frame = answer(scene, flow, ACK).options(&options);
            scene.expect_frame(site, &frame, Reason::Reply, back);
        }
    });
    for (number, options) in (1u16..).zip(long::<F>()) {
        let from = at(F::outside(), 1000 + number);
        let frame = Frame::of(scene.protocol, from, node_port::<F>(), SYN).options(&options);
        let outcome = scene.send_frame(TestSite::FromDevice, &frame);
        assert_eq!(outcome.reason, Reason::FlowCreated, "{frame:?}");
        assert!(matches!(outcome.fate, Fate::Forwarded(_)), "{outcome:?}");
    }
}

fn more_extension_headers_than_are_followed_are_left_alone<F: TestFamily>(scene: &mut Scene<F>) {
    if F::NUMBER == 4 {
        return;
    }
    with_each(scene, |scene, flow| {
        let options = chain(MAX_EXTENSION_HEADERS + 1);
        let (site, _) = flow.reply_path(tuple(flow.frontend, flow.client));
        let before = scene.flow_counts();
        for from in [flow.client, at(F::outside(), 7)] {
            let frame = Frame::of(scene.protocol, from, flow.frontend, SYN).options(&options);
            scene.expect_frame(flow.site, &frame, Reason::NoFlow, Fate::Untouched);
        }
        let frame = answer(scene, flow, ACK).options(&options);
        scene.expect_frame(site, &frame, Reason::NoFlow, Fate::Untouched);
        assert_eq!(scene.flow_counts(), before);
    });
}

fn payloads_of_every_length_keep_their_checksums_past_this_node<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    let payload: Vec<u8> = (0..1400u32).map(|index| ((index * 7919) >> 3) as u8).collect();
    with_each(scene, |scene, flow| {
        let (site, back) = flow.reply_path(tuple(flow.frontend, flow.client));
        for length in (0..20).chain([255, 256, 257, 1023, 1400]) {
            let frame = Frame::of(scene.protocol, flow.client, flow.frontend, ACK);
            let frame = frame.payload(&payload[..length]);
            scene.expect_frame(flow.site, &frame, Reason::Request, flow.fate);
            let frame = answer(scene, flow, ACK).payload(&payload[..length]);
            scene.expect_frame(site, &frame, Reason::Reply, back);
        }
    });
}

fn a_datagram_of_a_client_outside_without_checksum_stays_without<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    with_each(scene, |scene, flow| {
        let frame = Frame::new(flow.client, flow.frontend, Body::UdpWithoutChecksum);
        scene.expect_frame(flow.site, &frame, Reason::Request, flow.fate);
        let (site, back) = flow.reply_path(tuple(flow.frontend, flow.client));
        let to = at(flow.sent.source, flow.sent.source_port.get());
        let frame = Frame::new(flow.backend(), to, Body::UdpWithoutChecksum);
        scene.expect_frame(site, &frame, Reason::Reply, back);
    });
}

fn the_ttl_ends_where_this_node_forwards<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::OtherNode]);
    let flow = scene.connect(TestSite::FromDevice, client::<F>(), node_port::<F>());
    let exceeded =
        Outcome { reason: Reason::TtlExceeded, fate: Fate::Answered(Answer::TimeExceeded) };
    let new = at(F::outside(), 1000);
    for ttl in [0, 1] {
        for (from, flags) in [(new, SYN), (flow.client, ACK)] {
            let frame = Frame::of(scene.protocol, from, flow.frontend, flags).ttl(ttl);
            assert_eq!(scene.send_frame(TestSite::FromDevice, &frame), exceeded, "{frame:?}");
        }
        let frame = answer(scene, &flow, ACK).ttl(ttl);
        assert_eq!(scene.send_frame(TestSite::FromDevice, &frame), exceeded, "{frame:?}");
    }
    // A TTL that suffices for this node.
    let frame = Frame::of(scene.protocol, flow.client, flow.frontend, ACK).ttl(2);
    scene.expect_frame(TestSite::FromDevice, &frame, Reason::Request, flow.fate);
    scene.reply(&flow, ACK);
}

fn the_stack_decrements_the_ttl_where_it_routes<F: TestFamily>(scene: &mut Scene<F>) {
    for location in [Location::LocalPod, Location::ThisHost] {
        scene.reset();
        exposed(scene, &[location]);
        let flow = scene.connect(TestSite::FromDevice, client::<F>(), node_port::<F>());
        for ttl in [0, 1] {
            let frame = Frame::of(scene.protocol, flow.client, flow.frontend, ACK).ttl(ttl);
            scene.expect_frame(TestSite::FromDevice, &frame, Reason::Request, flow.fate);
            let (site, back) = flow.reply_path(tuple(flow.frontend, flow.client));
            let frame = answer(scene, &flow, ACK).ttl(ttl);
            scene.expect_frame(site, &frame, Reason::Reply, back);
        }
    }
}

fn packets_to_a_pod_are_left_alone<F: TestFamily>(scene: &mut Scene<F>) {
    with_each(scene, |scene, flow| {
        let (before, untouched) = (scene.flow_counts(), Fate::Untouched);
        let other_client = at(F::outside(), 1000);
        for pod in [flow.backend(), at(flow.backend().address, 22)] {
            for from in [other_client, flow.client] {
                for flags in [SYN, ACK] {
                    let ends = [from, pod];
                    scene.expect(TestSite::FromDevice, ends, flags, Reason::NotService, untouched);
                }
                let ends = [from, pod];
                scene.expect(TestSite::ToPod, ends, SYN, Reason::NoFlow, untouched);
            }
            let ends = [pod, other_client];
            scene.expect(TestSite::FromPod, ends, ACK, Reason::NotService, untouched);
            scene.expect(TestSite::ToDeviceForwarded, ends, ACK, Reason::NoFlow, untouched);
        }
        assert_eq!(scene.flow_counts(), before);
        scene.request(flow, ACK);
        scene.reply(flow, ACK);
    });
}

/// Source addresses that no packet on a wire may have, this node's own among them.
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

fn a_source_that_no_host_can_have_opens_no_flow<F: TestFamily>(scene: &mut Scene<F>) {
    for location in [Location::LocalPod, Location::OtherNode, Location::ThisHost] {
        scene.reset();
        exposed(scene, &[location]);
        for source in martians::<F>() {
            for frontend in [node_port::<F>(), balancer::<F>(), web::<F>()] {
                let outcome = scene.send(TestSite::FromDevice, at(source, 1000), frontend, SYN);
                assert_eq!(
                    outcome.fate,
                    Fate::Untouched,
                    "{source:?} to {frontend:?}: {outcome:?}"
                );
            }
        }
        assert_eq!(scene.flow_counts(), [0, 0]);
        scene.connect(TestSite::FromDevice, client::<F>(), node_port::<F>());
    }
}

/// The node's own connection to a backend, from a port that an attacker has guessed.
fn a_forged_node_address_blocks_no_connection_of_the_node<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::LocalPod]);
    let backend = scene.world.endpoint(1);
    scene.send(TestSite::FromDevice, process::<F>(), node_port::<F>(), SYN);
    let ends = [backend, process::<F>()];
    scene.expect(TestSite::FromPod, ends, SYN | ACK, Reason::NoFlow, Fate::Untouched);
}

fn a_frame_for_another_host_is_not_looked_at<F: TestFamily>(scene: &mut Scene<F>) {
    with_each(scene, |scene, flow| {
        for (port, flags) in [(flow.client.port.get(), ACK), (46_000, SYN)] {
            let client = from_port(flow.client, port);
            for frontend in [flow.frontend, balancer::<F>()] {
                let mut frame = Frame::<F>::of(scene.protocol, client, frontend, flags).bytes();
                frame[..6].copy_from_slice(&[2, 0, 0, 0, 9, 9]);
                let before = scene.flow_counts();
                let outcome = scene.interpreter.send(TestSite::FromDevice, &frame);
                // XDP counts such frames as tc would count those for this host.
                assert_eq!(outcome.fate, Fate::Untouched, "{outcome:?}");
                assert_eq!(scene.flow_counts(), before);
            }
        }
    });
}
