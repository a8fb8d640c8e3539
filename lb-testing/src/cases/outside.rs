//! Front ends that clients outside the cluster reach: whose address the backend sees,
//! which backends there are, and who is turned away.

use lb_common::{
    abi::{
        address::Prefix, counter::Reason, frontend::FrontendKind, service::Service,
        settings::MAX_PREFIXES,
    },
    packet::{ACK, FIN, SYN},
};

use super::setup::*;
use crate::{
    scene::{End, Talk},
    world::SOURCE_PORTS,
};

rows! {
    BOTH => a_backend_here_sees_a_client_outside,
    BOTH => a_backend_elsewhere_sees_this_node,
    BOTH => a_process_of_this_node_sees_a_client_outside,
    BOTH => a_cluster_ip_from_outside_shows_this_node,
    BOTH => a_pod_of_another_node_is_seen_by_a_backend_here,
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
    BOTH => what_is_no_node_port_is_left_alone,
    BOTH => many_flows_to_one_backend_have_ports_of_their_own,
    BOTH => no_reply_is_anothers_when_ports_run_out,
    TCP_ONLY => a_port_of_a_closed_flow_is_used_again,
    TCP_ONLY => a_port_of_a_half_closed_flow_is_not_anothers,
    BOTH => replies_by_the_stack_are_left_alone_until_they_leave,
}

pub(super) const NODE_PORT: u16 = 30_080;

pub(super) fn client<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::outside(), 45_000)
}

/// The node port that most rows use.
pub(super) fn node_port<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::node(), NODE_PORT)
}

pub(super) fn balancer<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::vip_elsewhere(9), 80)
}

pub(super) fn here<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::pod(3), 8080)
}

/// A Service at [`web`], [`node_port`] and [`balancer`] with backends at these places;
/// returns its index.
pub(super) fn exposed<F: TestFamily>(bench: &mut Bench<F>, places: &[Where]) -> u32 {
    let index = bench.world.add_service(web::<F>(), bench.protocol);
    let fronts = [
        (FrontendKind::NODE_PORT, node_port::<F>()),
        (FrontendKind::EXTERNAL, balancer::<F>()),
        (FrontendKind::NODE_PORT, at(F::loopback(), NODE_PORT)),
    ];
    for (kind, front) in fronts {
        bench.world.add_front_of(kind, index, front, bench.protocol);
    }
    for place in places {
        let to = match place {
            Where::Here => here::<F>(),
            Where::Host => at(F::node(), 8080),
            Where::Elsewhere => at(F::remote_pod(3), 8080),
        };
        bench.world.add_backend(index, to, *place);
    }
    bench.update();
    index
}

pub(super) fn policy<F: TestFamily>(bench: &mut Bench<F>, index: u32, flags: u32) {
    bench.world.services[index as usize].flags = flags;
    bench.update();
}

/// The front ends that clients outside have.
pub(super) fn fronts<F: TestFamily>() -> [Endpoint<F::Address>; 2] {
    [node_port::<F>(), balancer::<F>()]
}

#[track_caller]
fn works<F: TestFamily>(bench: &mut Bench<F>, talk: &Talk<F::Address>) {
    bench.request(talk, ACK);
    bench.expect_lookups(1);
    bench.reply(talk, ACK);
    bench.expect_lookups(1);
}

#[track_caller]
pub(super) fn is_seen_as_node<F: TestFamily>(talk: &Talk<F::Address>) {
    assert_eq!(talk.sent.source, F::node());
    assert!(SOURCE_PORTS.contains(talk.sent.source_port.get()), "{talk:?}");
}

fn a_backend_here_sees_a_client_outside<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Here]);
    for front in fronts::<F>() {
        let talk = bench.connect(Place::FromDevice, client::<F>(), front);
        if front == node_port::<F>() {
            assert_eq!(talk.sent, crate::scene::tuple(client::<F>(), here::<F>()));
        }
        assert!(matches!(talk.end, End::Onward(_)), "{talk:?}");
        works(bench, &talk);
    }
}

fn a_backend_elsewhere_sees_this_node<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Elsewhere]);
    for front in fronts::<F>() {
        let talk = bench.connect(Place::FromDevice, client::<F>(), front);
        is_seen_as_node::<F>(&talk);
        assert!(matches!(talk.end, End::Forwarded(_)), "{talk:?}");
        works(bench, &talk);
    }
}

fn a_process_of_this_node_sees_a_client_outside<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Host]);
    let talk = bench.connect(Place::FromDevice, client::<F>(), node_port::<F>());
    assert_eq!(talk.sent.source, F::outside());
    let outcome = bench.answer(&talk, Place::ToDevice, ACK);
    let back = crate::scene::tuple(node_port::<F>(), client::<F>());
    assert_eq!(outcome.end, End::Onward(back));
}

fn a_cluster_ip_from_outside_shows_this_node<F: TestFamily>(bench: &mut Bench<F>) {
    for place in [Where::Here, Where::Host, Where::Elsewhere] {
        bench.lab.reset();
        bench.world = Default::default();
        exposed(bench, &[place]);
        let talk = bench.connect(Place::FromDevice, client::<F>(), web::<F>());
        is_seen_as_node::<F>(&talk);
        works(bench, &talk);
        let by_loopback = matches!(talk.end, End::IntoLoopback(_));
        assert_eq!(by_loopback, place == Where::Host, "{talk:?}");
        if !by_loopback {
            assert!(matches!(talk.end, End::Forwarded(_)), "{talk:?}");
        }
    }
}

fn a_pod_of_another_node_is_seen_by_a_backend_here<F: TestFamily>(bench: &mut Bench<F>) {
    let index = exposed(bench, &[Where::Here]);
    policy(bench, index, Service::EXTERNAL_LOCAL);
    let client = at(F::remote_pod(8), 41_000);
    for front in [node_port::<F>(), web::<F>()] {
        let talk = bench.connect(Place::FromDevice, client, front);
        assert_eq!(talk.sent.source, client.address);
    }
    bench.lab.reset();
    bench.world = Default::default();
    let index = exposed(bench, &[Where::Elsewhere]);
    policy(bench, index, Service::EXTERNAL_LOCAL);
    let talk = bench.connect(Place::FromDevice, client, node_port::<F>());
    is_seen_as_node::<F>(&talk);
    works(bench, &talk);
}

fn local_policy_keeps_to_backends_here<F: TestFamily>(bench: &mut Bench<F>) {
    let index = exposed(bench, &[Where::Elsewhere, Where::Here]);
    policy(bench, index, Service::EXTERNAL_LOCAL);
    for port in 1000..1050 {
        let talk = bench.connect(Place::FromDevice, at(F::outside(), port), balancer::<F>());
        assert_eq!(talk.backend(), here::<F>());
        assert_eq!(talk.sent.source, F::outside());
    }
}

fn local_policy_without_a_backend_here_drops<F: TestFamily>(bench: &mut Bench<F>) {
    let index = exposed(bench, &[Where::Elsewhere]);
    policy(bench, index, Service::EXTERNAL_LOCAL);
    for front in fronts::<F>() {
        let ends = [client::<F>(), front];
        bench.expect(Place::FromDevice, ends, SYN, Reason::NoLocalEndpoint, End::Dropped);
    }
}

fn local_policy_is_not_for_pods_and_processes<F: TestFamily>(bench: &mut Bench<F>) {
    let index = exposed(bench, &[Where::Elsewhere]);
    policy(bench, index, Service::EXTERNAL_LOCAL | Service::INTERNAL_LOCAL);
    for (place, client) in clients::<F>() {
        let talk = bench.connect(place, client, balancer::<F>());
        assert_eq!(talk.sent.source, client.address);
        works(bench, &talk);
        bench.expect(place, [client, web::<F>()], SYN, Reason::NoLocalEndpoint, End::Dropped);
    }
}

fn a_pod_reaches_a_node_port_with_its_own_address<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Elsewhere]);
    let talk = bench.connect(Place::FromPod, pod::<F>(), node_port::<F>());
    assert_eq!(talk.sent.source, F::pod(1));
    works(bench, &talk);
}

fn a_process_reaches_its_own_node_port<F: TestFamily>(bench: &mut Bench<F>) {
    for place in [Where::Here, Where::Elsewhere, Where::Host] {
        bench.lab.reset();
        bench.world = Default::default();
        exposed(bench, &[place]);
        let talk = bench.connect(Place::Loopback, process::<F>(), node_port::<F>());
        assert_eq!(talk.sent.source, F::node());
        assert_eq!(talk.sent.source_port, process::<F>().port);
        works(bench, &talk);
    }
}

fn a_process_reaches_a_node_port_by_the_loopback_address<F: TestFamily>(bench: &mut Bench<F>) {
    for place in [Where::Here, Where::Elsewhere, Where::Host] {
        bench.lab.reset();
        bench.world = Default::default();
        exposed(bench, &[place]);
        let (from, to) = (at(F::loopback(), 50_001), at(F::loopback(), NODE_PORT));
        let talk = bench.connect(Place::Loopback, from, to);
        is_seen_as_node::<F>(&talk);
        works(bench, &talk);
    }
}

fn a_process_reaches_a_service_at_an_address_that_its_node_holds<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    for place in [Where::Here, Where::Elsewhere, Where::Host] {
        for front in [balancer::<F>(), web::<F>()] {
            bench.lab.reset();
            bench.world = Default::default();
            exposed(bench, &[place]);
            let talk = bench.connect(Place::Loopback, at(front.address, 50_001), front);
            is_seen_as_node::<F>(&talk);
            works(bench, &talk);
        }
    }
}

fn a_client_outside_the_ranges_is_dropped<F: TestFamily>(bench: &mut Bench<F>) {
    let index = exposed(bench, &[Where::Here]);
    let [gate, _] = F::gate();
    let all_ones = gate.mask;
    let range = Prefix { address: F::outside().masked(all_ones), mask: all_ones };
    let stranger = at(F::remote_pod(200), 45_000);
    assert!(!range.contains(stranger.address));
    bench.world.restrict(index, &[range]);
    bench.update();
    bench.connect(Place::FromDevice, client::<F>(), balancer::<F>());
    let ends = [stranger, balancer::<F>()];
    bench.expect(Place::FromDevice, ends, SYN, Reason::SourceNotAllowed, End::Dropped);
    bench.connect(Place::FromDevice, stranger, node_port::<F>());
    let ends = [process::<F>(), balancer::<F>()];
    bench.expect(Place::ToDevice, ends, SYN, Reason::SourceNotAllowed, End::Dropped);
}

fn a_node_port_without_endpoint_refuses<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[]);
    for front in fronts::<F>() {
        let refusal = bench.refusal();
        bench.expect(Place::FromDevice, [client::<F>(), front], SYN, Reason::NoEndpoint, refusal);
    }
}

fn another_port_of_an_external_address_is_left_alone<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Here]);
    let ends = [client::<F>(), at(F::vip_elsewhere(9), 81)];
    bench.expect(Place::FromDevice, ends, SYN, Reason::UnknownAddress, End::Untouched);
}

fn what_is_no_node_port_is_left_alone<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Here]);
    let ends = [client::<F>(), at(F::node(), 22)];
    bench.expect(Place::FromDevice, ends, SYN, Reason::NoFlow, End::Untouched);
    bench.expect_lookups(1);
    let ends = [client::<F>(), at(F::node(), NODE_PORT + 1)];
    bench.expect(Place::FromDevice, ends, SYN, Reason::UnknownAddress, End::Untouched);
    let ends = [at(F::pod(3), 5000), client::<F>()];
    bench.expect(Place::ToDeviceForwarded, ends, SYN, Reason::NoFlow, End::Untouched);
    bench.expect_lookups(1);
}

fn many_flows_to_one_backend_have_ports_of_their_own<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Elsewhere]);
    let talks: Vec<_> = (1000..1700)
        .map(|port| bench.connect(Place::FromDevice, at(F::outside(), port), node_port::<F>()))
        .collect();
    for talk in &talks {
        works(bench, talk);
    }
}

fn no_reply_is_anothers_when_ports_run_out<F: TestFamily>(bench: &mut Bench<F>) {
    bench.world.settings.source_ports.count = 2;
    exposed(bench, &[Where::Elsewhere]);
    let talks = [1000, 1001]
        .map(|port| bench.connect(Place::FromDevice, at(F::outside(), port), node_port::<F>()));
    let ends = [at(F::outside(), 1002), node_port::<F>()];
    let refusal = bench.refusal();
    bench.expect(Place::FromDevice, ends, SYN, Reason::NoSourcePort, refusal);
    for talk in &talks {
        works(bench, talk);
    }
}

fn a_port_of_a_half_closed_flow_is_not_anothers<F: TestFamily>(bench: &mut Bench<F>) {
    bench.world.settings.source_ports.count = 1;
    exposed(bench, &[Where::Elsewhere]);
    let one = bench.connect(Place::FromDevice, client::<F>(), node_port::<F>());
    bench.request(&one, FIN | ACK);
    let ends = [at(F::outside(), 1002), node_port::<F>()];
    bench.expect(Place::FromDevice, ends, SYN, Reason::NoSourcePort, bench.refusal());
    works(bench, &one);
}

fn replies_by_the_stack_are_left_alone_until_they_leave<F: TestFamily>(bench: &mut Bench<F>) {
    // More addresses than are compared: every one may be the node's, a client's too.
    let too_many = MAX_PREFIXES as u32 + 1;
    bench.world.settings.ipv4.node_address_count = too_many;
    bench.world.settings.ipv6.node_address_count = too_many;
    exposed(bench, &[Where::Here]);
    for port in [45_000, 30_100] {
        let client = at(F::outside(), port);
        let talk = bench.open(Place::FromDevice, client, node_port::<F>());
        let ends = [here::<F>(), client];
        bench.expect(Place::FromPod, ends, SYN | ACK, Reason::NoFlow, End::Untouched);
        bench.reply(&talk, SYN | ACK);
        bench.request(&talk, ACK);
        bench.expect(Place::FromPod, ends, ACK, Reason::NoFlow, End::Untouched);
        works(bench, &talk);
    }
}

fn a_port_of_a_closed_flow_is_used_again<F: TestFamily>(bench: &mut Bench<F>) {
    bench.world.settings.source_ports.count = 1;
    exposed(bench, &[Where::Elsewhere]);
    let one = bench.connect(Place::FromDevice, client::<F>(), node_port::<F>());
    bench.request(&one, FIN | ACK);
    bench.reply(&one, FIN | ACK);
    let two = bench.connect(Place::FromDevice, at(F::outside(), 1002), node_port::<F>());
    assert_eq!(one.sent.source_port, two.sent.source_port);
    works(bench, &two);
    let ends = [client::<F>(), node_port::<F>()];
    bench.expect(Place::FromDevice, ends, ACK, Reason::UnknownTcpFlow, End::Untouched);
}
