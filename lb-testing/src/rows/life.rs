//! TCP connections over time (docs/semantics.md, section 7).

use lb_common::{
    abi::counter::Reason,
    packet::{ACK, FIN, RST, SYN},
};

use super::setup::*;
use crate::{
    bench::{End, Talk},
    world::seconds,
};

rows! {
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
    TCP_ONLY => packets_keep_a_flow_alive,
}

#[track_caller]
fn is_over<F: TestFamily>(bench: &mut Bench<F>, talk: &Talk<F::Address>) {
    let ends = [talk.client, talk.front];
    bench.expect(talk.place, ends, ACK, Reason::UnknownTcpFlow, End::Untouched);
    let outcome = bench.answer(talk, Place::ToPod, ACK);
    assert_eq!((outcome.reason, outcome.end), (Reason::NoFlow, End::Untouched));
}

/// Leaves the Service with one backend, other than that of `talk`.
fn replace_backend<F: TestFamily>(
    bench: &mut Bench<F>,
    ids: &[u32],
    talk: &Talk<F::Address>,
    gone: bool,
) {
    for id in ids {
        if bench.world.endpoint(*id) == talk.backend() {
            if gone { bench.world.remove_backend(*id) } else { bench.world.drain(*id) }
        }
    }
    bench.update();
}

fn connected<F: TestFamily>(bench: &mut Bench<F>) -> (Vec<u32>, Talk<F::Address>) {
    let (_, ids) = service(bench, 2);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    (ids, talk)
}

/// The client opens again from the same port, and gets another backend.
#[track_caller]
fn chooses_again<F: TestFamily>(bench: &mut Bench<F>, ids: &[u32], talk: &Talk<F::Address>) {
    replace_backend(bench, ids, talk, false);
    let next = bench.connect(talk.place, talk.client, talk.front);
    assert_ne!(next.backend(), talk.backend());
    bench.request(&next, ACK);
    bench.reply(&next, ACK);
    assert_eq!(bench.flow_counts(), [2, 0]);
}

fn an_established_flow_keeps_its_backend_through_anything<F: TestFamily>(bench: &mut Bench<F>) {
    let (ids, talk) = connected(bench);
    for gone in [false, true] {
        replace_backend(bench, &ids, &talk, gone);
        bench.request(&talk, ACK);
        bench.reply(&talk, ACK);
    }
    ids.iter().for_each(|id| bench.world.remove_backend(*id));
    bench.world.remove_fronts(1);
    bench.update();
    for _ in 0..10 {
        bench.wait(3_600);
        bench.request(&talk, ACK);
        bench.reply(&talk, ACK);
    }
}

fn a_syn_on_an_established_flow_goes_to_its_backend<F: TestFamily>(bench: &mut Bench<F>) {
    let (ids, talk) = connected(bench);
    replace_backend(bench, &ids, &talk, false);
    bench.request(&talk, SYN);
    bench.reply(&talk, ACK);
    bench.request(&talk, ACK);
    assert_eq!(bench.flow_counts(), [2, 0]);
}

fn a_syn_on_an_established_flow_of_a_gone_backend_chooses_again<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    let (ids, talk) = connected(bench);
    replace_backend(bench, &ids, &talk, true);
    chooses_again(bench, &ids, &talk);
}

fn a_syn_on_a_closing_flow_chooses_again<F: TestFamily>(bench: &mut Bench<F>) {
    for from_client in [true, false] {
        for flags in [FIN | ACK, RST] {
            bench.lab.reset();
            bench.world = Default::default();
            let (ids, talk) = connected(bench);
            if from_client {
                bench.request(&talk, flags)
            } else {
                bench.reply(&talk, flags)
            }
            chooses_again(bench, &ids, &talk);
        }
    }
}

fn a_syn_on_an_expired_flow_chooses_again<F: TestFamily>(bench: &mut Bench<F>) {
    let (ids, talk) = connected(bench);
    bench.wait(seconds::TCP_ESTABLISHED + 1);
    chooses_again(bench, &ids, &talk);
}

fn a_repeated_syn_keeps_its_backend<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, ids) = service(bench, 2);
    let talk = bench.open(Place::FromPod, pod::<F>(), web::<F>());
    replace_backend(bench, &ids, &talk, false);
    for _ in 0..5 {
        bench.wait(1);
        bench.request(&talk, SYN);
    }
    bench.reply(&talk, SYN | ACK);
    bench.request(&talk, SYN);
    bench.reply(&talk, SYN | ACK);
    bench.request(&talk, ACK);
    assert_eq!(bench.flow_counts(), [2, 0]);
}

fn a_repeated_syn_of_a_gone_backend_chooses_again<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, ids) = service(bench, 2);
    let talk = bench.open(Place::FromPod, pod::<F>(), web::<F>());
    replace_backend(bench, &ids, &talk, true);
    chooses_again(bench, &ids, &talk);
}

fn a_handshake_moves_to_the_table_of_flows_with_its_last_packet<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    service(bench, 1);
    let talk = bench.open(Place::FromPod, pod::<F>(), web::<F>());
    assert_eq!(bench.flow_counts(), [0, 2]);
    bench.reply(&talk, SYN | ACK);
    assert_eq!(bench.flow_counts(), [0, 2]);
    bench.request(&talk, ACK);
    assert_eq!(bench.flow_counts(), [2, 0]);
}

fn a_flood_of_syns_leaves_the_table_of_flows_alone<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, talk) = connected(bench);
    for port in 1000..2000 {
        bench.open(Place::FromPod, from_port(pod::<F>(), port), web::<F>());
    }
    assert_eq!(bench.flow_counts()[0], 2);
    bench.request(&talk, ACK);
}

fn a_client_that_resets_a_handshake_establishes_nothing<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, ids) = service(bench, 2);
    let talk = bench.open(Place::FromPod, pod::<F>(), web::<F>());
    bench.reply(&talk, SYN | ACK);
    bench.request(&talk, RST);
    assert_eq!(bench.flow_counts()[0], 0);
    bench.wait(seconds::TCP_CLOSING + 1);
    is_over(bench, &talk);
    chooses_again(bench, &ids, &talk);
}

fn a_client_that_closes_with_the_handshake_is_seen_closing<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, ids) = service(bench, 2);
    let talk = bench.open(Place::FromPod, pod::<F>(), web::<F>());
    bench.reply(&talk, SYN | ACK);
    bench.request(&talk, FIN | ACK);
    bench.reply(&talk, FIN | ACK);
    bench.request(&talk, ACK);
    chooses_again(bench, &ids, &talk);
}

fn a_backend_that_resets_a_handshake_lets_the_next_one_choose_again<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    let (_, ids) = service(bench, 2);
    let talk = bench.open(Place::FromPod, pod::<F>(), web::<F>());
    bench.reply(&talk, RST | ACK);
    chooses_again(bench, &ids, &talk);
}

fn a_repeated_syn_ack_is_translated_after_the_handshake<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, talk) = connected(bench);
    bench.reply(&talk, SYN | ACK);
    bench.request(&talk, ACK);
    bench.reply(&talk, RST);
}

fn a_handshake_expires<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, ids) = service(bench, 2);
    let talk = bench.open(Place::FromPod, pod::<F>(), web::<F>());
    bench.wait(seconds::TCP_SYN - 1);
    bench.reply(&talk, SYN | ACK);
    bench.lab.reset();
    bench.update();
    let talk = bench.open(Place::FromPod, pod::<F>(), web::<F>());
    bench.wait(seconds::TCP_SYN + 1);
    let outcome = bench.answer(&talk, Place::ToPod, SYN | ACK);
    assert_eq!((outcome.reason, outcome.end), (Reason::NoFlow, End::Untouched));
    is_over(bench, &talk);
    chooses_again(bench, &ids, &talk);
}

fn an_established_flow_expires<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, talk) = connected(bench);
    bench.wait(seconds::TCP_ESTABLISHED - 2);
    bench.request(&talk, ACK);
    bench.wait(seconds::TCP_ESTABLISHED + 1);
    is_over(bench, &talk);
}

fn a_half_closed_flow_goes_on<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, talk) = connected(bench);
    bench.request(&talk, FIN | ACK);
    for _ in 0..3 {
        bench.wait(seconds::TCP_HALF_CLOSED - 10);
        bench.reply(&talk, ACK);
        bench.request(&talk, ACK);
    }
    bench.wait(seconds::TCP_HALF_CLOSED + 1);
    is_over(bench, &talk);
}

fn a_closed_flow_expires_soon<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, talk) = connected(bench);
    bench.reply(&talk, FIN | ACK);
    bench.request(&talk, FIN | ACK);
    bench.reply(&talk, ACK);
    bench.wait(seconds::TCP_CLOSING - 1);
    bench.request(&talk, ACK);
    bench.wait(seconds::TCP_CLOSING + 1);
    is_over(bench, &talk);
}

fn a_reset_flow_expires_soon<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, talk) = connected(bench);
    bench.reply(&talk, RST);
    bench.request(&talk, ACK);
    bench.wait(seconds::TCP_CLOSING + 1);
    is_over(bench, &talk);
}

fn packets_keep_a_flow_alive<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, talk) = connected(bench);
    for _ in 0..3 {
        bench.wait(seconds::TCP_ESTABLISHED - 10);
        bench.request(&talk, ACK);
        bench.reply(&talk, ACK);
    }
}
