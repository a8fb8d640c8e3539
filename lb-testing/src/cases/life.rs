//! TCP connections over time (docs/contract.md, section 7).

use lb_common::{
    abi::counter::Reason,
    packet::{ACK, FIN, PSH, RST, SYN},
};

use super::setup::*;
use crate::{flow::TestFlow, interpreter::Fate, world::seconds};

cases! {
    TCP_ONLY => an_established_flow_keeps_its_backend_through_anything,
    TCP_ONLY => a_syn_on_an_established_flow_goes_to_its_backend,
    TCP_ONLY => a_syn_on_an_established_flow_of_a_gone_backend_chooses_again,
    TCP_ONLY => a_syn_on_a_closing_flow_chooses_again,
    TCP_ONLY => a_syn_on_an_expired_flow_chooses_again,
    TCP_ONLY => a_repeated_syn_keeps_its_backend,
    TCP_ONLY => a_repeated_syn_of_a_gone_backend_chooses_again,
    TCP_ONLY => a_handshake_moves_to_the_table_of_flows_with_its_last_packet,
    TCP_ONLY => a_flood_of_syns_leaves_the_table_of_flows_alone,
    TCP_ONLY => a_client_that_resets_a_handshake_establishes_nothing,
    TCP_ONLY => a_client_that_closes_with_the_handshake_is_seen_closing,
    TCP_ONLY => a_backend_that_resets_a_handshake_lets_the_next_one_choose_again,
    TCP_ONLY => a_repeated_syn_ack_is_translated_after_the_handshake,
    TCP_ONLY => a_handshake_expires,
    TCP_ONLY => an_established_flow_expires,
    TCP_ONLY => a_half_closed_flow_goes_on,
    TCP_ONLY => a_closed_flow_expires_soon,
    TCP_ONLY => a_reset_flow_expires_soon,
    TCP_ONLY => an_rst_that_nobody_believes_changes_nothing,
    TCP_ONLY => an_rst_ends_a_flow_however_often_it_is_repeated,
    TCP_ONLY => fins_that_nobody_believes_change_nothing,
    TCP_ONLY => whoever_goes_on_before_the_sweep_was_never_closed,
    TCP_ONLY => packets_keep_a_flow_alive,
}

#[track_caller]
fn is_expired<F: TestFamily>(scene: &mut Scene<F>, flow: &TestFlow<F::Address>) {
    is_expired_for(scene, flow, ACK);
}

/// A flow that was closed: nobody goes on.
#[track_caller]
fn is_over<F: TestFamily>(scene: &mut Scene<F>, flow: &TestFlow<F::Address>) {
    is_expired_for(scene, flow, RST);
}

#[track_caller]
fn is_expired_for<F: TestFamily>(scene: &mut Scene<F>, flow: &TestFlow<F::Address>, flags: u8) {
    let ends = [flow.client, flow.frontend];
    scene.expect(flow.site, ends, flags, Reason::UnknownTcpFlow, Fate::Untouched);
    let outcome = scene.answer(flow, TestSite::ToPod, flags);
    assert_eq!((outcome.reason, outcome.fate), (Reason::NoFlow, Fate::Untouched));
}

/// Leaves the Service one backend, other than that of `flow`.
fn replace_backend<F: TestFamily>(
    scene: &mut Scene<F>,
    ids: &[u32],
    flow: &TestFlow<F::Address>,
    gone: bool,
) {
    for id in ids {
        if scene.world.endpoint(*id) == flow.backend() {
            if gone { scene.world.remove_backend(*id) } else { scene.world.drain(*id) }
        }
    }
    scene.update();
}

fn connected<F: TestFamily>(scene: &mut Scene<F>) -> (Vec<u32>, TestFlow<F::Address>) {
    let (_, ids) = service(scene, 2);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    (ids, flow)
}

/// The client opens again from the same port, and gets another backend.
#[track_caller]
fn chooses_again<F: TestFamily>(scene: &mut Scene<F>, ids: &[u32], flow: &TestFlow<F::Address>) {
    replace_backend(scene, ids, flow, false);
    let next = scene.connect(flow.site, flow.client, flow.frontend);
    assert_ne!(next.backend(), flow.backend());
    scene.request(&next, ACK);
    scene.reply(&next, ACK);
    assert_eq!(scene.flow_counts(), [1, 0]);
}

fn an_established_flow_keeps_its_backend_through_anything<F: TestFamily>(scene: &mut Scene<F>) {
    let (ids, flow) = connected(scene);
    for gone in [false, true] {
        replace_backend(scene, &ids, &flow, gone);
        scene.request(&flow, ACK);
        scene.reply(&flow, ACK);
    }
    ids.iter().for_each(|id| scene.world.remove_backend(*id));
    scene.world.remove_frontends(1);
    scene.update();
    for _ in 0..10 {
        scene.wait(3_600);
        scene.request(&flow, ACK);
        scene.reply(&flow, ACK);
    }
}

fn a_syn_on_an_established_flow_goes_to_its_backend<F: TestFamily>(scene: &mut Scene<F>) {
    let (ids, flow) = connected(scene);
    replace_backend(scene, &ids, &flow, false);
    scene.request(&flow, SYN);
    scene.reply(&flow, ACK);
    scene.request(&flow, ACK);
    assert_eq!(scene.flow_counts(), [1, 0]);
}

fn a_syn_on_an_established_flow_of_a_gone_backend_chooses_again<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    let (ids, flow) = connected(scene);
    replace_backend(scene, &ids, &flow, true);
    chooses_again(scene, &ids, &flow);
}

fn a_syn_on_a_closing_flow_chooses_again<F: TestFamily>(scene: &mut Scene<F>) {
    for from_client in [true, false] {
        for flags in [FIN | ACK, RST] {
            scene.reset();
            let (ids, flow) = connected(scene);
            if from_client {
                scene.request(&flow, flags)
            } else {
                scene.reply(&flow, flags)
            }
            chooses_again(scene, &ids, &flow);
        }
    }
}

fn a_syn_on_an_expired_flow_chooses_again<F: TestFamily>(scene: &mut Scene<F>) {
    let (ids, flow) = connected(scene);
    scene.wait(seconds::TCP_ESTABLISHED + 1);
    chooses_again(scene, &ids, &flow);
}

fn a_repeated_syn_keeps_its_backend<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, ids) = service(scene, 2);
    let flow = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    replace_backend(scene, &ids, &flow, false);
    for _ in 0..5 {
        scene.wait(1);
        scene.request(&flow, SYN);
    }
    scene.reply(&flow, SYN | ACK);
    scene.request(&flow, SYN);
    scene.reply(&flow, SYN | ACK);
    scene.request(&flow, ACK);
    assert_eq!(scene.flow_counts(), [1, 0]);
}

fn a_repeated_syn_of_a_gone_backend_chooses_again<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, ids) = service(scene, 2);
    let flow = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    replace_backend(scene, &ids, &flow, true);
    chooses_again(scene, &ids, &flow);
}

fn a_handshake_moves_to_the_table_of_flows_with_its_last_packet<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    service(scene, 1);
    let flow = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    assert_eq!(scene.flow_counts(), [0, 1]);
    scene.reply(&flow, SYN | ACK);
    assert_eq!(scene.flow_counts(), [0, 1]);
    scene.request(&flow, ACK);
    assert_eq!(scene.flow_counts(), [1, 0]);
}

fn a_flood_of_syns_leaves_the_table_of_flows_alone<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, flow) = connected(scene);
    for port in 1000..2000 {
        scene.open(TestSite::FromPod, from_port(pod::<F>(), port), web::<F>());
    }
    assert_eq!(scene.flow_counts()[0], 1);
    scene.request(&flow, ACK);
}

fn a_client_that_resets_a_handshake_establishes_nothing<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, ids) = service(scene, 2);
    let flow = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.reply(&flow, SYN | ACK);
    scene.request(&flow, RST);
    assert_eq!(scene.flow_counts()[0], 0);
    scene.wait(seconds::TCP_RESET + 1);
    is_expired(scene, &flow);
    chooses_again(scene, &ids, &flow);
}

fn a_client_that_closes_with_the_handshake_is_seen_closing<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, ids) = service(scene, 2);
    let flow = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.reply(&flow, SYN | ACK);
    scene.request(&flow, FIN | ACK);
    scene.reply(&flow, FIN | ACK);
    scene.request(&flow, ACK);
    chooses_again(scene, &ids, &flow);
}

fn a_backend_that_resets_a_handshake_lets_the_next_one_choose_again<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    let (_, ids) = service(scene, 2);
    let flow = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.reply(&flow, RST | ACK);
    chooses_again(scene, &ids, &flow);
}

fn a_repeated_syn_ack_is_translated_after_the_handshake<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, flow) = connected(scene);
    scene.reply(&flow, SYN | ACK);
    scene.request(&flow, ACK);
    scene.reply(&flow, RST);
}

fn a_handshake_expires<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, ids) = service(scene, 2);
    let flow = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.wait(seconds::TCP_SYN - 1);
    scene.reply(&flow, SYN | ACK);
    scene.forget();
    let flow = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.wait(seconds::TCP_SYN + 1);
    let outcome = scene.answer(&flow, TestSite::ToPod, SYN | ACK);
    assert_eq!((outcome.reason, outcome.fate), (Reason::NoFlow, Fate::Untouched));
    is_expired(scene, &flow);
    chooses_again(scene, &ids, &flow);
}

fn an_established_flow_expires<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, flow) = connected(scene);
    scene.wait(seconds::TCP_ESTABLISHED - 2);
    scene.request(&flow, ACK);
    scene.wait(seconds::TCP_ESTABLISHED + 1);
    is_expired(scene, &flow);
}

fn a_half_closed_flow_goes_on<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, flow) = connected(scene);
    scene.request(&flow, FIN | ACK);
    for _ in 0..3 {
        scene.wait(seconds::TCP_HALF_CLOSED - 10);
        scene.reply(&flow, ACK);
        scene.request(&flow, ACK);
    }
    scene.wait(seconds::TCP_HALF_CLOSED + 1);
    is_expired(scene, &flow);
}

fn a_closed_flow_expires_soon<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, flow) = connected(scene);
    scene.reply(&flow, FIN | ACK);
    scene.request(&flow, FIN | ACK);
    scene.reply(&flow, ACK);
    scene.wait(seconds::TCP_CLOSING - 1);
    scene.request(&flow, ACK);
    scene.wait(seconds::TCP_CLOSING + 1);
    is_over(scene, &flow);
}

fn a_reset_flow_expires_soon<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, flow) = connected(scene);
    scene.reply(&flow, RST);
    // This one crossed the RST.
    scene.request(&flow, ACK);
    scene.wait(seconds::TCP_RESET + 1);
    is_over(scene, &flow);
}

/// The backend or the client sends a segment, which is translated.
#[track_caller]
fn sends<F: TestFamily>(
    scene: &mut Scene<F>,
    flow: &TestFlow<F::Address>,
    by_backend: bool,
    flags: u8,
) {
    match by_backend {
        true => scene.reply(flow, flags),
        false => scene.request(flow, flags),
    }
}

fn an_rst_that_nobody_believes_changes_nothing<F: TestFamily>(scene: &mut Scene<F>) {
    // The forger takes either side's name; either side goes on.
    for (by_backend, backend_goes_on) in [(true, false), (true, true), (false, true)] {
        scene.reset();
        let (_, flow) = connected(scene);
        sends(scene, &flow, by_backend, RST);
        scene.wait(45);
        sends(scene, &flow, backend_goes_on, ACK);
        for _ in 0..2 {
            scene.wait(seconds::TCP_ESTABLISHED - 10);
            scene.request(&flow, ACK);
            scene.reply(&flow, ACK);
        }
    }
}

fn an_rst_ends_a_flow_however_often_it_is_repeated<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, flow) = connected(scene);
    scene.reply(&flow, RST);
    for _ in 0..3 {
        scene.wait(seconds::TCP_RESET - 1);
        scene.reply(&flow, RST);
    }
    scene.wait(seconds::TCP_RESET + 1);
    is_over(scene, &flow);
}

fn fins_that_nobody_believes_change_nothing<F: TestFamily>(scene: &mut Scene<F>) {
    // Either side sends data long after its FIN.
    for backend_goes_on in [false, true] {
        scene.reset();
        let (_, flow) = connected(scene);
        scene.request(&flow, FIN | ACK);
        scene.reply(&flow, FIN | ACK);
        scene.wait(seconds::TCP_CLOSING - 1);
        for by_backend in [backend_goes_on, !backend_goes_on] {
            sends(scene, &flow, by_backend, PSH | ACK);
            scene.wait(2);
        }
        for _ in 0..2 {
            scene.wait(seconds::TCP_ESTABLISHED - 10);
            scene.request(&flow, ACK);
            scene.reply(&flow, ACK);
        }
    }
}

fn whoever_goes_on_before_the_sweep_was_never_closed<F: TestFamily>(scene: &mut Scene<F>) {
    for (flags, rest) in [(RST, seconds::TCP_RESET), (FIN, seconds::TCP_CLOSING)] {
        scene.reset();
        let (_, flow) = connected(scene);
        scene.request(&flow, flags | ACK);
        scene.reply(&flow, flags | ACK);
        scene.wait(2 * rest - 1);
        scene.request(&flow, PSH | ACK);
        scene.reply(&flow, ACK);
        scene.wait(2);
        scene.reply(&flow, PSH | ACK);
        scene.wait(seconds::TCP_ESTABLISHED - 10);
        scene.request(&flow, ACK);
        scene.reply(&flow, ACK);
    }
}

fn packets_keep_a_flow_alive<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, flow) = connected(scene);
    for _ in 0..3 {
        scene.wait(seconds::TCP_ESTABLISHED - 10);
        scene.request(&flow, ACK);
        scene.reply(&flow, ACK);
    }
}
