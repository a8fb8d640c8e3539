//! Clients that talk to a backend itself, from a port from which they have a flow of a Service to it
//! (docs/contract.md, section 7).

use lb_common::{
    abi::{counter::Reason, flow::Tuple},
    packet::{ACK, FIN, RST, SYN},
};

use super::{
    outside::{self, exposed, node_port},
    setup::*,
};
use crate::{
    flow::{TestFlow, tuple},
    frame::Frame,
    interpreter::Fate,
    world::{Location, seconds},
};

cases! {
    BOTH => a_client_that_asks_its_backend_itself_gets_another_port,
    BOTH => only_the_port_and_the_backend_of_a_flow_are_others,
    BOTH => a_conversation_whose_flow_is_over_keeps_its_port,
    BOTH => a_conversation_keeps_its_port_when_the_flow_of_the_service_ends,
    BOTH => a_second_conversation_from_the_port_that_was_drawn_gets_another,
    BOTH => a_pod_takes_no_ports_of_its_node,
    TCP_ONLY => a_conversation_ends_with_its_connection,
    TCP_ONLY => a_port_that_rests_after_another_client_is_not_used,
    UDP_ONLY => fragments_of_a_conversation_have_its_port,
}

/// The offset of a later fragment.
const BEHIND: u16 = 1480;

/// Where the answers of a backend on another node are translated, to a client whose requests are
/// received at `site`.
fn answers_at(site: TestSite) -> TestSite {
    match site {
        TestSite::FromPod => TestSite::ToPod,
        _ => TestSite::FromDevice,
    }
}

/// Begins a conversation with the backend of `flow` and asserts that it gets a port of its own.
#[track_caller]
fn begin<F: TestFamily>(scene: &mut Scene<F>, flow: &TestFlow<F::Address>) -> TestFlow<F::Address> {
    let backend = flow.backend();
    let own = Endpoint { address: flow.sent.source, port: flow.sent.source_port };
    let direct = scene.open(flow.site, own, backend);
    assert_ne!(direct.sent.source_port, flow.sent.source_port);
    let sent = Tuple { source_port: direct.sent.source_port, ..tuple(own, backend) };
    assert_eq!(direct.fate, Fate::Translated(sent));
    direct
}

/// Sends from the backend and asserts that the client gets it from there.
#[track_caller]
fn answer<F: TestFamily>(scene: &mut Scene<F>, direct: &TestFlow<F::Address>, flags: u8) {
    let outcome = scene.answer(direct, answers_at(direct.site), flags);
    let back = tuple(direct.frontend, direct.client);
    assert_eq!((outcome.reason, outcome.fate), (Reason::Reply, Fate::Translated(back)));
}

fn a_client_that_asks_its_backend_itself_gets_another_port<F: TestFamily>(scene: &mut Scene<F>) {
    for (site, client) in clients::<F>() {
        scene.reset();
        service(scene, 1);
        let flow = scene.connect(site, client, web::<F>());
        let direct = begin(scene, &flow);
        answer(scene, &direct, SYN | ACK);
        for _ in 0..3 {
            scene.request(&direct, ACK);
            answer(scene, &direct, ACK);
            scene.request(&flow, ACK);
            scene.reply(&flow, ACK);
            scene.wait(1);
        }
    }
}

fn only_the_port_and_the_backend_of_a_flow_are_others<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let backend = flow.backend();
    let other_port = from_port(pod::<F>(), pod::<F>().port.get() + 1);
    let other_backend = at(backend.address, backend.port.get() + 1);
    for ends in [[other_port, backend], [pod::<F>(), other_backend], [backend, pod::<F>()]] {
        scene.expect(TestSite::FromPod, ends, SYN, Reason::NotService, Fate::Untouched);
    }
    begin(scene, &flow);
    let ends = [other_port, backend];
    scene.expect(TestSite::FromPod, ends, SYN, Reason::NotService, Fate::Untouched);
}

fn a_conversation_whose_flow_is_over_keeps_its_port<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    if scene.is_tcp() {
        scene.request(&flow, FIN | ACK);
        scene.reply(&flow, FIN | ACK);
    } else {
        scene.wait(seconds::UDP_STREAM + 1);
    }
    let ends = [pod::<F>(), flow.backend()];
    scene.expect(TestSite::FromPod, ends, SYN, Reason::NotService, Fate::Untouched);
}

/// The backend may still wait for the end of the connection before, and judge by its timestamps (RFC
/// 7323), which are another host's: it would answer with an ACK.
fn a_port_that_rests_after_another_client_is_not_used<F: TestFamily>(scene: &mut Scene<F>) {
    exposed(scene, &[Location::OtherNode]);
    let flow = scene.connect(TestSite::FromDevice, outside::client::<F>(), node_port::<F>());
    scene.request(&flow, FIN | ACK);
    scene.reply(&flow, FIN | ACK);
    // As kube-proxy beside the agent may draw it.
    let drawn = Endpoint { address: flow.sent.source, port: flow.sent.source_port };
    let direct = scene.open(TestSite::ToDevice, drawn, flow.backend());
    assert_ne!(direct.sent.source_port, drawn.port);
    answer(scene, &direct, SYN | ACK);
}

fn a_conversation_keeps_its_port_when_the_flow_of_the_service_ends<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let direct = begin(scene, &flow);
    answer(scene, &direct, SYN | ACK);
    scene.request(&direct, ACK);
    scene.interpreter.remove_flow(&flow.key(scene.protocol));
    scene.request(&direct, ACK);
    answer(scene, &direct, ACK);
}

fn a_second_conversation_from_the_port_that_was_drawn_gets_another<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let direct = begin(scene, &flow);
    let second = begin(scene, &direct);
    assert_ne!(second.sent.source_port, flow.sent.source_port);
    answer(scene, &direct, SYN | ACK);
    answer(scene, &second, SYN | ACK);
}

fn a_pod_takes_no_ports_of_its_node<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let flow = scene.connect(TestSite::ToDevice, process::<F>(), web::<F>());
    let ends = [process::<F>(), flow.backend()];
    scene.expect(TestSite::FromPod, ends, SYN, Reason::NotService, Fate::Untouched);
}

fn a_conversation_ends_with_its_connection<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let direct = begin(scene, &flow);
    answer(scene, &direct, SYN | ACK);
    scene.request(&direct, ACK);
    scene.request(&direct, FIN | ACK);
    answer(scene, &direct, FIN | ACK);
    // The next one from this port.
    let next = begin(scene, &flow);
    answer(scene, &next, SYN | ACK);
    scene.request(&next, RST);
}

fn fragments_of_a_conversation_have_its_port<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 1);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    let direct = begin(scene, &flow);
    let whole = Frame::<F>::of(scene.protocol, direct.client, direct.frontend, 0);
    let first = whole.clone().fragment(0, true);
    scene.expect_frame(direct.site, &first, Reason::Request, direct.fate);
    let later = scene.send_frame(direct.site, &whole.fragment(BEHIND, false));
    assert_eq!(later.reason, Reason::Request);
}
