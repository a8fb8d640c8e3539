//! `--masquerade-all`: backends of a ClusterIP see this node, whichever client asks
//! (docs/contract.md, section 10).

use lb_common::{
    abi::settings::Settings,
    packet::{ACK, SYN},
};

use super::{
    outside::{client, exposed, here, is_seen_as_node, node_port},
    setup::*,
};
use crate::{
    flow::tuple,
    interpreter::{Fate, Outcome},
};

cases! {
    BOTH => a_pod_is_seen_as_this_node_with_masquerade_all,
    BOTH => the_answer_of_a_pod_here_to_a_masqueraded_pod_is_forwarded,
    BOTH => a_pod_that_reaches_itself_is_seen_as_this_node_with_masquerade_all,
    BOTH => a_pod_of_another_node_is_seen_as_this_node_with_masquerade_all,
    BOTH => a_node_port_shows_its_client_with_masquerade_all,
}

fn masqueraded<F: TestFamily>(scene: &mut Scene<F>, locations: &[Location]) {
    scene.reset();
    scene.world.settings.flags |= Settings::MASQUERADE_ALL;
    exposed(scene, locations);
}

fn a_pod_is_seen_as_this_node_with_masquerade_all<F: TestFamily>(scene: &mut Scene<F>) {
    for location in [Location::OtherNode, Location::ThisHost] {
        masqueraded(scene, &[location]);
        let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
        is_seen_as_node::<F>(&flow);
        let by_loopback = matches!(flow.fate, Fate::IntoLoopback(_));
        assert_eq!(by_loopback, location == Location::ThisHost, "{flow:?}");
        scene.request(&flow, ACK);
        scene.expect_lookups(1);
        scene.reply(&flow, ACK);
        scene.expect_lookups(1);
    }
}

fn the_answer_of_a_pod_here_to_a_masqueraded_pod_is_forwarded<F: TestFamily>(scene: &mut Scene<F>) {
    masqueraded(scene, &[Location::LocalPod]);
    let flow = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    is_seen_as_node::<F>(&flow);
    assert_eq!(flow.backend(), here::<F>());
    let fate = Fate::Forwarded(tuple(web::<F>(), pod::<F>()));
    for flags in [SYN | ACK, ACK] {
        let outcome = scene.answer(&flow, TestSite::FromPod, flags);
        assert_eq!(outcome, Outcome { reason: lb_common::abi::counter::Reason::Reply, fate });
        scene.request(&flow, ACK);
    }
}

fn a_pod_that_reaches_itself_is_seen_as_this_node_with_masquerade_all<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    masqueraded(scene, &[Location::LocalPod]);
    let itself = at(here::<F>().address, 40_000);
    let flow = scene.connect(TestSite::FromPod, itself, web::<F>());
    assert_eq!(flow.fate, Fate::Hairpinned(tuple(at(F::node(), 40_000), here::<F>())));
}

fn a_pod_of_another_node_is_seen_as_this_node_with_masquerade_all<F: TestFamily>(
    scene: &mut Scene<F>,
) {
    let client = at(F::remote_pod(8), 41_000);
    for location in [Location::LocalPod, Location::OtherNode] {
        masqueraded(scene, &[location]);
        let flow = scene.connect(TestSite::FromDevice, client, web::<F>());
        is_seen_as_node::<F>(&flow);
        assert!(matches!(flow.fate, Fate::Forwarded(_)), "{flow:?}");
    }
}

fn a_node_port_shows_its_client_with_masquerade_all<F: TestFamily>(scene: &mut Scene<F>) {
    masqueraded(scene, &[Location::LocalPod]);
    for (site, client) in [(TestSite::FromPod, pod::<F>()), (TestSite::FromDevice, client::<F>())] {
        let flow = scene.connect(site, client, node_port::<F>());
        assert_eq!(flow.fate, Fate::Translated(tuple(client, here::<F>())));
    }
}
