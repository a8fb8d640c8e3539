//! Two flows that would look the same to their backend: one client, one of its ports, two
//! frontends, one backend.

use lb_common::{
    abi::counter::Reason,
    packet::{ACK, FIN, SYN},
};

use super::setup::*;
use crate::{
    flow::TestFlow,
    interpreter::Fate,
    world::{SOURCE_PORTS, seconds},
};

cases! {
    BOTH => a_flow_whose_reply_tuple_is_taken_gets_another_source_port,
    BOTH => without_a_source_port_a_flow_is_refused,
    TCP_ONLY => a_reply_tuple_of_a_closing_flow_is_taken_over,
    BOTH => a_reply_tuple_of_an_expired_flow_is_taken_over,
    TCP_ONLY => the_reply_tuple_of_a_live_handshake_is_not_taken,
    TCP_ONLY => a_lost_flow_opens_anew,
    TCP_ONLY => a_closed_flow_blocks_no_connection_to_the_backend_itself,
    UDP_ONLY => taking_over_a_stale_reply_entry_leaves_the_moved_flow_alone,
}

fn other<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::vip(2), 80)
}

/// Two Services with the same backends.
fn two_services<F: TestFamily>(scene: &mut Scene<F>, backends: u8) {
    service_at(scene, web::<F>(), backends);
    service_at(scene, other::<F>(), backends);
    scene.update();
}

fn works<F: TestFamily>(scene: &mut Scene<F>, flow: &TestFlow<F::Address>) {
    scene.request(flow, ACK);
    scene.reply(flow, ACK);
}

/// Opens a flow to `other` from where `one` came, and shows that both live on.
#[track_caller]
fn beside<F: TestFamily>(scene: &mut Scene<F>, one: &TestFlow<F::Address>) {
    let two = scene.connect(one.site, one.client, other::<F>());
    assert_eq!(two.sent.source, one.client.address);
    assert!(SOURCE_PORTS.contains(two.sent.source_port.get()), "{two:?}");
    works(scene, &two);
    works(scene, one);
}

fn a_flow_whose_reply_tuple_is_taken_gets_another_source_port<F: TestFamily>(scene: &mut Scene<F>) {
    two_services(scene, 1);
    let one = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    beside(scene, &one);
}

fn without_a_source_port_a_flow_is_refused<F: TestFamily>(scene: &mut Scene<F>) {
    scene.world.settings.source_ports.count = 0;
    two_services(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let ends = [pod::<F>(), other::<F>()];
    scene.expect(TestSite::FromPod, ends, SYN, Reason::NoSourcePort, scene.refusal());
    works(scene, &flow);
}

fn a_reply_tuple_of_a_closing_flow_is_taken_over<F: TestFamily>(scene: &mut Scene<F>) {
    two_services(scene, 1);
    let one = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.request(&one, FIN | ACK);
    scene.reply(&one, FIN | ACK);
    let two = scene.connect(TestSite::FromPod, pod::<F>(), other::<F>());
    works(scene, &two);
    assert_eq!(scene.flow_counts(), [1, 0]);
}

fn a_closed_flow_blocks_no_connection_to_the_backend_itself<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let one = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let ends = [one.backend(), pod::<F>()];
    scene.request(&one, FIN | ACK);
    // A flow that is half closed may still repeat its handshake.
    scene.reply(&one, SYN | ACK);
    scene.reply(&one, FIN | ACK);
    scene.expect(TestSite::ToPod, ends, SYN | ACK, Reason::NoFlow, Fate::Untouched);
    scene.expect(TestSite::ToPod, ends, ACK, Reason::NoFlow, Fate::Untouched);
    assert_eq!(scene.flow_counts(), [0, 0]);
}

fn a_reply_tuple_of_an_expired_flow_is_taken_over<F: TestFamily>(scene: &mut Scene<F>) {
    two_services(scene, 1);
    scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let lifetime = if scene.is_tcp() { seconds::TCP_ESTABLISHED } else { seconds::UDP };
    scene.wait(lifetime + 1);
    let two = scene.connect(TestSite::FromPod, pod::<F>(), other::<F>());
    works(scene, &two);
    assert_eq!(scene.flow_counts(), [1, 0]);
}

fn the_reply_tuple_of_a_live_handshake_is_not_taken<F: TestFamily>(scene: &mut Scene<F>) {
    two_services(scene, 1);
    let one = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    let two = scene.connect(TestSite::FromPod, pod::<F>(), other::<F>());
    assert_ne!(two.sent.source_port, pod::<F>().port);
    scene.reply(&one, SYN | ACK);
    works(scene, &one);
    works(scene, &two);
}

fn a_lost_flow_opens_anew<F: TestFamily>(scene: &mut Scene<F>) {
    for wait in [0, seconds::TCP_CLOSING + 1] {
        scene.reset();
        service(scene, 1);
        let one = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
        scene.request(&one, FIN | ACK);
        scene.reply(&one, FIN | ACK);
        scene.interpreter.remove_flow(&one.key(scene.protocol));
        scene.wait(wait);
        let two = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
        works(scene, &two);
        assert_eq!(scene.flow_counts(), [1, 0]);
        scene.wait(seconds::TCP_ESTABLISHED / 2);
        works(scene, &two);
    }
}

fn taking_over_a_stale_reply_entry_leaves_the_moved_flow_alone<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    // A flow through `web` moves to another backend; a flow through `other` takes over the reply
    // entry that it leaves behind.
    let (index, ids) = service_at(scene, web::<F>(), 1);
    service_at(scene, other::<F>(), 1);
    scene.update();
    scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.world.remove_backend(ids[0]);
    scene.world.add_backend(index, at(F::remote_pod(9), 8080), Location::OtherNode);
    scene.update();
    let moved = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    for _ in 0..seconds::UDP / 10 + 1 {
        scene.wait(10);
        works(scene, &moved);
    }
    let two = scene.connect(TestSite::FromPod, pod::<F>(), other::<F>());
    works(scene, &two);
    works(scene, &moved);
    assert_eq!(scene.flow_counts(), [2, 0]);
}
