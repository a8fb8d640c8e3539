//! Frames of every shape: options, extension headers, payloads of every length, truncated frames.

use lb_common::{
    abi::counter::Reason,
    balance::Answer,
    packet::{ACK, SYN},
};

use super::setup::*;
use crate::{
    flow::tuple,
    frame::{Body, Frame},
    interpreter::Fate,
};

cases! {
    BOTH => options_and_extension_headers_are_looked_past,
    BOTH => a_packet_with_options_is_refused_with_all_of_its_header_quoted,
    BOTH => payloads_of_every_length_keep_their_checksums,
    UDP_ONLY => a_datagram_without_checksum_stays_without,
    BOTH => truncated_frames_pass_untouched_and_never_leave,
    BOTH => an_ip_header_that_contradicts_itself_is_malformed,
}

/// Options without effect: no-operations in IPv4, padded extension headers in IPv6.
pub(super) fn padding<F: TestFamily>() -> [Vec<(u8, Vec<u8>)>; 3] {
    let filler = |kind| (kind, vec![0, 1, 4, 0, 0, 0, 0]);
    if F::NUMBER == 4 {
        [vec![(0, vec![1; 4])], vec![(0, vec![1; 20])], vec![(0, vec![1; 40])]]
    } else {
        let long = (60, [vec![1, 1, 12], vec![0; 12]].concat());
        [vec![filler(0)], vec![filler(0), filler(60)], vec![filler(0), filler(43), long]]
    }
}

fn options_and_extension_headers_are_looked_past<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let backend = at(F::remote_pod(1), 8080);
    for (number, options) in padding::<F>().iter().enumerate() {
        let client = from_port(pod::<F>(), 20_000 + number as u16);
        let frame = Frame::of(scene.protocol, client, web::<F>(), SYN).options(options);
        let translated = Fate::Translated(tuple(client, backend));
        scene.expect_frame(TestSite::FromPod, &frame, Reason::FlowCreated, translated);
        let frame = Frame::of(scene.protocol, backend, client, SYN | ACK).options(options);
        let back = Fate::Translated(tuple(web::<F>(), client));
        scene.expect_frame(TestSite::ToPod, &frame, Reason::Reply, back);
    }
}

fn a_packet_with_options_is_refused_with_all_of_its_header_quoted<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    service(scene, 0);
    for options in padding::<F>() {
        for (site, client) in clients::<F>() {
            let frame = Frame::of(scene.protocol, client, web::<F>(), SYN).options(&options);
            let refusal = scene.refusal();
            scene.expect_frame(site, &frame, Reason::NoEndpoint, refusal);
            let frame = Frame::new(client, web::<F>(), Body::Other(99)).options(&options);
            let frame = frame.payload(&[5; 21]);
            let refusal = Fate::Answered(Answer::ProtocolUnreachable);
            scene.expect_frame(site, &frame, Reason::NoSuchProtocol, refusal);
        }
    }
}

fn payloads_of_every_length_keep_their_checksums<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let payload: Vec<u8> = (0..1400u32).map(|index| ((index * 7919) >> 3) as u8).collect();
    for length in (0..70).chain([255, 256, 257, 1023, 1400]) {
        let frame = Frame::of(scene.protocol, flow.client, flow.frontend, ACK);
        let frame = frame.payload(&payload[..length]);
        scene.expect_frame(TestSite::FromPod, &frame, Reason::Request, flow.fate);
    }
}

fn a_datagram_without_checksum_stays_without<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let client = pod::<F>();
    let frame = Frame::new(client, web::<F>(), Body::UdpWithoutChecksum);
    let translated = Fate::Translated(tuple(client, at(F::remote_pod(1), 8080)));
    scene.expect_frame(TestSite::FromPod, &frame, Reason::FlowCreated, translated);
}

fn truncated_frames_pass_untouched_and_never_leave<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let header = if F::NUMBER == 4 { 20 } else { 40 };
    let needed = 14 + header + if scene.is_tcp() { 20 } else { 8 };
    let of = |client| Frame::<F>::of(scene.protocol, client, web::<F>(), SYN).bytes();
    let (of_pod, of_node) = (of(pod::<F>()), of(process::<F>()));
    // The kernel runs no program on a frame that is shorter than an IP header.
    for length in 14 + header..needed {
        for site in TestSite::ALL {
            let whole = if site == TestSite::ToDevice { &of_node } else { &of_pod };
            let outcome = scene.interpreter.send(site, &whole[..length]);
            let leaves = matches!(
                site,
                TestSite::ToDevice | TestSite::ToDeviceForwarded | TestSite::ToDeviceReturned
            );
            if leaves {
                assert_eq!(outcome.fate, Fate::Dropped, "{length} bytes at {site:?}");
                assert_eq!(outcome.reason, Reason::UntranslatedLeaving);
            } else {
                assert_eq!(outcome.fate, Fate::Untouched, "{length} bytes at {site:?}");
            }
        }
    }
    assert_eq!(scene.flow_counts(), [0, 0]);
}

fn an_ip_header_that_contradicts_itself_is_malformed<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let whole = Frame::<F>::of(scene.protocol, pod::<F>(), web::<F>(), SYN).bytes();
    let broken: &[&[(usize, u8)]] = if F::NUMBER == 4 {
        &[
            &[(14, 0x55)],
            &[(14, 0x44)],
            &[(14, 0x40)],
            &[(16, 0), (17, 19)],
            &[(16, 0), (17, 27)],
            &[(14, 0x4f)],
        ]
    } else {
        &[&[(14, 0x52)], &[(18, 0), (19, 7)], &[(20, 60)], &[(20, 43)]]
    };
    for changes in broken {
        let mut frame = whole.clone();
        changes.iter().for_each(|(at, byte)| frame[*at] = *byte);
        let outcome = scene.interpreter.send(TestSite::FromPod, &frame);
        assert_eq!(outcome.fate, Fate::Untouched, "{changes:x?}: {outcome:?}");
        assert_eq!(outcome.reason, Reason::Malformed, "{changes:x?}");
    }
}
