//! What a client sees when there is nothing to send to (docs/semantics.md, section 4).

use lb_common::{
    abi::{counter::Reason, service::Service},
    balance::Answer,
    packet::{ACK, FIN, RST, SYN},
};

use super::setup::*;
use crate::{
    bench::End,
    frame::{Body, Frame},
};

rows! {
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
    TCP_ONLY => tcp_of_no_known_flow_is_left_to_the_stack_but_never_leaves,
}

fn a_service_without_any_endpoint_refuses<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 0);
    for (place, client) in clients::<F>() {
        let refusal = bench.refusal();
        bench.expect(place, [client, web::<F>()], SYN, Reason::NoEndpoint, refusal);
    }
    assert_eq!(bench.flow_counts(), [0, 0]);
}

fn internal_traffic_policy_local_without_a_local_endpoint_drops<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    let (index, _) = service(bench, 2);
    bench.world.services[index as usize].flags |= Service::INTERNAL_LOCAL;
    bench.update();
    for (place, client) in clients::<F>() {
        let ends = [client, web::<F>()];
        bench.expect(place, ends, SYN, Reason::NoLocalEndpoint, End::Dropped);
    }
}

fn internal_traffic_policy_local_without_any_endpoint_refuses<F: TestFamily>(bench: &mut Bench<F>) {
    let (index, _) = service(bench, 0);
    bench.world.services[index as usize].flags |= Service::INTERNAL_LOCAL;
    bench.update();
    let refusal = bench.refusal();
    bench.expect(Place::FromPod, [pod::<F>(), web::<F>()], SYN, Reason::NoEndpoint, refusal);
}

fn a_port_that_no_service_has_is_refused<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    for (place, client) in clients::<F>() {
        let refusal = bench.refusal();
        bench.expect(place, [client, at(F::vip(1), 81)], SYN, Reason::NoSuchPort, refusal);
        bench.expect(place, [client, at(F::vip(1), 0)], SYN, Reason::NoSuchPort, refusal);
    }
}

fn the_same_port_of_the_other_protocol_is_refused<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    bench.protocol = if bench.is_tcp() { UDP } else { TCP };
    let refusal = bench.refusal();
    bench.expect(Place::FromPod, [pod::<F>(), web::<F>()], SYN, Reason::NoSuchPort, refusal);
}

fn an_unknown_address_is_left_alone_where_it_enters_and_never_leaves<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    service(bench, 1);
    let nobody = at(F::vip(99), 80);
    let [(enters, pod), (leaves, process)] = clients::<F>();
    bench.expect(enters, [pod, nobody], SYN, Reason::UnknownAddress, End::Untouched);
    let dropped = (Reason::UntranslatedLeaving, End::Dropped);
    bench.expect(leaves, [process, nobody], SYN, dropped.0, dropped.1);
    bench.expect(Place::ToDeviceForwarded, [pod, nobody], SYN, dropped.0, dropped.1);
    let ping = Frame::new(pod, nobody, Body::Icmp(F::ECHO_REQUEST, 0));
    bench.expect_frame(enters, &ping, Reason::UnknownAddress, End::Untouched);
    bench.expect_frame(leaves, &ping, dropped.0, dropped.1);
}

fn an_unknown_address_outside_of_the_service_cidrs_may_leave<F: TestFamily>(bench: &mut Bench<F>) {
    service_at(bench, at(F::vip_elsewhere(1), 80), 1);
    bench.update();
    let neighbour = at(F::vip_elsewhere(2), 80);
    let untouched = (Reason::UnknownAddress, End::Untouched);
    bench.expect(Place::FromPod, [pod::<F>(), neighbour], SYN, untouched.0, untouched.1);
    bench.expect(Place::ToDevice, [process::<F>(), neighbour], SYN, untouched.0, untouched.1);
    let place = Place::ToDeviceForwarded;
    bench.expect(place, [pod::<F>(), neighbour], SYN, Reason::NoFlow, End::Untouched);
    let live = at(F::vip_elsewhere(1), 80);
    bench.expect(place, [pod::<F>(), live], SYN, Reason::UntranslatedLeaving, End::Dropped);
}

fn a_deleted_service_is_an_unknown_address_but_its_flows_go_on<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    let (index, ids) = service(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    bench.world.remove_fronts(index);
    bench.world.remove_backend(ids[0]);
    bench.update();
    bench.request(&talk, ACK);
    bench.reply(&talk, ACK);
    let ends = [from_port(pod::<F>(), 41_000), web::<F>()];
    bench.expect(Place::FromPod, ends, SYN, Reason::UnknownAddress, End::Untouched);
}

fn a_service_created_later_takes_over_what_was_refused<F: TestFamily>(bench: &mut Bench<F>) {
    bench.update();
    let ends = [pod::<F>(), web::<F>()];
    bench.expect(Place::FromPod, ends, SYN, Reason::UnknownAddress, End::Untouched);
    let (index, _) = service(bench, 0);
    let refusal = bench.refusal();
    bench.expect(Place::FromPod, ends, SYN, Reason::NoEndpoint, refusal);
    bench.world.add_backend(index, at(F::remote_pod(1), 8080), Where::Elsewhere);
    bench.update();
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    bench.reply(&talk, ACK);
}

fn an_echo_is_answered_if_the_service_has_an_endpoint<F: TestFamily>(bench: &mut Bench<F>) {
    let (index, _) = service(bench, 0);
    for (place, client) in clients::<F>() {
        let ping = Frame::new(client, web::<F>(), Body::Icmp(F::ECHO_REQUEST, 0));
        let refused = End::Answered(Answer::PortUnreachable);
        bench.expect_frame(place, &ping, Reason::NoEndpoint, refused);
    }
    bench.world.add_backend(index, at(F::remote_pod(1), 8080), Where::Elsewhere);
    bench.update();
    for (place, client) in clients::<F>() {
        for payload in [&b""[..], b"x", b"a longer payload with an odd length...."] {
            let ping = Frame::new(client, web::<F>(), Body::Icmp(F::ECHO_REQUEST, 0));
            let ping = ping.payload(payload);
            let answered = End::Answered(Answer::Echo);
            bench.expect_frame(place, &ping, Reason::EchoAnswered, answered);
        }
    }
}

fn another_protocol_is_refused_and_never_leaves<F: TestFamily>(bench: &mut Bench<F>) {
    const SCTP: u8 = 132;
    service(bench, 1);
    for (place, client) in clients::<F>() {
        let frame = Frame::new(client, web::<F>(), Body::Other(SCTP)).payload(&[7; 30]);
        let refused = End::Answered(Answer::ProtocolUnreachable);
        bench.expect_frame(place, &frame, Reason::NoSuchProtocol, refused);
    }
    let frame = Frame::new(pod::<F>(), web::<F>(), Body::Other(SCTP)).payload(&[7; 30]);
    let place = Place::ToDeviceForwarded;
    bench.expect_frame(place, &frame, Reason::UntranslatedLeaving, End::Dropped);
}

fn icmp_errors_are_never_new_flows<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    for (place, client) in clients::<F>() {
        let error = Frame::new(client, web::<F>(), Body::Icmp(F::SOME_ICMP_ERROR, 3));
        bench.expect_frame(place, &error, Reason::IcmpError, End::Dropped);
    }
    assert_eq!(bench.flow_counts(), [0, 0]);
}

fn tcp_of_no_known_flow_is_left_to_the_stack_but_never_leaves<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    for flags in [ACK, FIN | ACK, RST, SYN | ACK, 0, SYN | FIN, SYN | RST] {
        let [(enters, pod), (leaves, process)] = clients::<F>();
        let ends = [pod, web::<F>()];
        bench.expect(enters, ends, flags, Reason::UnknownTcpFlow, End::Untouched);
        let dropped = (Reason::UntranslatedLeaving, End::Dropped);
        bench.expect(leaves, [process, web::<F>()], flags, dropped.0, dropped.1);
        bench.expect(Place::ToDeviceForwarded, ends, flags, dropped.0, dropped.1);
    }
    assert_eq!(bench.flow_counts(), [0, 0]);
}
