//! Who reaches what, and which source the backend sees (docs/semantics.md, sections 3 and 5).

use lb_common::{
    abi::{
        address::Be16,
        counter::Reason,
        frontend::{TCP, UDP},
        service::Service,
    },
    balance::{Endpoint, FlowTable},
    packet::{ACK, SYN},
};

use super::setup::*;
use crate::{
    bench::{End, Outcome, tuple},
    frame::{Body, Frame},
    world::{EXTERNAL, EXTERNAL_TOO},
};

rows! {
    BOTH => a_pod_reaches_backends_elsewhere_and_here_under_its_own_address,
    BOTH => a_pod_reaches_itself_under_an_address_of_the_node,
    BOTH => a_pod_does_not_reach_itself_where_the_node_has_no_address,
    BOTH => a_node_process_reaches_a_pod_elsewhere_and_the_answer_comes_in_where_it_left,
    BOTH => a_node_process_gets_the_answer_of_a_pod_here_by_the_device_it_left_by,
    BOTH => a_node_process_on_a_device_that_nobody_knows_is_dropped,
    BOTH => a_process_of_this_node_serves_pods_and_the_node,
    BOTH => internal_traffic_policy_local_gives_only_backends_of_this_node,
    TCP_ONLY => one_port_with_tcp_and_udp_is_two_front_ends,
    BOTH => an_address_outside_of_the_service_cidrs_can_be_a_cluster_ip,
    BOTH => what_another_device_forwards_is_not_translated_where_it_leaves,
    BOTH => every_backend_is_chosen_as_often,
    BOTH => a_known_flow_costs_one_look_up_in_each_direction,
    BOTH => a_new_flow_asks_once_for_its_front_end,
    BOTH => what_is_no_service_costs_no_look_up_towards_it_and_one_back,
    TCP_ONLY => a_connection_into_a_pod_is_looked_up_once,
}

fn a_pod_reaches_backends_elsewhere_and_here_under_its_own_address<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    for (to, place) in [(F::remote_pod(1), Where::Elsewhere), (F::pod(2), Where::Here)] {
        let front = at(F::vip(1 + u8::from(place == Where::Here)), 80);
        let index = bench.world.add_service(front, bench.protocol);
        bench.world.add_backend(index, at(to, 8080), place);
        bench.update();
        let talk = bench.connect(Place::FromPod, pod::<F>(), front);
        assert_eq!(talk.end, End::Onward(tuple(pod::<F>(), at(to, 8080))));
        bench.request(&talk, ACK);
        bench.reply(&talk, ACK);
    }
}

fn a_pod_reaches_itself_under_an_address_of_the_node<F: TestFamily>(bench: &mut Bench<F>) {
    let (index, _) = service(bench, 0);
    bench.world.add_backend(index, at(F::pod(1), 8080), Where::Here);
    bench.update();
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    let seen = tuple(at(F::node(), 40_000), at(F::pod(1), 8080));
    assert_eq!(talk.end, End::Bounced(seen));
    bench.request(&talk, ACK);
    bench.reply(&talk, ACK);
}

fn a_pod_does_not_reach_itself_where_the_node_has_no_address<F: TestFamily>(bench: &mut Bench<F>) {
    let (index, _) = service(bench, 0);
    bench.world.add_backend(index, at(F::pod(1), 8080), Where::Here);
    bench.world.settings.ipv4.node_source = Default::default();
    bench.world.settings.ipv6.node_source = Default::default();
    bench.update();
    let ends = [pod::<F>(), web::<F>()];
    bench.expect(Place::FromPod, ends, SYN, Reason::NoNodeAddress, End::Dropped);
}

fn a_node_process_reaches_a_pod_elsewhere_and_the_answer_comes_in_where_it_left<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    service(bench, 1);
    let talk = bench.connect(Place::ToDevice, process::<F>(), web::<F>());
    assert_eq!(talk.end, End::Routed(tuple(process::<F>(), at(F::remote_pod(1), 8080))));
    bench.request(&talk, ACK);
    bench.reply(&talk, ACK);
    let back = tuple(web::<F>(), process::<F>());
    assert_eq!(
        bench.answer(&talk, Place::FromOtherDevice, ACK),
        Outcome { reason: Reason::Reply, end: End::IntoDevice(back, EXTERNAL) }
    );
    let _ = EXTERNAL_TOO;
}

fn a_node_process_gets_the_answer_of_a_pod_here_by_the_device_it_left_by<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    let (index, _) = service(bench, 0);
    bench.world.add_backend(index, at(F::pod(3), 8080), Where::Here);
    bench.update();
    let talk = bench.open(Place::ToDevice, process::<F>(), web::<F>());
    assert_eq!(talk.end, End::Routed(tuple(process::<F>(), at(F::pod(3), 8080))));
    let back = tuple(web::<F>(), process::<F>());
    let into = Outcome { reason: Reason::Reply, end: End::IntoDevice(back, EXTERNAL) };
    assert_eq!(bench.answer(&talk, Place::FromPod, SYN | ACK), into);
    bench.request(&talk, ACK);
    assert_eq!(bench.answer(&talk, Place::FromPod, ACK), into);
}

fn a_node_process_on_a_device_that_nobody_knows_is_dropped<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    bench.world.devices.remove(0);
    bench.update();
    let ends = [process::<F>(), web::<F>()];
    bench.expect(Place::ToDevice, ends, SYN, Reason::TableInconsistent, End::Dropped);
}

fn a_process_of_this_node_serves_pods_and_the_node<F: TestFamily>(bench: &mut Bench<F>) {
    let (index, _) = service(bench, 0);
    let server = at(F::node(), 6443);
    bench.world.add_backend(index, server, Where::Host);
    bench.update();
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    assert_eq!(talk.end, End::Onward(tuple(pod::<F>(), server)));
    bench.reply(&talk, ACK);
    let talk = bench.connect(Place::ToDevice, process::<F>(), web::<F>());
    assert_eq!(talk.end, End::IntoLoopback(tuple(process::<F>(), server)));
    bench.request(&talk, ACK);
    bench.reply(&talk, ACK);
}

fn internal_traffic_policy_local_gives_only_backends_of_this_node<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    let (index, _) = service(bench, 3);
    let here = at(F::pod(2), 8080);
    bench.world.add_backend(index, here, Where::Here);
    bench.world.services[index as usize].flags |= Service::INTERNAL_LOCAL;
    bench.update();
    for (place, client) in clients::<F>() {
        for port in 1..=20 {
            let talk = bench.open(place, from_port(client, 1000 + port), web::<F>());
            assert_eq!(talk.backend(), here);
        }
    }
}

fn one_port_with_tcp_and_udp_is_two_front_ends<F: TestFamily>(bench: &mut Bench<F>) {
    for (protocol, number) in [(TCP, 1), (UDP, 2)] {
        let index = bench.world.add_service(web::<F>(), protocol);
        bench.world.add_backend(index, at(F::remote_pod(number), 53), Where::Elsewhere);
    }
    bench.update();
    for (protocol, number) in [(TCP, 1), (UDP, 2)] {
        bench.protocol = protocol;
        let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
        assert_eq!(talk.backend(), at(F::remote_pod(number), 53));
        bench.reply(&talk, ACK);
    }
}

fn an_address_outside_of_the_service_cidrs_can_be_a_cluster_ip<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    let front = at(F::vip_elsewhere(5), 443);
    service_at(bench, front, 2);
    bench.update();
    for (place, client) in clients::<F>() {
        let talk = bench.connect(place, client, front);
        bench.reply(&talk, ACK);
    }
}

fn what_another_device_forwards_is_not_translated_where_it_leaves<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    service(bench, 1);
    let ends = [pod::<F>(), web::<F>()];
    let place = Place::ToDeviceForwarded;
    bench.expect(place, ends, SYN, Reason::UntranslatedLeaving, End::Dropped);
}

fn every_backend_is_chosen_as_often<F: TestFamily>(bench: &mut Bench<F>) {
    const BACKENDS: usize = 5;
    const FLOWS: usize = 2000;
    service(bench, BACKENDS as u8);
    let mut counts = std::collections::BTreeMap::new();
    for port in 0..FLOWS {
        let client = from_port(pod::<F>(), 10_000 + port as u16);
        let talk = bench.open(Place::FromPod, client, web::<F>());
        *counts.entry(talk.sent.destination).or_insert(0usize) += 1;
    }
    let expected = FLOWS as f64 / BACKENDS as f64;
    let distance = |count: &usize| (*count as f64 - expected).powi(2) / expected;
    let chi_square: f64 = counts.values().map(distance).sum();
    // Four degrees of freedom: above 33 once in a million runs.
    assert!(counts.len() == BACKENDS && chi_square < 33.0, "{counts:?}");
}

fn a_known_flow_costs_one_look_up_in_each_direction<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 3);
    for (place, client) in clients::<F>() {
        let talk = bench.connect(place, client, web::<F>());
        bench.request(&talk, ACK);
        bench.expect_lookups(1);
        bench.reply(&talk, ACK);
        bench.expect_lookups(1);
    }
}

fn a_new_flow_asks_once_for_its_front_end<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 3);
    bench.open(Place::FromPod, pod::<F>(), web::<F>());
    if let Some(lookups) = bench.lab.lookups() {
        assert_eq!((lookups.frontends, lookups.affinity), (1, 0));
    }
    assert_eq!(bench.lab.flows(FlowTable::Flows).len(), if bench.is_tcp() { 0 } else { 2 });
}

fn what_is_no_service_costs_no_look_up_towards_it_and_one_back<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    service(bench, 1);
    let outside = at(F::outside(), 443);
    let other_pod = at(F::pod(9), 8080);
    let node = Endpoint { address: F::node(), port: Be16::new(10_250) };
    let mut check = |place, ends, reason, lookups| {
        bench.expect(place, ends, ACK, reason, End::Untouched);
        bench.expect_lookups(lookups);
    };
    use Place::{FromDevice, FromPod, Loopback, ToDevice, ToDeviceForwarded, ToPod};
    check(FromPod, [pod::<F>(), outside], Reason::NotService, 0);
    check(FromPod, [pod::<F>(), other_pod], Reason::NotService, 0);
    check(FromPod, [pod::<F>(), node], Reason::NoFlow, 1);
    check(ToPod, [outside, pod::<F>()], Reason::NoFlow, 1);
    check(FromDevice, [outside, pod::<F>()], Reason::NotService, 0);
    check(FromDevice, [outside, node], Reason::NoFlow, 1);
    check(ToDevice, [node, outside], Reason::NotService, 0);
    check(ToDeviceForwarded, [pod::<F>(), outside], Reason::NotService, 0);
    check(Loopback, [node, node], Reason::NoFlow, 1);
    for place in Place::ALL {
        let ping = Frame::new(pod::<F>(), outside, Body::Icmp(F::ECHO_REQUEST, 0));
        let outcome = bench.send_frame(place, &ping);
        assert_eq!(outcome.end, End::Untouched, "{place:?}");
    }
}

fn a_connection_into_a_pod_is_looked_up_once<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 1);
    let ends = [at(F::outside(), 443), pod::<F>()];
    bench.expect(Place::ToPod, ends, SYN, Reason::NoFlow, End::Untouched);
    bench.expect_lookups(1);
}
