//! UDP flows over time (docs/semantics.md, section 7).

use lb_common::abi::counter::Reason;

use super::setup::*;
use crate::{bench::End, world::seconds};

rows! {
    UDP_ONLY => a_flow_keeps_its_backend_and_draining_does_not_move_it,
    UDP_ONLY => a_flow_leaves_a_gone_backend_as_soon_as_there_is_another,
    UDP_ONLY => a_flow_stays_with_a_gone_backend_while_there_is_no_other,
    UDP_ONLY => a_flow_of_a_deleted_service_stays,
    UDP_ONLY => a_late_answer_of_a_gone_backend_is_translated,
    UDP_ONLY => an_unanswered_flow_expires_sooner_than_an_answered_one,
}

fn a_flow_keeps_its_backend_and_draining_does_not_move_it<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, ids) = service(bench, 3);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    for _ in 0..10 {
        bench.wait(1);
        bench.request(&talk, 0);
    }
    ids.iter().for_each(|id| bench.world.drain(*id));
    bench.update();
    bench.request(&talk, 0);
    bench.reply(&talk, 0);
}

fn a_flow_leaves_a_gone_backend_as_soon_as_there_is_another<F: TestFamily>(bench: &mut Bench<F>) {
    for (place, client) in clients::<F>() {
        bench.lab.reset();
        bench.world = Default::default();
        let (index, ids) = service(bench, 1);
        let talk = bench.connect(place, client, web::<F>());
        bench.world.remove_backend(ids[0]);
        bench.update();
        bench.request(&talk, 0);
        bench.world.add_backend(index, at(F::remote_pod(9), 8080), Where::Elsewhere);
        bench.update();
        let next = bench.connect(place, client, web::<F>());
        assert_eq!(next.sent.destination, F::remote_pod(9));
        bench.request(&next, 0);
    }
}

fn a_flow_stays_with_a_gone_backend_while_there_is_no_other<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, ids) = service(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    bench.world.remove_backend(ids[0]);
    bench.update();
    for _ in 0..5 {
        bench.wait(60);
        bench.request(&talk, 0);
        bench.reply(&talk, 0);
    }
}

fn a_flow_of_a_deleted_service_stays<F: TestFamily>(bench: &mut Bench<F>) {
    let (index, ids) = service(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    bench.world.remove_backend(ids[0]);
    bench.world.remove_fronts(index);
    bench.update();
    bench.request(&talk, 0);
    bench.reply(&talk, 0);
    bench.wait(seconds::UDP_ANSWERED + 1);
    let ends = [talk.client, talk.front];
    bench.expect(talk.place, ends, 0, Reason::UnknownAddress, End::Untouched);
}

fn a_late_answer_of_a_gone_backend_is_translated<F: TestFamily>(bench: &mut Bench<F>) {
    let (index, ids) = service(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    bench.world.remove_backend(ids[0]);
    bench.world.add_backend(index, at(F::remote_pod(9), 8080), Where::Elsewhere);
    bench.update();
    let next = bench.open(Place::FromPod, pod::<F>(), web::<F>());
    bench.reply(&talk, 0);
    bench.reply(&next, 0);
    bench.request(&next, 0);
}

fn an_unanswered_flow_expires_sooner_than_an_answered_one<F: TestFamily>(bench: &mut Bench<F>) {
    let (_, ids) = service(bench, 1);
    let talk = bench.open(Place::FromPod, pod::<F>(), web::<F>());
    bench.world.drain(ids[0]);
    bench.update();
    bench.wait(seconds::UDP - 1);
    bench.request(&talk, 0);
    bench.wait(seconds::UDP + 1);
    let over = (Reason::NoFlow, End::Untouched);
    let outcome = bench.answer(&talk, Place::ToPod, 0);
    assert_eq!((outcome.reason, outcome.end), over);
    let ends = [talk.client, talk.front];
    let refusal = bench.refusal();
    bench.expect(talk.place, ends, 0, Reason::NoEndpoint, refusal);

    bench.lab.reset();
    bench.world = Default::default();
    service(bench, 1);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    bench.wait(seconds::UDP_ANSWERED - 1);
    bench.request(&talk, 0);
    bench.reply(&talk, 0);
    bench.wait(seconds::UDP_ANSWERED + 1);
    let outcome = bench.answer(&talk, Place::ToPod, 0);
    assert_eq!((outcome.reason, outcome.end), over);
}
