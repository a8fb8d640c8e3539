//! Which clients reach which backends, and which source address the backend sees
//! (docs/contract.md, sections 3 and 5).

use lb_common::{
    abi::{
        address::Be16,
        counter::Reason,
        frontend::{TCP, UDP},
        service::Service,
    },
    balance::Endpoint,
    packet::{ACK, SYN},
};

use super::setup::*;
use crate::{
    flow::tuple,
    frame::{Body, Frame},
    interpreter::{Fate, Outcome},
    world::{EXTERNAL, EXTERNAL_TOO, SOURCE_PORTS},
};

cases! {
    BOTH => a_pod_reaches_backends_elsewhere_and_here_under_its_own_address,
    BOTH => a_pod_reaches_itself_under_an_address_of_the_node,
    BOTH => a_pod_does_not_reach_itself_where_the_node_has_no_address,
    BOTH => a_node_process_reaches_a_pod_elsewhere_and_the_answer_comes_in_where_it_left,
    BOTH => a_node_process_reaches_a_pod_behind_an_overlay_with_the_address_of_the_overlay,
    BOTH => a_node_process_gets_the_answer_of_a_pod_here_by_the_device_it_left_by,
    BOTH => a_node_process_that_leaves_by_an_unknown_device_is_dropped,
    BOTH => a_process_of_this_node_serves_pods_and_the_node,
    BOTH => internal_traffic_policy_local_gives_only_backends_of_this_node,
    TCP_ONLY => one_port_with_tcp_and_udp_is_two_frontends,
    BOTH => an_address_outside_of_the_service_cidrs_can_be_a_cluster_ip,
    BOTH => a_forwarded_packet_is_not_translated_where_it_leaves,
    BOTH => every_backend_is_chosen_equally_often,
    BOTH => a_known_flow_costs_one_look_up_in_each_direction,
    BOTH => a_new_flow_looks_its_frontend_up_once,
    BOTH => traffic_of_no_service_costs_no_look_up_towards_it_and_one_back,
    TCP_ONLY => a_connection_into_a_pod_is_looked_up_once,
}

fn a_pod_reaches_backends_elsewhere_and_here_under_its_own_address<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    for (to, location) in [(F::remote_pod(1), Location::OtherNode), (F::pod(2), Location::LocalPod)]
    {
        let frontend = at(F::vip(1 + u8::from(location == Location::LocalPod)), 80);
        let index = scene.world.add_service(frontend, scene.protocol);
        scene.world.add_backend(index, at(to, 8080), location);
        scene.update();
        let flow = scene.connect(TestSite::FromPod, pod::<F>(), frontend);
        assert_eq!(flow.fate, Fate::Translated(tuple(pod::<F>(), at(to, 8080))));
        scene.request(&flow, ACK);
        scene.reply(&flow, ACK);
    }
}

fn a_pod_reaches_itself_under_an_address_of_the_node<F: TestFamily>(scene: &mut Scene<F>) {
    let (index, _) = service(scene, 0);
    scene.world.add_backend(index, at(F::pod(1), 8080), Location::LocalPod);
    scene.update();
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let seen = tuple(at(F::node(), 40_000), at(F::pod(1), 8080));
    assert_eq!(flow.fate, Fate::Hairpinned(seen));
    scene.request(&flow, ACK);
    scene.reply(&flow, ACK);
}

fn a_pod_does_not_reach_itself_where_the_node_has_no_address<F: TestFamily>(scene: &mut Scene<F>) {
    let (index, _) = service(scene, 0);
    scene.world.add_backend(index, at(F::pod(1), 8080), Location::LocalPod);
    scene.world.settings.ipv4.node_source = Default::default();
    scene.world.settings.ipv6.node_source = Default::default();
    scene.update();
    let ends = [pod::<F>(), web::<F>()];
    scene.expect(TestSite::FromPod, ends, SYN, Reason::NoNodeAddress, Fate::Dropped);
}

fn a_node_process_reaches_a_pod_elsewhere_and_the_answer_comes_in_where_it_left<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    service(scene, 1);
    let flow = scene.connect(TestSite::ToDevice, process::<F>(), web::<F>());
    assert_eq!(flow.fate, Fate::Routed(tuple(process::<F>(), at(F::remote_pod(1), 8080))));
    scene.request(&flow, ACK);
    scene.reply(&flow, ACK);
    let back = tuple(web::<F>(), process::<F>());
    assert_eq!(
        scene.answer(&flow, TestSite::FromOtherDevice, ACK),
        Outcome { reason: Reason::Reply, fate: Fate::IntoDevice(back, EXTERNAL) }
    );
    let _ = EXTERNAL_TOO;
}

fn a_node_process_reaches_a_pod_behind_an_overlay_with_the_address_of_the_overlay<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    service(scene, 1);
    let overlay = route_pods_by_overlay(scene);
    let flow = scene.connect(TestSite::ToDevice, process::<F>(), web::<F>());
    assert_eq!(flow.sent.source, overlay);
    assert!(SOURCE_PORTS.contains(flow.sent.source_port.get()), "{flow:?}");
    assert_eq!(flow.sent.destination, F::remote_pod(1));
    scene.request(&flow, ACK);
    let back = tuple(web::<F>(), process::<F>());
    assert_eq!(
        scene.answer(&flow, TestSite::FromOtherDevice, ACK),
        Outcome { reason: Reason::Reply, fate: Fate::IntoDevice(back, EXTERNAL) }
    );
    // A process that has bound the overlay's address keeps it, and its port.
    let bound = at(overlay, 50_000);
    let flow = scene.connect(TestSite::ToDevice, bound, web::<F>());
    assert_eq!(flow.fate, Fate::Routed(tuple(bound, at(F::remote_pod(1), 8080))));
}

fn a_node_process_gets_the_answer_of_a_pod_here_by_the_device_it_left_by<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    let (index, _) = service(scene, 0);
    scene.world.add_backend(index, at(F::pod(3), 8080), Location::LocalPod);
    scene.update();
    let flow = scene.open(TestSite::ToDevice, process::<F>(), web::<F>());
    assert_eq!(flow.fate, Fate::Routed(tuple(process::<F>(), at(F::pod(3), 8080))));
    let back = tuple(web::<F>(), process::<F>());
    let into = Outcome { reason: Reason::Reply, fate: Fate::IntoDevice(back, EXTERNAL) };
    assert_eq!(scene.answer(&flow, TestSite::FromPod, SYN | ACK), into);
    scene.request(&flow, ACK);
    assert_eq!(scene.answer(&flow, TestSite::FromPod, ACK), into);
}

fn a_node_process_that_leaves_by_an_unknown_device_is_dropped<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    scene.world.devices.remove(0);
    scene.update();
    let ends = [process::<F>(), web::<F>()];
    scene.expect(TestSite::ToDevice, ends, SYN, Reason::TableInconsistent, Fate::Dropped);
}

fn a_process_of_this_node_serves_pods_and_the_node<F: TestFamily>(scene: &mut Scene<F>) {
    let (index, _) = service(scene, 0);
    let server = at(F::node(), 6443);
    scene.world.add_backend(index, server, Location::ThisHost);
    scene.update();
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    assert_eq!(flow.fate, Fate::Translated(tuple(pod::<F>(), server)));
    scene.reply(&flow, ACK);
    let flow = scene.connect(TestSite::ToDevice, process::<F>(), web::<F>());
    assert_eq!(flow.fate, Fate::IntoLoopback(tuple(process::<F>(), server)));
    scene.request(&flow, ACK);
    scene.reply(&flow, ACK);
}

fn internal_traffic_policy_local_gives_only_backends_of_this_node<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    let (index, _) = service(scene, 3);
    let here = at(F::pod(2), 8080);
    scene.world.add_backend(index, here, Location::LocalPod);
    scene.world.services[index as usize].flags |= Service::INTERNAL_LOCAL;
    scene.update();
    for (site, client) in clients::<F>() {
        for port in 1..=20 {
            let flow = scene.open(site, from_port(client, 1000 + port), web::<F>());
            assert_eq!(flow.backend(), here);
        }
    }
}

fn one_port_with_tcp_and_udp_is_two_frontends<F: TestFamily>(scene: &mut Scene<F>) {
    for (protocol, number) in [(TCP, 1), (UDP, 2)] {
        let index = scene.world.add_service(web::<F>(), protocol);
        scene.world.add_backend(index, at(F::remote_pod(number), 53), Location::OtherNode);
    }
    scene.update();
    for (protocol, number) in [(TCP, 1), (UDP, 2)] {
        scene.protocol = protocol;
        let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
        assert_eq!(flow.backend(), at(F::remote_pod(number), 53));
        scene.reply(&flow, ACK);
    }
}

fn an_address_outside_of_the_service_cidrs_can_be_a_cluster_ip<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    let frontend = at(F::vip_outside_cidrs(5), 443);
    service_at(scene, frontend, 2);
    scene.update();
    for (site, client) in clients::<F>() {
        let flow = scene.connect(site, client, frontend);
        scene.reply(&flow, ACK);
    }
}

fn a_forwarded_packet_is_not_translated_where_it_leaves<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let ends = [pod::<F>(), web::<F>()];
    let site = TestSite::ToDeviceForwarded;
    scene.expect(site, ends, SYN, Reason::UntranslatedLeaving, Fate::Dropped);
}

fn every_backend_is_chosen_equally_often<F: TestFamily>(scene: &mut Scene<F>) {
    const BACKENDS: usize = 5;
    const FLOWS: usize = 2000;
    service(scene, BACKENDS as u8);
    let mut counts = std::collections::BTreeMap::new();
    for port in 0..FLOWS {
        let client = from_port(pod::<F>(), 10_000 + port as u16);
        let flow = scene.open(TestSite::FromPod, client, web::<F>());
        *counts.entry(flow.sent.destination).or_insert(0usize) += 1;
    }
    let expected = FLOWS as f64 / BACKENDS as f64;
    let distance = |count: &usize| (*count as f64 - expected).powi(2) / expected;
    let chi_square: f64 = counts.values().map(distance).sum();
    // Four degrees of freedom: chi-squared is above 33 once in a million runs.
    assert!(counts.len() == BACKENDS && chi_square < 33.0, "{counts:?}");
}

fn a_known_flow_costs_one_look_up_in_each_direction<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 3);
    for (site, client) in clients::<F>() {
        let flow = scene.connect(site, client, web::<F>());
        scene.request(&flow, ACK);
        scene.expect_lookups(1);
        scene.reply(&flow, ACK);
        scene.expect_lookups(1);
    }
}

fn a_new_flow_looks_its_frontend_up_once<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 3);
    scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    if let Some(lookups) = scene.interpreter.lookups() {
        assert_eq!((lookups.frontends, lookups.affinity), (1, 0));
    }
    assert_eq!(scene.interpreter.flows().len(), 1);
}

fn traffic_of_no_service_costs_no_look_up_towards_it_and_one_back<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    service(scene, 1);
    let outside = at(F::outside(), 443);
    let other_pod = at(F::pod(9), 8080);
    let node = Endpoint { address: F::node(), port: Be16::new(10_250) };
    let mut check = |site, ends, reason, lookups| {
        scene.expect(site, ends, ACK, reason, Fate::Untouched);
        scene.expect_lookups(lookups);
    };
    use TestSite::{FromDevice, FromPod, Loopback, ToDevice, ToDeviceForwarded, ToPod};
    check(FromPod, [pod::<F>(), outside], Reason::NotService, 0);
    check(FromPod, [pod::<F>(), other_pod], Reason::NotService, 0);
    check(FromPod, [pod::<F>(), node], Reason::NoFlow, 2);
    check(ToPod, [outside, pod::<F>()], Reason::NoFlow, 1);
    check(FromDevice, [outside, pod::<F>()], Reason::NotService, 0);
    check(FromDevice, [outside, node], Reason::NoFlow, 2);
    // Clients outside may have asked a ClusterIP: what leaves may be an answer.
    check(ToDevice, [node, outside], Reason::NoFlow, 1);
    check(ToDeviceForwarded, [pod::<F>(), outside], Reason::NoFlow, 1);
    check(Loopback, [node, node], Reason::NoFlow, 2);
    for site in TestSite::ALL {
        let ping = Frame::new(pod::<F>(), outside, Body::Icmp(F::ECHO_REQUEST, 0));
        let outcome = scene.send_frame(site, &ping);
        assert_eq!(outcome.fate, Fate::Untouched, "{site:?}");
    }
}

fn a_connection_into_a_pod_is_looked_up_once<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let ends = [at(F::outside(), 443), pod::<F>()];
    scene.expect(TestSite::ToPod, ends, SYN, Reason::NoFlow, Fate::Untouched);
    scene.expect_lookups(1);
}
