//! UDP flows over time (docs/contract.md, section 7).

use lb_common::abi::{counter::Reason, service::Service};

use super::outside::{NODE_PORT, balancer, client, exposed, node_port};
use super::setup::*;
use crate::{interpreter::Fate, world::seconds};

cases! {
    UDP_ONLY => a_flow_keeps_its_backend_and_draining_does_not_move_it,
    UDP_ONLY => a_flow_leaves_a_backend_that_does_not_serve,
    UDP_ONLY => a_datagram_is_refused_when_no_backend_serves,
    UDP_ONLY => a_datagram_is_dropped_when_the_local_backend_is_gone,
    UDP_ONLY => a_datagram_to_a_deleted_service_is_nobody_s,
    UDP_ONLY => a_late_answer_of_a_gone_backend_is_translated,
    UDP_ONLY => a_client_that_comes_back_keeps_its_source_port,
    UDP_ONLY => a_client_whose_backends_go_one_after_the_other_finds_the_next,
    UDP_ONLY => a_question_and_its_answer_expire_sooner_than_a_stream,
    UDP_ONLY => an_answer_to_the_node_s_own_datagram_is_no_request,
    UDP_ONLY => an_answer_of_a_service_is_no_datagram_of_the_node_s_own,
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

fn a_flow_leaves_a_backend_that_does_not_serve<F: TestFamily>(scene: &mut Scene<F>) {
    let leave: [fn(&mut Scene<F>, u32); 2] =
        [|scene, id| scene.world.remove_backend(id), |scene, id| scene.world.stop_serving(id)];
    for (leave, (site, client)) in
        leave.into_iter().flat_map(|leave| clients::<F>().map(|client| (leave, client)))
    {
        scene.reset();
        let (index, ids) = service(scene, 1);
        let flow = scene.connect(site, client, web::<F>());
        scene.world.add_backend(index, at(F::remote_pod(9), 8080), Location::OtherNode);
        scene.update();
        scene.request(&flow, 0);
        leave(scene, ids[0]);
        scene.update();
        let next = scene.connect(site, client, web::<F>());
        assert_eq!(next.sent.destination, F::remote_pod(9));
        scene.request(&next, 0);
    }
}

fn a_client_whose_backends_go_one_after_the_other_finds_the_next<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    // Of many ports, because it depends on the places of flows whether one hides another.
    let clients: Vec<_> = (0..16).map(|number| from_port(pod::<F>(), 2_000 + number)).collect();
    let (index, ids) = service(scene, 1);
    let mut last = ids[0];
    for number in 0..6 {
        for client in &clients {
            let flow = scene.connect(TestSite::FromPod, *client, web::<F>());
            scene.request(&flow, 0);
        }
        let next = at(F::remote_pod(20 + number), 8080);
        scene.world.stop_serving(last);
        last = scene.world.add_backend(index, next, Location::OtherNode);
        scene.update();
    }
}

fn a_client_that_comes_back_keeps_its_source_port<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, ids) = service(scene, 1);
    let first = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.wait(seconds::UDP + 1);
    let expired = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    assert_eq!(expired.sent, first.sent);
    let serving = scene.world.backends[ids[0] as usize];
    scene.world.stop_serving(ids[0]);
    scene.update();
    let ends = [first.client, first.frontend];
    let refusal = scene.refusal();
    scene.expect(first.site, ends, 0, Reason::NoEndpoint, refusal);
    scene.world.serve_again(ids[0], serving);
    scene.update();
    let moved = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    assert_eq!(moved.sent, first.sent);
    assert_eq!(scene.interpreter.flows().len(), 1);
}

fn a_datagram_is_refused_when_no_backend_serves<F: TestFamily>(scene: &mut Scene<F>) {
    let (_, ids) = service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.world.stop_serving(ids[0]);
    scene.update();
    let refusal = scene.refusal();
    for _ in 0..3 {
        let ends = [flow.client, flow.frontend];
        scene.expect(flow.site, ends, 0, Reason::NoEndpoint, refusal);
        // What the backend still sends gets back.
        scene.reply(&flow, 0);
    }
}

fn a_datagram_is_dropped_when_the_local_backend_is_gone<F: TestFamily>(scene: &mut Scene<F>) {
    for (site, client, policy) in [
        (TestSite::FromPod, pod::<F>(), Service::INTERNAL_LOCAL),
        (TestSite::FromDevice, at(F::outside(), 45_000), Service::EXTERNAL_LOCAL),
    ] {
        scene.reset();
        let to = if policy == Service::INTERNAL_LOCAL { web::<F>() } else { balancer::<F>() };
        let index = exposed(scene, &[Location::LocalPod, Location::OtherNode]);
        scene.world.services[index as usize].flags = policy;
        scene.update();
        let flow = scene.connect(site, client, to);
        assert_eq!(flow.sent.destination, F::pod(3));
        // The first backend that was added.
        scene.world.remove_backend(1);
        scene.update();
        scene.expect(site, [client, to], 0, Reason::NoLocalEndpoint, Fate::Dropped);
    }
}

fn a_datagram_to_a_deleted_service_is_nobody_s<F: TestFamily>(scene: &mut Scene<F>) {
    let (index, ids) = service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.world.remove_backend(ids[0]);
    scene.world.remove_frontends(index);
    scene.update();
    let ends = [flow.client, flow.frontend];
    scene.expect(flow.site, ends, 0, Reason::UnknownAddress, Fate::Untouched);
    scene.reply(&flow, 0);
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

fn a_question_and_its_answer_expire_sooner_than_a_stream<F: TestFamily>(scene: &mut Scene<F>) {
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
    // A retry within two seconds does not make a stream, whoever sends it.
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.wait(1);
    scene.request(&flow, 0);
    scene.reply(&flow, 0);
    scene.wait(seconds::UDP + 1);
    let outcome = scene.answer(&flow, TestSite::ToPod, 0);
    assert_eq!((outcome.reason, outcome.fate), over);

    scene.reset();
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    for wait in [2, 2, seconds::UDP_STREAM - 1] {
        scene.wait(wait);
        scene.request(&flow, 0);
        scene.reply(&flow, 0);
    }
    scene.wait(seconds::UDP_STREAM + 1);
    let outcome = scene.answer(&flow, TestSite::ToPod, 0);
    assert_eq!((outcome.reason, outcome.fate), over);
}

fn an_answer_of_a_service_is_no_datagram_of_the_node_s_own<F: TestFamily>(scene: &mut Scene<F>) {
    for location in [Location::OtherNode, Location::LocalPod, Location::ThisHost] {
        scene.reset();
        exposed(scene, &[location]);
        let flow = scene.connect(TestSite::FromDevice, client::<F>(), node_port::<F>());
        // The device that it leaves by has a program too.
        for site in [TestSite::ToDevice, TestSite::ToDeviceForwarded, TestSite::ToDeviceReturned] {
            let ends = [node_port::<F>(), client::<F>()];
            scene.expect(site, ends, 0, Reason::NoFlow, Fate::Untouched);
        }
        assert_eq!(scene.flow_counts(), [1, 0], "{location:?}: {flow:?}");
    }
}

fn an_answer_to_the_node_s_own_datagram_is_no_request<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::LocalPod]);
    let server = at(F::outside(), 8081);
    let answer = [server, node_port::<F>()];
    let untouched = (Reason::NoFlow, Fate::Untouched);
    // A process that bound the port, and a pod that the CNI masquerades.
    for site in [TestSite::ToDevice, TestSite::ToDeviceForwarded] {
        scene.expect(site, [node_port::<F>(), server], 0, untouched.0, untouched.1);
        for _ in 0..2 {
            scene.expect(TestSite::FromDevice, answer, 0, untouched.0, untouched.1);
        }
        scene.forget();
    }
    // Of a pod of this node.
    let pod = at(F::pod(4), 8081);
    scene.expect(TestSite::ToPod, [node_port::<F>(), pod], 0, untouched.0, untouched.1);
    scene.expect(TestSite::FromPod, [pod, node_port::<F>()], 0, untouched.0, untouched.1);
    // A datagram from a port that is no frontend's leaves nothing behind.
    let other = at(F::node(), NODE_PORT + 1);
    scene.forget();
    scene.expect(TestSite::ToDevice, [other, server], 0, untouched.0, untouched.1);
    assert_eq!(scene.flow_counts(), [0, 0]);
    // Others are clients, and after a while so is who answered.
    scene.expect(TestSite::ToDevice, [node_port::<F>(), server], 0, untouched.0, untouched.1);
    scene.connect(TestSite::FromDevice, from_port(server, 8082), node_port::<F>());
    scene.wait(seconds::UDP_STREAM + 2);
    let flow = scene.connect(TestSite::FromDevice, server, node_port::<F>());
    // A client that is known stays one.
    scene.expect(TestSite::ToDevice, [node_port::<F>(), server], 0, untouched.0, untouched.1);
    scene.request(&flow, 0);
}
