//! Session affinity (docs/semantics.md, section 6).

use lb_common::packet::ACK;

use super::setup::*;
use crate::bench::Talk;

rows! {
    BOTH => a_client_keeps_to_its_backend_and_others_go_elsewhere,
    BOTH => affinity_slides_with_every_new_flow,
    BOTH => affinity_ends_after_its_timeout,
    BOTH => a_backend_that_may_not_be_chosen_any_more_is_left_for_good,
    BOTH => a_backend_that_takes_over_an_id_inherits_no_client,
    BOTH => a_client_keeps_to_its_backend_whichever_front_end_it_uses,
    BOTH => the_same_client_of_two_services_is_bound_twice,
    BOTH => a_clock_that_lags_by_a_tick_ends_no_affinity,
    BOTH => no_affinity_remembers_nobody,
}

const SECONDS: u32 = 600;
const CLIENTS: u8 = 40;

fn sticky<F: TestFamily>(bench: &mut Bench<F>, backends: u8) -> (u32, Vec<u32>) {
    let (index, ids) = service(bench, backends);
    bench.world.services[index as usize].affinity_seconds = SECONDS;
    bench.update();
    (index, ids)
}

fn client<F: TestFamily>(number: u8, port: u16) -> Endpoint<F::Address> {
    at(F::pod(number), port)
}

/// One flow of each of many clients, all from the same port.
fn crowd<F: TestFamily>(bench: &mut Bench<F>, port: u16) -> Vec<Talk<F::Address>> {
    (1..=CLIENTS)
        .map(|number| bench.open(Place::FromPod, client::<F>(number, port), web::<F>()))
        .collect()
}

fn moved<A: Address>(before: &[Talk<A>], after: &[Talk<A>]) -> usize {
    before.iter().zip(after).filter(|(one, two)| one.backend() != two.backend()).count()
}

fn a_client_keeps_to_its_backend_and_others_go_elsewhere<F: TestFamily>(bench: &mut Bench<F>) {
    sticky(bench, 3);
    let first = crowd(bench, 1000);
    for port in 1001..1010 {
        let next = crowd(bench, port);
        assert_eq!(moved(&first, &next), 0);
    }
    let used: std::collections::BTreeSet<_> =
        first.iter().map(|talk| talk.sent.destination).collect();
    assert_eq!(used.len(), 3);
}

fn affinity_slides_with_every_new_flow<F: TestFamily>(bench: &mut Bench<F>) {
    sticky(bench, 3);
    let first = crowd(bench, 1000);
    for port in 1001..1005 {
        bench.wait(SECONDS - 2);
        let next = crowd(bench, port);
        assert_eq!(moved(&first, &next), 0);
    }
}

fn affinity_ends_after_its_timeout<F: TestFamily>(bench: &mut Bench<F>) {
    sticky(bench, 3);
    let first = crowd(bench, 1000);
    bench.wait(SECONDS + 1);
    let next = crowd(bench, 1001);
    // All stay with a chance of 3 to the power of -40.
    assert!(moved(&first, &next) > 0);
    let again = crowd(bench, 1002);
    assert_eq!(moved(&next, &again), 0);
}

fn a_backend_that_may_not_be_chosen_any_more_is_left_for_good<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, ids) = sticky(bench, 3);
    let gone = bench.world.endpoint(ids[0]);
    let first = crowd(bench, 1000);
    let was_there = first.iter().filter(|talk| talk.backend() == gone).count();
    assert!(was_there > 0);
    bench.world.drain(ids[0]);
    bench.update();
    let second = crowd(bench, 1001);
    assert!(second.iter().all(|talk| talk.backend() != gone));
    assert_eq!(moved(&first, &second), was_there);
    bench.world.backends[ids[0] as usize].sets = bench.world.backends[ids[1] as usize].sets;
    bench.world.add_backend(0, at(F::remote_pod(200), 1), Where::Elsewhere);
    bench.update();
    let third = crowd(bench, 1002);
    assert_eq!(moved(&second, &third), 0);
}

fn a_backend_that_takes_over_an_id_inherits_no_client<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, ids) = sticky(bench, 1);
    let first = crowd(bench, 1000);
    bench.world.remove_backend(ids[0]);
    let backend = &mut bench.world.backends[ids[0] as usize];
    backend.address = F::remote_pod(77);
    backend.sets = lb_common::abi::backend::IN_CLUSTER_SET;
    let index = backend.service;
    bench.world.add_backend(index, at(F::remote_pod(78), 8080), Where::Elsewhere);
    bench.update();
    let next = crowd(bench, 1001);
    assert_eq!(moved(&first, &next), usize::from(CLIENTS));
    let heirs = next.iter().filter(|talk| talk.sent.destination == F::remote_pod(77)).count();
    assert!(heirs < usize::from(CLIENTS), "every client followed the id");
}

fn a_client_keeps_to_its_backend_whichever_front_end_it_uses<F: TestFamily>(bench: &mut Bench<F>) {
    let (index, _) = sticky(bench, 3);
    let other = at(F::vip(2), 8000);
    bench.world.add_front(index, other, bench.protocol);
    bench.update();
    let first = crowd(bench, 1000);
    for talk in first {
        let next = bench.open(Place::FromPod, from_port(talk.client, 1001), other);
        assert_eq!(next.backend(), talk.backend());
    }
}

fn the_same_client_of_two_services_is_bound_twice<F: TestFamily>(bench: &mut Bench<F>) {
    sticky(bench, 1);
    let other = at(F::vip(2), 80);
    let index = bench.world.add_service(other, bench.protocol);
    bench.world.services[index as usize].affinity_seconds = SECONDS;
    bench.world.add_backend(index, at(F::remote_pod(50), 8080), Where::Elsewhere);
    bench.update();
    for port in [1000, 1001] {
        let one = bench.open(Place::FromPod, client::<F>(1, port), web::<F>());
        let two = bench.open(Place::FromPod, client::<F>(1, port), other);
        assert_eq!(one.sent.destination, F::remote_pod(1));
        assert_eq!(two.sent.destination, F::remote_pod(50));
    }
    assert_eq!(bench.lab.affinities().len(), 2);
}

fn a_clock_that_lags_by_a_tick_ends_no_affinity<F: TestFamily>(bench: &mut Bench<F>) {
    sticky(bench, 3);
    let first = crowd(bench, 1000);
    // Another CPU noted the tick before this one did.
    bench.lab.pass(u32::MAX);
    let next = crowd(bench, 1001);
    assert_eq!(moved(&first, &next), 0);
}

fn no_affinity_remembers_nobody<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 3);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    bench.request(&talk, ACK);
    assert_eq!(bench.lab.affinities().len(), 0);
}
