//! Session affinity (docs/contract.md, section 6).

use lb_common::packet::{ACK, SYN};

use super::setup::*;
use crate::flow::TestFlow;

cases! {
    BOTH => a_client_keeps_its_backend_and_others_get_other_backends,
    BOTH => affinity_slides_with_every_new_flow,
    BOTH => affinity_ends_after_its_timeout,
    BOTH => a_client_is_bound_once_the_backend_has_answered,
    BOTH => forged_packets_bind_no_client,
    BOTH => two_first_flows_at_once_get_one_backend,
    BOTH => a_backend_that_may_not_be_chosen_any_more_is_left_for_good,
    BOTH => a_backend_that_takes_over_an_id_inherits_no_client,
    BOTH => a_client_keeps_its_backend_whichever_frontend_it_uses,
    BOTH => a_client_of_two_services_has_two_entries,
    BOTH => a_clock_that_lags_by_a_tick_ends_no_affinity,
    BOTH => a_service_without_affinity_remembers_no_client,
}

const SECONDS: u32 = 600;
const CLIENTS: u8 = 40;

fn sticky<F: TestFamily>(scene: &mut Scene<F>, backends: u8) -> (u32, Vec<u32>) {
    let (index, ids) = service(scene, backends);
    scene.world.services[index as usize].affinity_seconds = SECONDS;
    scene.update();
    (index, ids)
}

fn client<F: TestFamily>(number: u8, port: u16) -> Endpoint<F::Address> {
    at(F::pod(number), port)
}

/// One answered flow of each of many clients, all from the same port.
fn crowd<F: TestFamily>(scene: &mut Scene<F>, port: u16) -> Vec<TestFlow<F::Address>> {
    (1..=CLIENTS)
        .map(|number| scene.connect(TestSite::FromPod, client::<F>(number, port), web::<F>()))
        .collect()
}

fn moved<A: Address>(before: &[TestFlow<A>], after: &[TestFlow<A>]) -> usize {
    before.iter().zip(after).filter(|(one, two)| one.backend() != two.backend()).count()
}

fn a_client_keeps_its_backend_and_others_get_other_backends<F: TestFamily>(scene: &mut Scene<F>) {
    sticky(scene, 3);
    let first = crowd(scene, 1000);
    for port in 1001..1010 {
        let next = crowd(scene, port);
        assert_eq!(moved(&first, &next), 0);
    }
    let used: std::collections::BTreeSet<_> =
        first.iter().map(|flow| flow.sent.destination).collect();
    assert_eq!(used.len(), 3);
}

fn affinity_slides_with_every_new_flow<F: TestFamily>(scene: &mut Scene<F>) {
    sticky(scene, 3);
    let first = crowd(scene, 1000);
    for port in 1001..1005 {
        scene.wait(SECONDS - 2);
        let next = crowd(scene, port);
        assert_eq!(moved(&first, &next), 0);
    }
}

fn affinity_ends_after_its_timeout<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, ids) = sticky(scene, 3);
    let first = crowd(scene, 1000);
    let sets = scene.world.backends[ids[0] as usize].sets;
    scene.world.drain(ids[0]);
    scene.update();
    let bound = crowd(scene, 1001);
    assert!(moved(&first, &bound) > 0);
    scene.world.backends[ids[0] as usize].sets = sets;
    scene.world.add_backend(0, at(F::remote_pod(200), 1), Location::OtherNode);
    scene.update();
    scene.wait(SECONDS - 1);
    assert_eq!(moved(&bound, &crowd(scene, 1002)), 0);
    scene.wait(SECONDS + 1);
    let later = crowd(scene, 1003);
    assert!(moved(&bound, &later) > 0);
    // A client that comes back later is a new one, which may get any backend.
    scene.wait(SECONDS + 1);
    assert!(moved(&later, &crowd(scene, 1004)) > 0);
}

fn a_client_is_bound_once_the_backend_has_answered<F: TestFamily>(scene: &mut Scene<F>) {
    sticky(scene, 3);
    let flow = scene.open(TestSite::FromPod, client::<F>(1, 1000), web::<F>());
    scene.request(&flow, SYN);
    assert_eq!(scene.interpreter.affinities().len(), 0);
    scene.reply(&flow, SYN | ACK);
    if scene.is_tcp() {
        // A backend answers a forged SYN too.
        assert_eq!(scene.interpreter.affinities().len(), 0);
        scene.request(&flow, ACK);
    }
    assert_eq!(scene.interpreter.affinities().len(), 1);
}

fn forged_packets_bind_no_client<F: TestFamily>(scene: &mut Scene<F>) {
    sticky(scene, 3);
    let first = crowd(scene, 1000);
    for port in 2000..2100 {
        scene.open(TestSite::FromPod, client::<F>(200, port), web::<F>());
    }
    assert_eq!(scene.interpreter.affinities().len(), usize::from(CLIENTS));
    assert_eq!(moved(&first, &crowd(scene, 1001)), 0);
}

fn two_first_flows_at_once_get_one_backend<F: TestFamily>(scene: &mut Scene<F>) {
    sticky(scene, 3);
    for number in 1..=CLIENTS {
        let open = |scene: &mut Scene<F>, port| {
            scene.open(TestSite::FromPod, client::<F>(number, port), web::<F>())
        };
        let (one, two) = (open(scene, 1000), open(scene, 1001));
        assert_eq!(one.backend(), two.backend());
    }
}

fn a_backend_that_may_not_be_chosen_any_more_is_left_for_good<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, ids) = sticky(scene, 3);
    let gone = scene.world.endpoint(ids[0]);
    let first = crowd(scene, 1000);
    let was_there = first.iter().filter(|flow| flow.backend() == gone).count();
    assert!(was_there > 0);
    scene.world.drain(ids[0]);
    scene.update();
    let second = crowd(scene, 1001);
    assert!(second.iter().all(|flow| flow.backend() != gone));
    assert_eq!(moved(&first, &second), was_there);
    scene.world.backends[ids[0] as usize].sets = scene.world.backends[ids[1] as usize].sets;
    scene.world.add_backend(0, at(F::remote_pod(200), 1), Location::OtherNode);
    scene.update();
    let third = crowd(scene, 1002);
    assert_eq!(moved(&second, &third), 0);
}

fn a_backend_that_takes_over_an_id_inherits_no_client<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, ids) = sticky(scene, 1);
    let first = crowd(scene, 1000);
    scene.world.remove_backend(ids[0]);
    let backend = &mut scene.world.backends[ids[0] as usize];
    backend.address = F::remote_pod(77);
    backend.sets = lb_common::abi::backend::IN_CLUSTER_SET;
    let index = backend.service;
    scene.world.add_backend(index, at(F::remote_pod(78), 8080), Location::OtherNode);
    scene.update();
    let next = crowd(scene, 1001);
    assert_eq!(moved(&first, &next), usize::from(CLIENTS));
    let heirs = next.iter().filter(|flow| flow.sent.destination == F::remote_pod(77)).count();
    assert!(heirs < usize::from(CLIENTS), "every client followed the id");
}

fn a_client_keeps_its_backend_whichever_frontend_it_uses<F: TestFamily>(scene: &mut Scene<F>) {
    let (index, _) = sticky(scene, 3);
    let other = at(F::vip(2), 8000);
    scene.world.add_frontend(index, other, scene.protocol);
    scene.update();
    let first = crowd(scene, 1000);
    for flow in first {
        let next = scene.open(TestSite::FromPod, from_port(flow.client, 1001), other);
        assert_eq!(next.backend(), flow.backend());
    }
}

fn a_client_of_two_services_has_two_entries<F: TestFamily>(scene: &mut Scene<F>) {
    sticky(scene, 1);
    let other = at(F::vip(2), 80);
    let index = scene.world.add_service(other, scene.protocol);
    scene.world.services[index as usize].affinity_seconds = SECONDS;
    scene.world.add_backend(index, at(F::remote_pod(50), 8080), Location::OtherNode);
    scene.update();
    for port in [1000, 1001] {
        let one = scene.connect(TestSite::FromPod, client::<F>(1, port), web::<F>());
        let two = scene.connect(TestSite::FromPod, client::<F>(1, port), other);
        assert_eq!(one.sent.destination, F::remote_pod(1));
        assert_eq!(two.sent.destination, F::remote_pod(50));
    }
    assert_eq!(scene.interpreter.affinities().len(), 2);
}

fn a_clock_that_lags_by_a_tick_ends_no_affinity<F: TestFamily>(scene: &mut Scene<F>) {
    sticky(scene, 3);
    let first = crowd(scene, 1000);
    // Another CPU has written a later tick than this one reads.
    scene.interpreter.advance(u32::MAX);
    let next = crowd(scene, 1001);
    assert_eq!(moved(&first, &next), 0);
}

fn a_service_without_affinity_remembers_no_client<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 3);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.request(&flow, ACK);
    assert_eq!(scene.interpreter.affinities().len(), 0);
}
