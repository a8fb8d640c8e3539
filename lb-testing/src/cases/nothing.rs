//! Requests without an endpoint, a port, a protocol or a Service (docs/contract.md, section 4).

use lb_common::{
    abi::{counter::Reason, service::Service},
    balance::Answer,
    packet::{ACK, FIN, RST, SYN},
};

use super::setup::*;
use crate::{
    frame::{Body, Frame},
    interpreter::Fate,
};

cases! {
    BOTH => a_service_without_any_endpoint_refuses,
    BOTH => internal_traffic_policy_local_without_a_local_endpoint_drops,
    BOTH => internal_traffic_policy_local_without_any_endpoint_refuses,
    BOTH => a_port_that_no_service_has_is_refused,
    BOTH => the_same_port_of_the_other_protocol_is_refused,
    BOTH => an_unknown_address_is_left_alone_where_it_enters_and_never_leaves,
    BOTH => an_unknown_address_outside_of_the_service_cidrs_may_leave,
    BOTH => a_deleted_service_is_an_unknown_address_but_its_flows_go_on,
    BOTH => a_service_created_later_takes_over_what_was_refused,
    UDP_ONLY => an_echo_is_answered_if_the_service_has_an_endpoint,
    UDP_ONLY => another_protocol_is_refused_and_never_leaves,
    UDP_ONLY => icmp_errors_are_never_new_flows,
    TCP_ONLY => tcp_of_no_known_flow_is_left_to_the_stack_and_reset_where_it_would_leave,
}

fn a_service_without_any_endpoint_refuses<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 0);
    for (site, client) in clients::<F>() {
        let refusal = scene.refusal();
        scene.expect(site, [client, web::<F>()], SYN, Reason::NoEndpoint, refusal);
    }
    assert_eq!(scene.flow_counts(), [0, 0]);
}

fn internal_traffic_policy_local_without_a_local_endpoint_drops<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    let (index, _) = service(scene, 2);
    scene.world.services[index as usize].flags |= Service::INTERNAL_LOCAL;
    scene.update();
    for (site, client) in clients::<F>() {
        let ends = [client, web::<F>()];
        scene.expect(site, ends, SYN, Reason::NoLocalEndpoint, Fate::Dropped);
    }
}

fn internal_traffic_policy_local_without_any_endpoint_refuses<F: TestFamily>(scene: &mut Scene<F>) {
    let (index, _) = service(scene, 0);
    scene.world.services[index as usize].flags |= Service::INTERNAL_LOCAL;
    scene.update();
    let refusal = scene.refusal();
    scene.expect(TestSite::FromPod, [pod::<F>(), web::<F>()], SYN, Reason::NoEndpoint, refusal);
}

fn a_port_that_no_service_has_is_refused<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    for (site, client) in clients::<F>() {
        let refusal = scene.refusal();
        scene.expect(site, [client, at(F::vip(1), 81)], SYN, Reason::NoSuchPort, refusal);
        scene.expect(site, [client, at(F::vip(1), 0)], SYN, Reason::NoSuchPort, refusal);
    }
}

fn the_same_port_of_the_other_protocol_is_refused<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    scene.protocol = if scene.is_tcp() { UDP } else { TCP };
    let refusal = scene.refusal();
    scene.expect(TestSite::FromPod, [pod::<F>(), web::<F>()], SYN, Reason::NoSuchPort, refusal);
}

fn an_unknown_address_is_left_alone_where_it_enters_and_never_leaves<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    service(scene, 1);
    let unknown = at(F::vip(99), 80);
    let [(enters, pod), (leaves, process)] = clients::<F>();
    scene.expect(enters, [pod, unknown], SYN, Reason::UnknownAddress, Fate::Untouched);
    let dropped = (Reason::UntranslatedLeaving, Fate::Dropped);
    scene.expect(leaves, [process, unknown], SYN, dropped.0, dropped.1);
    scene.expect(TestSite::ToDeviceForwarded, [pod, unknown], SYN, dropped.0, dropped.1);
    let ping = |client| Frame::new(client, unknown, Body::Icmp(F::ECHO_REQUEST, 0));
    scene.expect_frame(enters, &ping(pod), Reason::UnknownAddress, Fate::Untouched);
    scene.expect_frame(leaves, &ping(process), dropped.0, dropped.1);
}

fn an_unknown_address_outside_of_the_service_cidrs_may_leave<F: TestFamily>(scene: &mut Scene<F>) {
    service_at(scene, at(F::vip_outside_cidrs(1), 80), 1);
    scene.update();
    let neighbour = at(F::vip_outside_cidrs(2), 80);
    let untouched = (Reason::UnknownAddress, Fate::Untouched);
    scene.expect(TestSite::FromPod, [pod::<F>(), neighbour], SYN, untouched.0, untouched.1);
    scene.expect(TestSite::ToDevice, [process::<F>(), neighbour], SYN, untouched.0, untouched.1);
    let site = TestSite::ToDeviceForwarded;
    scene.expect(site, [pod::<F>(), neighbour], SYN, Reason::NoFlow, Fate::Untouched);
    let live = at(F::vip_outside_cidrs(1), 80);
    scene.expect(site, [pod::<F>(), live], SYN, Reason::UntranslatedLeaving, Fate::Dropped);
}

fn a_deleted_service_is_an_unknown_address_but_its_flows_go_on<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    let (index, ids) = service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.world.remove_frontends(index);
    scene.world.remove_backend(ids[0]);
    scene.update();
    // A datagram counts as new, because its backend is gone.
    if scene.is_tcp() {
        scene.request(&flow, ACK);
    }
    scene.reply(&flow, ACK);
    let ends = [from_port(pod::<F>(), 41_000), web::<F>()];
    scene.expect(TestSite::FromPod, ends, SYN, Reason::UnknownAddress, Fate::Untouched);
}

fn a_service_created_later_takes_over_what_was_refused<F: TestFamily>(scene: &mut Scene<F>) {
    scene.update();
    let ends = [pod::<F>(), web::<F>()];
    scene.expect(TestSite::FromPod, ends, SYN, Reason::UnknownAddress, Fate::Untouched);
    let (index, _) = service(scene, 0);
    let refusal = scene.refusal();
    scene.expect(TestSite::FromPod, ends, SYN, Reason::NoEndpoint, refusal);
    scene.world.add_backend(index, at(F::remote_pod(1), 8080), Location::OtherNode);
    scene.update();
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.reply(&flow, ACK);
}

fn an_echo_is_answered_if_the_service_has_an_endpoint<F: TestFamily>(scene: &mut Scene<F>) {
    let (index, _) = service(scene, 0);
    for (site, client) in clients::<F>() {
        let ping = Frame::new(client, web::<F>(), Body::Icmp(F::ECHO_REQUEST, 0));
        let refused = Fate::Answered(Answer::PortUnreachable);
        scene.expect_frame(site, &ping, Reason::NoEndpoint, refused);
    }
    scene.world.add_backend(index, at(F::remote_pod(1), 8080), Location::OtherNode);
    scene.update();
    for (site, client) in clients::<F>() {
        for payload in [&b""[..], b"x", b"a longer payload with an odd length...."] {
            let ping = Frame::new(client, web::<F>(), Body::Icmp(F::ECHO_REQUEST, 0));
            let ping = ping.payload(payload);
            let answered = Fate::Answered(Answer::Echo);
            scene.expect_frame(site, &ping, Reason::EchoAnswered, answered);
        }
    }
}

fn another_protocol_is_refused_and_never_leaves<F: TestFamily>(scene: &mut Scene<F>) {
    const SCTP: u8 = 132;
    service(scene, 1);
    for (site, client) in clients::<F>() {
        let frame = Frame::new(client, web::<F>(), Body::Other(SCTP)).payload(&[7; 30]);
        let refused = Fate::Answered(Answer::ProtocolUnreachable);
        scene.expect_frame(site, &frame, Reason::NoSuchProtocol, refused);
    }
    let frame = Frame::new(pod::<F>(), web::<F>(), Body::Other(SCTP)).payload(&[7; 30]);
    let site = TestSite::ToDeviceForwarded;
    scene.expect_frame(site, &frame, Reason::UntranslatedLeaving, Fate::Dropped);
}

fn icmp_errors_are_never_new_flows<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    for (site, client) in clients::<F>() {
        let error = Frame::new(client, web::<F>(), Body::Icmp(F::SOME_ICMP_ERROR, 3));
        scene.expect_frame(site, &error, Reason::IcmpError, Fate::Dropped);
    }
    assert_eq!(scene.flow_counts(), [0, 0]);
}

fn tcp_of_no_known_flow_is_left_to_the_stack_and_reset_where_it_would_leave<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    service(scene, 1);
    for flags in [ACK, FIN | ACK, RST, SYN | ACK, 0, SYN | FIN, SYN | RST] {
        let [(enters, pod), (leaves, process)] = clients::<F>();
        let ends = [pod, web::<F>()];
        scene.expect(enters, ends, flags, Reason::UnknownTcpFlow, Fate::Untouched);
        let (reason, fate) = if flags & RST != 0 {
            (Reason::UntranslatedLeaving, Fate::Dropped)
        } else {
            (Reason::Orphan, Fate::Answered(Answer::Reset))
        };
        scene.expect(leaves, [process, web::<F>()], flags, reason, fate);
        scene.expect(TestSite::ToDeviceForwarded, ends, flags, reason, fate);
    }
    assert_eq!(scene.flow_counts(), [0, 0]);
}
