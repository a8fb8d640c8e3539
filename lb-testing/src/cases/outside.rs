//! Frontends that clients outside the cluster reach: which source address the backend sees,
//! which backends are chosen, and which clients are rejected.

use lb_common::{
    abi::{counter::Reason, frontend::FrontendKind, service::Service, settings::MAX_PREFIXES},
    balance::Answer,
    packet::{ACK, FIN, RST, SYN},
};

use super::setup::*;
use crate::{
    flow::{TestFlow, tuple},
    frame::{Body, Frame},
    interpreter::Fate,
    world::{SOURCE_PORTS, seconds},
};

cases! {
    BOTH => a_backend_here_sees_a_client_outside,
    BOTH => a_backend_elsewhere_sees_this_node,
    BOTH => a_backend_behind_an_overlay_sees_the_address_of_the_overlay,
    BOTH => a_process_of_this_node_sees_a_client_outside,
    BOTH => a_cluster_ip_from_outside_shows_the_client_to_a_backend_here,
    BOTH => a_pod_of_another_node_is_seen_by_a_backend_here,
    BOTH => local_policy_of_a_node_port_holds_for_pods_of_other_nodes,
    BOTH => local_policy_keeps_to_backends_here,
    BOTH => local_policy_without_a_backend_here_drops,
    BOTH => local_policy_is_not_for_pods_and_processes,
    BOTH => a_pod_reaches_a_node_port_with_its_own_address,
    BOTH => a_process_reaches_its_own_node_port,
    BOTH => a_process_reaches_a_node_port_by_the_loopback_address,
    BOTH => a_process_reaches_a_service_at_an_address_that_its_node_holds,
    BOTH => a_client_outside_the_ranges_is_dropped,
    BOTH => a_node_port_without_endpoint_refuses,
    BOTH => another_port_of_an_external_address_is_left_alone,
    BOTH => a_packet_to_an_external_address_never_returns_to_its_router,
    TCP_ONLY => a_lost_connection_of_an_external_frontend_is_reset_where_it_would_leave,
    BOTH => a_port_that_is_no_node_port_is_left_alone,
    BOTH => many_flows_to_one_backend_have_ports_of_their_own,
    BOTH => a_backend_whose_address_is_an_external_one_too_is_reached,
    BOTH => flows_keep_their_replies_when_source_ports_run_out,
    TCP_ONLY => a_port_of_a_closed_flow_rests_while_others_are_free,
    TCP_ONLY => a_port_of_a_closed_flow_is_reused_if_no_other_is_free,
    TCP_ONLY => a_port_of_a_half_closed_flow_is_not_reused,
    TCP_ONLY => a_port_of_a_handshake_is_reused_if_no_other_is_free,
    BOTH => replies_by_the_stack_are_left_alone_until_they_leave,
}

pub(super) const NODE_PORT: u16 = 30_080;

pub(super) fn client<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::outside(), 45_000)
}

/// The node port that most cases use.
pub(super) fn node_port<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::node(), NODE_PORT)
}

pub(super) fn balancer<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::vip_outside_cidrs(9), 80)
}

pub(super) fn here<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::pod(3), 8080)
}

/// A Service at [`web`], [`node_port`] and [`balancer`] with backends at these locations;
/// returns its index.
pub(super) fn exposed<F: TestFamily>(scene: &mut Scene<F>, locations: &[Location]) -> u32 {
    let index = scene.world.add_service(web::<F>(), scene.protocol);
    let frontends = [
        (FrontendKind::NODE_PORT, node_port::<F>()),
        (FrontendKind::EXTERNAL, balancer::<F>()),
        (FrontendKind::NODE_PORT, at(F::loopback(), NODE_PORT)),
    ];
    for (kind, frontend) in frontends {
        scene.world.add_frontend_of_kind(kind, index, frontend, scene.protocol);
    }
    for site in locations {
        let to = match site {
            Location::LocalPod => here::<F>(),
            Location::ThisHost => at(F::node(), 8080),
            Location::OtherNode => at(F::remote_pod(3), 8080),
        };
        scene.world.add_backend(index, to, *site);
    }
    scene.update();
    index
}

pub(super) fn policy<F: TestFamily>(scene: &mut Scene<F>, index: u32, flags: u32) {
    scene.world.services[index as usize].flags = flags;
    scene.update();
}

/// The frontends that clients outside have.
pub(super) fn frontends<F: TestFamily>() -> [Endpoint<F::Address>; 2] {
    [node_port::<F>(), balancer::<F>()]
}

#[track_caller]
fn works<F: TestFamily>(scene: &mut Scene<F>, flow: &TestFlow<F::Address>) {
    scene.request(flow, ACK);
    scene.expect_lookups(1);
    scene.reply(flow, ACK);
    scene.expect_lookups(1);
}

#[track_caller]
pub(super) fn is_seen_as_node<F: TestFamily>(flow: &TestFlow<F::Address>) {
    assert_eq!(flow.sent.source, F::node());
    assert!(SOURCE_PORTS.contains(flow.sent.source_port.get()), "{flow:?}");
}

fn a_backend_here_sees_a_client_outside<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::LocalPod]);
    for frontend in frontends::<F>() {
        let flow = scene.connect(TestSite::FromDevice, client::<F>(), frontend);
        if frontend == node_port::<F>() {
            assert_eq!(flow.sent, tuple(client::<F>(), here::<F>()));
        }
        assert!(matches!(flow.fate, Fate::Translated(_)), "{flow:?}");
        works(scene, &flow);
    }
}

fn a_backend_elsewhere_sees_this_node<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::OtherNode]);
    for frontend in frontends::<F>() {
        let flow = scene.connect(TestSite::FromDevice, client::<F>(), frontend);
        is_seen_as_node::<F>(&flow);
        assert!(matches!(flow.fate, Fate::Forwarded(_)), "{flow:?}");
        works(scene, &flow);
    }
}

fn a_backend_behind_an_overlay_sees_the_address_of_the_overlay<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    exposed(scene, &[Location::OtherNode]);
    let overlay = route_pods_by_overlay(scene);
    for frontend in [node_port::<F>(), balancer::<F>(), web::<F>()] {
        let flow = scene.connect(TestSite::FromDevice, client::<F>(), frontend);
        assert_eq!(flow.sent.source, overlay);
        assert!(SOURCE_PORTS.contains(flow.sent.source_port.get()), "{flow:?}");
        works(scene, &flow);
    }
    // A backend that another route leads to sees the address of that route.
    scene.reset();
    let index = exposed(scene, &[]);
    scene.world.add_backend(index, at(F::other_node(), 8080), Location::OtherNode);
    route_pods_by_overlay(scene);
    let flow = scene.connect(TestSite::FromDevice, from_port(client::<F>(), 3), node_port::<F>());
    is_seen_as_node::<F>(&flow);
}

fn a_process_of_this_node_sees_a_client_outside<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::ThisHost]);
    let flow = scene.connect(TestSite::FromDevice, client::<F>(), node_port::<F>());
    assert_eq!(flow.sent.source, F::outside());
    let outcome = scene.answer(&flow, TestSite::ToDevice, ACK);
    let back = tuple(node_port::<F>(), client::<F>());
    assert_eq!(outcome.fate, Fate::Translated(back));
}

fn a_cluster_ip_from_outside_shows_the_client_to_a_backend_here<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    for location in [Location::LocalPod, Location::ThisHost] {
        scene.reset();
        let index = scene.world.add_service(web::<F>(), scene.protocol);
        let to = if location == Location::LocalPod { here::<F>() } else { at(F::node(), 8080) };
        scene.world.add_backend(index, to, location);
        scene.update();
        for client in [client::<F>(), at(F::remote_pod(8), 41_000)] {
            let flow = scene.open(TestSite::FromDevice, client, web::<F>());
            assert_eq!(flow.fate, Fate::Translated(tuple(client, to)));
            // No frontend is external, but the answer is translated where it leaves.
            let site = match location {
                Location::ThisHost => TestSite::ToDevice,
                _ => TestSite::ToDeviceForwarded,
            };
            let answer = scene.answer(&flow, site, SYN | ACK);
            assert_eq!(answer.fate, Fate::Translated(tuple(web::<F>(), client)));
        }
    }
    scene.reset();
    exposed(scene, &[Location::OtherNode]);
    let flow = scene.connect(TestSite::FromDevice, client::<F>(), web::<F>());
    is_seen_as_node::<F>(&flow);
    assert!(matches!(flow.fate, Fate::Forwarded(_)), "{flow:?}");
    works(scene, &flow);
}

fn a_pod_of_another_node_is_seen_by_a_backend_here<F: TestFamily>(scene: &mut Scene<F>) {
    let index = exposed(scene, &[Location::LocalPod]);
    policy(scene, index, Service::EXTERNAL_LOCAL);
    let client = at(F::remote_pod(8), 41_000);
    for frontend in [node_port::<F>(), web::<F>()] {
        let flow = scene.connect(TestSite::FromDevice, client, frontend);
        assert_eq!(flow.sent.source, client.address);
    }
    scene.reset();
    exposed(scene, &[Location::OtherNode]);
    let flow = scene.connect(TestSite::FromDevice, client, node_port::<F>());
    is_seen_as_node::<F>(&flow);
    works(scene, &flow);
}

fn local_policy_of_a_node_port_holds_for_pods_of_other_nodes<F: TestFamily>(scene: &mut Scene<F>) {
    let index = exposed(scene, &[Location::OtherNode, Location::LocalPod]);
    policy(scene, index, Service::EXTERNAL_LOCAL);
    for port in 1000..1050 {
        let client = at(F::remote_pod(8), port);
        let flow = scene.connect(TestSite::FromDevice, client, node_port::<F>());
        assert_eq!(flow.backend(), here::<F>());
        assert_eq!(flow.sent.source, client.address);
    }
    scene.reset();
    let index = exposed(scene, &[Location::OtherNode]);
    policy(scene, index, Service::EXTERNAL_LOCAL);
    let client = at(F::remote_pod(8), 41_000);
    let ends = [client, node_port::<F>()];
    scene.expect(TestSite::FromDevice, ends, SYN, Reason::NoLocalEndpoint, Fate::Dropped);
    let flow = scene.connect(TestSite::FromDevice, client, balancer::<F>());
    works(scene, &flow);
}

fn local_policy_keeps_to_backends_here<F: TestFamily>(scene: &mut Scene<F>) {
    let index = exposed(scene, &[Location::OtherNode, Location::LocalPod]);
    policy(scene, index, Service::EXTERNAL_LOCAL);
    for port in 1000..1050 {
        let flow = scene.connect(TestSite::FromDevice, at(F::outside(), port), balancer::<F>());
        assert_eq!(flow.backend(), here::<F>());
        assert_eq!(flow.sent.source, F::outside());
    }
}

fn local_policy_without_a_backend_here_drops<F: TestFamily>(scene: &mut Scene<F>) {
    let index = exposed(scene, &[Location::OtherNode]);
    policy(scene, index, Service::EXTERNAL_LOCAL);
    for frontend in frontends::<F>() {
        let ends = [client::<F>(), frontend];
        scene.expect(TestSite::FromDevice, ends, SYN, Reason::NoLocalEndpoint, Fate::Dropped);
    }
}

fn local_policy_is_not_for_pods_and_processes<F: TestFamily>(scene: &mut Scene<F>) {
    let index = exposed(scene, &[Location::OtherNode]);
    policy(scene, index, Service::EXTERNAL_LOCAL | Service::INTERNAL_LOCAL);
    for (site, client) in clients::<F>() {
        let flow = scene.connect(site, client, balancer::<F>());
        assert_eq!(flow.sent.source, client.address);
        works(scene, &flow);
        scene.expect(site, [client, web::<F>()], SYN, Reason::NoLocalEndpoint, Fate::Dropped);
    }
}

fn a_pod_reaches_a_node_port_with_its_own_address<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::OtherNode]);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), node_port::<F>());
    assert_eq!(flow.sent.source, F::pod(1));
    works(scene, &flow);
}

fn a_process_reaches_its_own_node_port<F: TestFamily>(scene: &mut Scene<F>) {
    for location in [Location::LocalPod, Location::OtherNode, Location::ThisHost] {
        scene.reset();
        exposed(scene, &[location]);
        let flow = scene.connect(TestSite::Loopback, process::<F>(), node_port::<F>());
        assert_eq!(flow.sent.source, F::node());
        assert_eq!(flow.sent.source_port, process::<F>().port);
        works(scene, &flow);
    }
    scene.reset();
    exposed(scene, &[Location::OtherNode]);
    let overlay = route_pods_by_overlay(scene);
    let flow = scene.connect(TestSite::Loopback, process::<F>(), node_port::<F>());
    assert_eq!(flow.sent.source, overlay);
    works(scene, &flow);
}

fn a_process_reaches_a_node_port_by_the_loopback_address<F: TestFamily>(scene: &mut Scene<F>) {
    for location in [Location::LocalPod, Location::OtherNode, Location::ThisHost] {
        scene.reset();
        exposed(scene, &[location]);
        let (from, to) = (at(F::loopback(), 50_001), at(F::loopback(), NODE_PORT));
        let flow = scene.connect(TestSite::Loopback, from, to);
        is_seen_as_node::<F>(&flow);
        works(scene, &flow);
    }
}

fn a_process_reaches_a_service_at_an_address_that_its_node_holds<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    for location in [Location::LocalPod, Location::OtherNode, Location::ThisHost] {
        for frontend in [balancer::<F>(), web::<F>()] {
            scene.reset();
            exposed(scene, &[location]);
            let flow = scene.connect(TestSite::Loopback, at(frontend.address, 50_001), frontend);
            is_seen_as_node::<F>(&flow);
            works(scene, &flow);
        }
    }
}

fn a_client_outside_the_ranges_is_dropped<F: TestFamily>(scene: &mut Scene<F>) {
    let index = exposed(scene, &[Location::LocalPod]);
    let [gate, _] = F::service_prefixes();
    let all_ones = gate.mask;
    let range = Prefix { address: F::outside().masked(all_ones), mask: all_ones };
    let other_client = at(F::remote_pod(200), 45_000);
    assert!(!range.contains(other_client.address));
    scene.world.restrict(index, &[range]);
    scene.update();
    scene.connect(TestSite::FromDevice, client::<F>(), balancer::<F>());
    let ends = [other_client, balancer::<F>()];
    scene.expect(TestSite::FromDevice, ends, SYN, Reason::SourceNotAllowed, Fate::Dropped);
    scene.connect(TestSite::FromDevice, other_client, node_port::<F>());
    let ends = [process::<F>(), balancer::<F>()];
    scene.expect(TestSite::ToDevice, ends, SYN, Reason::SourceNotAllowed, Fate::Dropped);
}

fn a_node_port_without_endpoint_refuses<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[]);
    for frontend in frontends::<F>() {
        let refusal = scene.refusal();
        scene.expect(
            TestSite::FromDevice,
            [client::<F>(), frontend],
            SYN,
            Reason::NoEndpoint,
            refusal,
        );
    }
}

fn another_port_of_an_external_address_is_left_alone<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::LocalPod]);
    let ends = [client::<F>(), at(F::vip_outside_cidrs(9), 81)];
    scene.expect(TestSite::FromDevice, ends, SYN, Reason::UnknownAddress, Fate::Untouched);
}

fn a_packet_to_an_external_address_never_returns_to_its_router<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    exposed(scene, &[Location::LocalPod]);
    let vip = F::vip_outside_cidrs(9);
    let ends = [client::<F>(), at(vip, 81)];
    let dropped = (Reason::Returning, Fate::Dropped);
    scene.expect(TestSite::ToDeviceReturned, ends, SYN, dropped.0, dropped.1);
    let ping = Frame::new(client::<F>(), at(vip, 0), Body::Icmp(F::ECHO_REQUEST, 0));
    scene.expect_frame(TestSite::FromDevice, &ping, Reason::UnknownAddress, Fate::Untouched);
    scene.expect_frame(TestSite::ToDeviceReturned, &ping, dropped.0, dropped.1);
    // By another device it may leave: another machine behind this router may have the address.
    scene.expect(TestSite::ToDeviceForwarded, ends, SYN, Reason::NoFlow, Fate::Untouched);
    let ends = [process::<F>(), at(vip, 81)];
    scene.expect(TestSite::ToDevice, ends, SYN, Reason::UnknownAddress, Fate::Untouched);
    // So may packets to other addresses that return.
    let ends = [client::<F>(), at(F::vip_outside_cidrs(8), 80)];
    scene.expect(TestSite::ToDeviceReturned, ends, SYN, Reason::NoFlow, Fate::Untouched);
}

fn a_lost_connection_of_an_external_frontend_is_reset_where_it_would_leave<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    exposed(scene, &[Location::LocalPod]);
    let ends = [client::<F>(), balancer::<F>()];
    scene.expect(TestSite::FromDevice, ends, ACK, Reason::UnknownTcpFlow, Fate::Untouched);
    let reset = (Reason::Orphan, Fate::Answered(Answer::Reset));
    for flags in [ACK, FIN | ACK] {
        scene.expect(TestSite::ToDeviceReturned, ends, flags, reset.0, reset.1);
        // By another device it may leave: another machine behind this router may have the address.
        let untouched = (Reason::NoFlow, Fate::Untouched);
        scene.expect(TestSite::ToDeviceForwarded, ends, flags, untouched.0, untouched.1);
    }
}

/// k3s gives the addresses of all nodes to a load balancer, and its ingress controllers use the
/// network of their nodes.
fn a_backend_whose_address_is_an_external_one_too_is_reached<F: TestFamily>(scene: &mut Scene<F>) {
    let index = exposed(scene, &[Location::OtherNode]);
    let backend = at(F::remote_pod(3), 8080);
    scene.world.add_frontend_of_kind(FrontendKind::EXTERNAL, index, backend, scene.protocol);
    scene.update();
    // What this node has translated leaves by the device that it came in by, or by another one.
    let of_pod = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    let of_client = scene.open(TestSite::FromDevice, client::<F>(), node_port::<F>());
    for (flow, site) in
        [(of_pod, TestSite::ToDeviceForwarded), (of_client, TestSite::ToDeviceReturned)]
    {
        assert_eq!(flow.backend(), backend);
        let ends = [at(flow.sent.source, flow.sent.source_port.get()), backend];
        for flags in [SYN, ACK] {
            scene.expect(site, ends, flags, Reason::NoFlow, Fate::Untouched);
        }
    }
}

fn a_port_that_is_no_node_port_is_left_alone<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::LocalPod]);
    let ends = [client::<F>(), at(F::node(), 22)];
    scene.expect(TestSite::FromDevice, ends, SYN, Reason::NoFlow, Fate::Untouched);
    // Node ports may have been others before.
    scene.expect_lookups(2);
    let ends = [client::<F>(), at(F::node(), NODE_PORT + 1)];
    scene.expect(TestSite::FromDevice, ends, SYN, Reason::UnknownAddress, Fate::Untouched);
    let ends = [at(F::pod(3), 5000), client::<F>()];
    scene.expect(TestSite::ToDeviceForwarded, ends, SYN, Reason::NoFlow, Fate::Untouched);
    scene.expect_lookups(1);
}

fn many_flows_to_one_backend_have_ports_of_their_own<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::OtherNode]);
    let flows: Vec<_> = (1000..1700)
        .map(|port| scene.connect(TestSite::FromDevice, at(F::outside(), port), node_port::<F>()))
        .collect();
    for flow in &flows {
        works(scene, flow);
    }
}

fn flows_keep_their_replies_when_source_ports_run_out<F: TestFamily>(scene: &mut Scene<F>) {
    scene.world.settings.source_ports.count = 2;
    exposed(scene, &[Location::OtherNode]);
    let flows = [1000, 1001]
        .map(|port| scene.connect(TestSite::FromDevice, at(F::outside(), port), node_port::<F>()));
    let ends = [at(F::outside(), 1002), node_port::<F>()];
    let refusal = scene.refusal();
    scene.expect(TestSite::FromDevice, ends, SYN, Reason::NoSourcePort, refusal);
    for flow in &flows {
        works(scene, flow);
    }
}

fn a_port_of_a_half_closed_flow_is_not_reused<F: TestFamily>(scene: &mut Scene<F>) {
    scene.world.settings.source_ports.count = 1;
    exposed(scene, &[Location::OtherNode]);
    let one = scene.connect(TestSite::FromDevice, client::<F>(), node_port::<F>());
    scene.request(&one, FIN | ACK);
    let ends = [at(F::outside(), 1002), node_port::<F>()];
    scene.expect(TestSite::FromDevice, ends, SYN, Reason::NoSourcePort, scene.refusal());
    works(scene, &one);
}

fn replies_by_the_stack_are_left_alone_until_they_leave<F: TestFamily>(scene: &mut Scene<F>) {
    // More node addresses than the settings hold: any address may be the node's.
    let too_many = MAX_PREFIXES as u32 + 1;
    scene.world.settings.ipv4.node_address_count = too_many;
    scene.world.settings.ipv6.node_address_count = too_many;
    exposed(scene, &[Location::LocalPod]);
    for port in [45_000, 30_100] {
        let client = at(F::outside(), port);
        let flow = scene.open(TestSite::FromDevice, client, node_port::<F>());
        let ends = [here::<F>(), client];
        scene.expect(TestSite::FromPod, ends, SYN | ACK, Reason::NoFlow, Fate::Untouched);
        scene.reply(&flow, SYN | ACK);
        scene.request(&flow, ACK);
        scene.expect(TestSite::FromPod, ends, ACK, Reason::NoFlow, Fate::Untouched);
        works(scene, &flow);
    }
}

fn a_port_of_a_closed_flow_rests_while_others_are_free<F: TestFamily>(scene: &mut Scene<F>) {
    // The other port must be drawn every time, not half of the times.
    for round in 0..12 {
        scene.reset();
        scene.world.settings.source_ports.count = 2;
        exposed(scene, &[Location::OtherNode]);
        let one = scene.connect(TestSite::FromDevice, client::<F>(), node_port::<F>());
        match round % 2 {
            0 => {
                scene.reply(&one, FIN | ACK);
                scene.request(&one, FIN | ACK);
            }
            _ => scene.request(&one, RST),
        }
        scene.wait(seconds::TCP_CLOSING - 1);
        let two = scene.connect(TestSite::FromDevice, at(F::outside(), 1002), node_port::<F>());
        assert_ne!(one.sent.source_port, two.sent.source_port);
        works(scene, &two);
    }
}

/// A flood of SYNs would else take all ports to a backend.
fn a_port_of_a_handshake_is_reused_if_no_other_is_free<F: TestFamily>(scene: &mut Scene<F>) {
    scene.world.settings.source_ports.count = 1;
    exposed(scene, &[Location::OtherNode]);
    let one = scene.open(TestSite::FromDevice, client::<F>(), node_port::<F>());
    scene.reply(&one, SYN | ACK);
    let two = scene.connect(TestSite::FromDevice, at(F::outside(), 1002), node_port::<F>());
    assert_eq!(one.sent.source_port, two.sent.source_port);
    works(scene, &two);
    // That one is established.
    let ends = [at(F::outside(), 1003), node_port::<F>()];
    scene.expect(TestSite::FromDevice, ends, SYN, Reason::NoSourcePort, scene.refusal());
}

fn a_port_of_a_closed_flow_is_reused_if_no_other_is_free<F: TestFamily>(scene: &mut Scene<F>) {
    scene.world.settings.source_ports.count = 1;
    exposed(scene, &[Location::OtherNode]);
    let one = scene.connect(TestSite::FromDevice, client::<F>(), node_port::<F>());
    scene.request(&one, FIN | ACK);
    scene.reply(&one, FIN | ACK);
    let two = scene.connect(TestSite::FromDevice, at(F::outside(), 1002), node_port::<F>());
    assert_eq!(one.sent.source_port, two.sent.source_port);
    works(scene, &two);
    let ends = [client::<F>(), node_port::<F>()];
    scene.expect(TestSite::FromDevice, ends, ACK, Reason::UnknownTcpFlow, Fate::Untouched);
}
