//! UDP flows over time (docs/contract.md, section 7).

use lb_common::abi::counter::Reason;

use super::setup::*;
use crate::{interpreter::Fate, world::seconds};

cases! {
    UDP_ONLY => a_flow_keeps_its_backend_and_draining_does_not_move_it,
    UDP_ONLY => a_flow_leaves_a_gone_backend_as_soon_as_there_is_another,
    UDP_ONLY => a_flow_stays_with_a_gone_backend_while_there_is_no_other,
    UDP_ONLY => a_flow_of_a_deleted_service_stays,
    UDP_ONLY => a_late_answer_of_a_gone_backend_is_translated,
    UDP_ONLY => an_unanswered_flow_expires_sooner_than_an_answered_one,
}

fn a_flow_keeps_its_backend_and_draining_does_not_move_it<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, ids) = service(scene, 3);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    for _ in 0..10 {
        scene.wait(1);
        scene.request(&flow, 0);
    }
    ids.iter().for_each(|id| scene.world.drain(*id));
    scene.update();
    scene.request(&flow, 0);
    scene.reply(&flow, 0);
}

fn a_flow_leaves_a_gone_backend_as_soon_as_there_is_another<F: TestFamily>(scene: &mut Scene<F>) {
    for (site, client) in clients::<F>() {
        scene.reset();
        let (index, ids) = service(scene, 1);
        let flow = scene.connect(site, client, web::<F>());
        scene.world.remove_backend(ids[0]);
        scene.update();
        scene.request(&flow, 0);
        scene.world.add_backend(index, at(F::remote_pod(9), 8080), Location::OtherNode);
        scene.update();
        let next = scene.connect(site, client, web::<F>());
        assert_eq!(next.sent.destination, F::remote_pod(9));
        scene.request(&next, 0);
    }
}

fn a_flow_stays_with_a_gone_backend_while_there_is_no_other<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, ids) = service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.world.remove_backend(ids[0]);
    scene.update();
    for _ in 0..5 {
        scene.wait(60);
        scene.request(&flow, 0);
        scene.reply(&flow, 0);
    }
}

fn a_flow_of_a_deleted_service_stays<F: TestFamily>(scene: &mut Scene<F>) {
    let (index, ids) = service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.world.remove_backend(ids[0]);
    scene.world.remove_frontends(index);
    scene.update();
    scene.request(&flow, 0);
    scene.reply(&flow, 0);
    scene.wait(seconds::UDP_ANSWERED + 1);
    let ends = [flow.client, flow.frontend];
    scene.expect(flow.site, ends, 0, Reason::UnknownAddress, Fate::Untouched);
}

fn a_late_answer_of_a_gone_backend_is_translated<F: TestFamily>(scene: &mut Scene<F>) {
    let (index, ids) = service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.world.remove_backend(ids[0]);
    scene.world.add_backend(index, at(F::remote_pod(9), 8080), Location::OtherNode);
    scene.update();
    let next = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.reply(&flow, 0);
    scene.reply(&next, 0);
    scene.request(&next, 0);
}

fn an_unanswered_flow_expires_sooner_than_an_answered_one<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, ids) = service(scene, 1);
    let flow = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.world.drain(ids[0]);
    scene.update();
    scene.wait(seconds::UDP - 1);
    scene.request(&flow, 0);
    scene.wait(seconds::UDP + 1);
    let over = (Reason::NoFlow, Fate::Untouched);
    let outcome = scene.answer(&flow, TestSite::ToPod, 0);
    assert_eq!((outcome.reason, outcome.fate), over);
    let ends = [flow.client, flow.frontend];
    let refusal = scene.refusal();
    scene.expect(flow.site, ends, 0, Reason::NoEndpoint, refusal);

    scene.reset();
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.wait(seconds::UDP_ANSWERED - 1);
    scene.request(&flow, 0);
    scene.reply(&flow, 0);
    scene.wait(seconds::UDP_ANSWERED + 1);
    let outcome = scene.answer(&flow, TestSite::ToPod, 0);
    assert_eq!((outcome.reason, outcome.fate), over);
}
