//! A node that drains: what is known goes on to its end, what is new is left to the stack.

use lb_common::{
    abi::{counter::Reason, settings::Settings},
    packet::{ACK, FIN, SYN},
};

use super::outside::{client, exposed, fronts, here};
use super::setup::*;
use crate::{
    frame::{Body, Frame},
    scene::{End, Talk, tuple},
};

rows! {
    BOTH => known_flows_go_on,
    BOTH => new_flows_are_left_to_the_stack,
    BOTH => a_new_flow_that_nobody_translates_never_leaves,
    BOTH => what_is_no_flow_is_left_to_the_stack_too,
    BOTH => new_flows_are_opened_once_the_drain_is_over,
    BOTH => what_was_tunnelled_here_still_finds_a_backend,
    TCP_ONLY => a_handshake_is_completed,
    TCP_ONLY => a_connection_that_follows_a_closed_one_is_new,
    UDP_ONLY => a_datagram_whose_backend_is_gone_is_left_to_the_stack,
}

fn drain<F: TestFamily>(bench: &mut Bench<F>) {
    bench.world.settings.flags |= Settings::DRAINING;
    bench.update();
}

/// Where a packet is caught, its client and its front end.
type Newcomer<A> = (Place, Endpoint<A>, Endpoint<A>);

/// What comes in for a Service.
fn newcomers<F: TestFamily>() -> Vec<Newcomer<F::Address>> {
    let outside = fronts::<F>().map(|front| (Place::FromDevice, client::<F>(), front));
    let mut all = vec![(Place::FromPod, pod::<F>(), web::<F>())];
    all.extend(outside);
    // From other ports: all three lead to the same backend.
    let pods = [41_000, 42_000].map(|port| from_port(pod::<F>(), port));
    let inside = pods.into_iter().zip(fronts::<F>());
    all.extend(inside.map(|(pod, front)| (Place::FromPod, pod, front)));
    all
}

fn talks<F: TestFamily>(bench: &mut Bench<F>) -> Vec<Talk<F::Address>> {
    exposed(bench, &[Where::Elsewhere]);
    let process = (Place::ToDevice, process::<F>(), web::<F>());
    let ends = newcomers::<F>().into_iter().chain([process]);
    ends.map(|(place, client, front)| bench.connect(place, client, front)).collect()
}

fn known_flows_go_on<F: TestFamily>(bench: &mut Bench<F>) {
    let talks = talks(bench);
    drain(bench);
    for talk in &talks {
        for flags in [ACK, FIN | ACK] {
            bench.request(talk, flags);
            bench.reply(talk, flags);
        }
        bench.request(talk, ACK);
    }
}

fn new_flows_are_left_to_the_stack<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Elsewhere]);
    drain(bench);
    for (place, client, front) in newcomers::<F>() {
        bench.expect(place, [client, front], SYN, Reason::Draining, End::Untouched);
    }
    assert_eq!(bench.flow_counts(), [0, 0]);
}

fn a_new_flow_that_nobody_translates_never_leaves<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Elsewhere]);
    drain(bench);
    let dropped = (Reason::UntranslatedLeaving, End::Dropped);
    let ends = [process::<F>(), web::<F>()];
    bench.expect(Place::ToDevice, ends, SYN, dropped.0, dropped.1);
    let ends = [pod::<F>(), web::<F>()];
    bench.expect(Place::ToDeviceForwarded, ends, SYN, dropped.0, dropped.1);
}

fn what_is_no_flow_is_left_to_the_stack_too<F: TestFamily>(bench: &mut Bench<F>) {
    const SCTP: u8 = 132;
    exposed(bench, &[Where::Elsewhere]);
    drain(bench);
    for body in [Body::Icmp(F::ECHO_REQUEST, 0), Body::Other(SCTP)] {
        let frame = Frame::new(pod::<F>(), web::<F>(), body).payload(&[7; 30]);
        bench.expect_frame(Place::FromPod, &frame, Reason::Draining, End::Untouched);
    }
    // A port that no Service has: another proxy may know better.
    let ends = [pod::<F>(), at(F::vip(1), 81)];
    bench.expect(Place::FromPod, ends, SYN, Reason::Draining, End::Untouched);
}

fn new_flows_are_opened_once_the_drain_is_over<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Elsewhere]);
    drain(bench);
    let ends = [pod::<F>(), web::<F>()];
    bench.expect(Place::FromPod, ends, SYN, Reason::Draining, End::Untouched);
    bench.world.settings.flags &= !Settings::DRAINING;
    bench.update();
    bench.connect(Place::FromPod, pod::<F>(), web::<F>());
}

fn what_was_tunnelled_here_still_finds_a_backend<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Here]);
    drain(bench);
    let (from, to) = (client::<F>(), fronts::<F>()[1]);
    let frame = Frame::of(bench.protocol, from, to, SYN).tunnel(F::other_node(), F::node());
    // The stack would know no better what to do with the tunnel.
    let sent = tuple(from, here::<F>());
    bench.expect_frame(Place::FromDevice, &frame, Reason::FlowCreated, End::Onward(sent));
}

fn a_handshake_is_completed<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Elsewhere]);
    let talk = bench.open(Place::FromPod, pod::<F>(), web::<F>());
    drain(bench);
    bench.request(&talk, SYN);
    bench.reply(&talk, SYN | ACK);
    bench.request(&talk, ACK);
    assert_eq!(bench.flow_counts(), [2, 0]);
}

fn a_connection_that_follows_a_closed_one_is_new<F: TestFamily>(bench: &mut Bench<F>) {
    exposed(bench, &[Where::Elsewhere]);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    drain(bench);
    bench.request(&talk, FIN | ACK);
    bench.reply(&talk, FIN | ACK);
    let ends = [talk.client, talk.front];
    bench.expect(talk.place, ends, SYN, Reason::Draining, End::Untouched);
    assert_eq!(bench.flow_counts(), [0, 0]);
}

fn a_datagram_whose_backend_is_gone_is_left_to_the_stack<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, ids) = service(bench, 2);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    let is_its = |id: &&u32| bench.world.endpoint(**id) == talk.backend();
    let gone = *ids.iter().find(is_its).expect("its backend");
    bench.world.remove_backend(gone);
    drain(bench);
    let ends = [talk.client, talk.front];
    bench.expect(talk.place, ends, 0, Reason::Draining, End::Untouched);
}
