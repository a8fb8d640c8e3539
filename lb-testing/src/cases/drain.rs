//! A node that drains: known flows continue until they end, new ones are left to the stack.

use lb_common::{
    abi::{counter::Reason, service::Service, settings::Settings},
    packet::{ACK, FIN, SYN},
};

use super::outside::{client, exposed, frontends, here};
use super::setup::*;
use crate::{
    flow::{TestFlow, tuple},
    frame::{Body, Frame},
    interpreter::Fate,
};

cases! {
    BOTH => known_flows_go_on,
    BOTH => new_flows_are_left_to_the_stack,
    BOTH => a_new_flow_never_leaves_untranslated,
    BOTH => packets_of_no_flow_are_left_to_the_stack_too,
    BOTH => new_flows_are_opened_once_the_drain_is_over,
    BOTH => an_encapsulated_request_still_finds_a_backend,
    TCP_ONLY => a_handshake_is_completed,
    TCP_ONLY => a_connection_that_follows_a_closed_one_is_new,
    UDP_ONLY => a_datagram_whose_backend_is_gone_is_left_to_the_stack,
}

fn drain<F: TestFamily>(scene: &mut Scene<F>) {
    scene.world.settings.flags |= Settings::DRAINING;
    scene.update();
}

/// Where a packet is received, its client and its frontend.
type Newcomer<A> = (TestSite, Endpoint<A>, Endpoint<A>);

/// First packets that come in for a Service.
fn newcomers<F: TestFamily>() -> Vec<Newcomer<F::Address>> {
    let outside = frontends::<F>().map(|frontend| (TestSite::FromDevice, client::<F>(), frontend));
    let mut all = vec![(TestSite::FromPod, pod::<F>(), web::<F>())];
    all.extend(outside);
    // From other ports, because all three frontends lead to the same backend.
    let pods = [41_000, 42_000].map(|port| from_port(pod::<F>(), port));
    let inside = pods.into_iter().zip(frontends::<F>());
    all.extend(inside.map(|(pod, frontend)| (TestSite::FromPod, pod, frontend)));
    all
}

fn flows<F: TestFamily>(scene: &mut Scene<F>) -> Vec<TestFlow<F::Address>> {
    exposed(scene, &[Location::OtherNode]);
    let process = (TestSite::ToDevice, process::<F>(), web::<F>());
    let ends = newcomers::<F>().into_iter().chain([process]);
    ends.map(|(site, client, frontend)| scene.connect(site, client, frontend)).collect()
}

fn known_flows_go_on<F: TestFamily>(scene: &mut Scene<F>) {
    let flows = flows(scene);
    drain(scene);
    for flow in &flows {
        for flags in [ACK, FIN | ACK] {
            scene.request(flow, flags);
            scene.reply(flow, flags);
        }
        scene.request(flow, ACK);
    }
}

fn new_flows_are_left_to_the_stack<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::OtherNode]);
    drain(scene);
    for (site, client, frontend) in newcomers::<F>() {
        scene.expect(site, [client, frontend], SYN, Reason::Draining, Fate::Untouched);
    }
    assert_eq!(scene.flow_counts(), [0, 0]);
}

fn a_new_flow_never_leaves_untranslated<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::OtherNode]);
    drain(scene);
    let dropped = (Reason::UntranslatedLeaving, Fate::Dropped);
    let ends = [process::<F>(), web::<F>()];
    scene.expect(TestSite::ToDevice, ends, SYN, dropped.0, dropped.1);
    let ends = [pod::<F>(), web::<F>()];
    scene.expect(TestSite::ToDeviceForwarded, ends, SYN, dropped.0, dropped.1);
}

fn packets_of_no_flow_are_left_to_the_stack_too<F: TestFamily>(scene: &mut Scene<F>) {
    const SCTP: u8 = 132;
    exposed(scene, &[Location::OtherNode]);
    drain(scene);
    for body in [Body::Icmp(F::ECHO_REQUEST, 0), Body::Other(SCTP)] {
        let frame = Frame::new(pod::<F>(), web::<F>(), body).payload(&[7; 30]);
        scene.expect_frame(TestSite::FromPod, &frame, Reason::Draining, Fate::Untouched);
    }
    // A port that no Service has: another proxy may have it.
    let ends = [pod::<F>(), at(F::vip(1), 81)];
    scene.expect(TestSite::FromPod, ends, SYN, Reason::Draining, Fate::Untouched);
}

fn new_flows_are_opened_once_the_drain_is_over<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::OtherNode]);
    drain(scene);
    let ends = [pod::<F>(), web::<F>()];
    scene.expect(TestSite::FromPod, ends, SYN, Reason::Draining, Fate::Untouched);
    scene.world.settings.flags &= !Settings::DRAINING;
    scene.update();
    scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
}

fn an_encapsulated_request_still_finds_a_backend<F: TestFamily>(scene: &mut Scene<F>) {
    let index = exposed(scene, &[Location::LocalPod]);
    scene.world.services[index as usize].flags = Service::DSR;
    scene.world.settings.flags |= Settings::DSR;
    drain(scene);
    let (from, to) = (client::<F>(), frontends::<F>()[1]);
    let frame = Frame::of(scene.protocol, from, to, SYN).encapsulated(F::other_node(), F::node());
    // The stack cannot translate what is encapsulated.
    let sent = tuple(from, here::<F>());
    scene.expect_frame(TestSite::FromDevice, &frame, Reason::FlowCreated, Fate::Translated(sent));
}

fn a_handshake_is_completed<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::OtherNode]);
    let flow = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    drain(scene);
    scene.request(&flow, SYN);
    scene.reply(&flow, SYN | ACK);
    scene.request(&flow, ACK);
    assert_eq!(scene.flow_counts(), [1, 0]);
}

fn a_connection_that_follows_a_closed_one_is_new<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::OtherNode]);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    drain(scene);
    scene.request(&flow, FIN | ACK);
    scene.reply(&flow, FIN | ACK);
    let ends = [flow.client, flow.frontend];
    scene.expect(flow.site, ends, SYN, Reason::Draining, Fate::Untouched);
    assert_eq!(scene.flow_counts(), [0, 0]);
}

fn a_datagram_whose_backend_is_gone_is_left_to_the_stack<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, ids) = service(scene, 2);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let is_its = |id: &&u32| scene.world.endpoint(**id) == flow.backend();
    let gone = *ids.iter().find(is_its).expect("its backend");
    scene.world.remove_backend(gone);
    drain(scene);
    let ends = [flow.client, flow.frontend];
    scene.expect(flow.site, ends, 0, Reason::Draining, Fate::Untouched);
}
