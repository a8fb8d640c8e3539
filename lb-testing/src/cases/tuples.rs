//! Two flows that would look the same to their backend: one client, one port of it, two
//! front ends, one backend.

use lb_common::{
    abi::counter::Reason,
    balance::FlowTable,
    packet::{ACK, FIN, SYN},
};

use super::setup::*;
use crate::{
    scene::{End, Talk},
    world::{SOURCE_PORTS, seconds},
};

rows! {
    BOTH => a_flow_whose_reply_tuple_is_taken_gets_another_source_port,
    BOTH => without_a_source_port_a_flow_is_refused,
    TCP_ONLY => a_reply_tuple_of_a_closing_flow_is_taken_over,
    BOTH => a_reply_tuple_of_an_expired_flow_is_taken_over,
    TCP_ONLY => the_reply_tuple_of_a_live_handshake_is_not_taken,
    TCP_ONLY => a_reply_entry_that_lost_its_request_entry_is_in_nobodys_way,
    TCP_ONLY => forgetting_a_flow_leaves_the_replies_of_others_alone,
    TCP_ONLY => a_closed_flow_is_not_in_the_way_of_a_connection_to_the_backend_itself,
    UDP_ONLY => taking_over_a_stale_reply_entry_leaves_the_moved_flow_alone,
}

fn other<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::vip(2), 80)
}

/// Two Services with the same backends.
fn two_services<F: TestFamily>(bench: &mut Bench<F>, backends: u8) {
    service_at(bench, web::<F>(), backends);
    service_at(bench, other::<F>(), backends);
    bench.update();
}

fn works<F: TestFamily>(bench: &mut Bench<F>, talk: &Talk<F::Address>) {
    bench.request(talk, ACK);
    bench.reply(talk, ACK);
}

/// Opens a flow to `other` from where `one` came, and shows that both live on.
#[track_caller]
fn beside<F: TestFamily>(bench: &mut Bench<F>, one: &Talk<F::Address>) {
    if bench.is_tcp() {
        // The backend has no answer to this SYN; the client repeats it.
        bench.open(one.place, one.client, other::<F>());
    }
    let two = bench.connect(one.place, one.client, other::<F>());
    assert_eq!(two.sent.source, one.client.address);
    assert!(SOURCE_PORTS.contains(two.sent.source_port.get()), "{two:?}");
    works(bench, &two);
    works(bench, one);
}

fn a_flow_whose_reply_tuple_is_taken_gets_another_source_port<F: TestFamily>(bench: &mut Bench<F>) {
    two_services(bench, 1);
    let one = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    beside(bench, &one);
}

fn without_a_source_port_a_flow_is_refused<F: TestFamily>(bench: &mut Bench<F>) {
    bench.world.settings.source_ports.count = 0;
    two_services(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    let ends = [pod::<F>(), other::<F>()];
    if bench.is_tcp() {
        bench.open(Place::FromPod, pod::<F>(), other::<F>());
    }
    bench.expect(Place::FromPod, ends, SYN, Reason::NoSourcePort, bench.refusal());
    works(bench, &talk);
}

fn a_reply_tuple_of_a_closing_flow_is_taken_over<F: TestFamily>(bench: &mut Bench<F>) {
    two_services(bench, 1);
    let one = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    bench.request(&one, FIN | ACK);
    bench.reply(&one, FIN | ACK);
    let two = bench.connect(Place::FromPod, pod::<F>(), other::<F>());
    works(bench, &two);
    assert_eq!(bench.flow_counts(), [2, 0]);
}

fn a_closed_flow_is_not_in_the_way_of_a_connection_to_the_backend_itself<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    service(bench, 1);
    let one = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    let ends = [one.backend(), pod::<F>()];
    bench.request(&one, FIN | ACK);
    // Only half closed, it may still be a handshake of this flow that is repeated.
    bench.reply(&one, SYN | ACK);
    bench.reply(&one, FIN | ACK);
    bench.expect(Place::ToPod, ends, SYN | ACK, Reason::NoFlow, End::Untouched);
    bench.expect(Place::ToPod, ends, ACK, Reason::NoFlow, End::Untouched);
    assert_eq!(bench.flow_counts(), [0, 0]);
}

fn a_reply_tuple_of_an_expired_flow_is_taken_over<F: TestFamily>(bench: &mut Bench<F>) {
    two_services(bench, 1);
    bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    let lifetime = if bench.is_tcp() { seconds::TCP_ESTABLISHED } else { seconds::UDP_ANSWERED };
    bench.wait(lifetime + 1);
    let two = bench.connect(Place::FromPod, pod::<F>(), other::<F>());
    works(bench, &two);
    assert_eq!(bench.flow_counts(), [2, 0]);
}

fn the_reply_tuple_of_a_live_handshake_is_not_taken<F: TestFamily>(bench: &mut Bench<F>) {
    two_services(bench, 1);
    let one = bench.open(Place::FromPod, pod::<F>(), web::<F>());
    let two = bench.connect(Place::FromPod, pod::<F>(), other::<F>());
    assert_ne!(two.sent.source_port, pod::<F>().port);
    bench.reply(&one, SYN | ACK);
    works(bench, &one);
    works(bench, &two);
}

fn a_reply_entry_that_lost_its_request_entry_is_in_nobodys_way<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    // The sweep deletes entry by entry, and a full table evicts one.
    for wait in [0, seconds::TCP_CLOSING + 1] {
        bench.lab.reset();
        bench.world = Default::default();
        service(bench, 1);
        let one = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
        bench.request(&one, FIN | ACK);
        bench.reply(&one, FIN | ACK);
        bench.lab.remove_flow(FlowTable::Flows, &one.key(bench.protocol));
        bench.wait(wait);
        let two = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
        works(bench, &two);
        assert_eq!(bench.flow_counts(), [2, 0]);
        bench.wait(seconds::TCP_ESTABLISHED / 2);
        works(bench, &two);
    }
}

fn forgetting_a_flow_leaves_the_replies_of_others_alone<F: TestFamily>(bench: &mut Bench<F>) {
    two_services(bench, 1);
    let one = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    bench.request(&one, FIN | ACK);
    bench.lab.remove_flow(FlowTable::Flows, &one.reply_key(bench.protocol));
    let two = bench.connect(Place::FromPod, pod::<F>(), other::<F>());
    bench.open(Place::FromPod, pod::<F>(), web::<F>());
    let three = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    assert_ne!(three.sent, two.sent);
    works(bench, &three);
    works(bench, &two);
}

fn taking_over_a_stale_reply_entry_leaves_the_moved_flow_alone<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    // A flow through `web` moves to another backend; what it leaves behind is taken over
    // by a flow through `other`.
    let (index, ids) = service_at(bench, web::<F>(), 1);
    service_at(bench, other::<F>(), 1);
    bench.update();
    bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    bench.world.remove_backend(ids[0]);
    bench.world.add_backend(index, at(F::remote_pod(9), 8080), Where::Elsewhere);
    bench.update();
    let moved = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    for _ in 0..seconds::UDP_ANSWERED / 10 + 1 {
        bench.wait(10);
        works(bench, &moved);
    }
    let two = bench.connect(Place::FromPod, pod::<F>(), other::<F>());
    works(bench, &two);
    works(bench, &moved);
    assert_eq!(bench.flow_counts(), [4, 0]);
}
