//! `--masquerade-all`: whoever asks a ClusterIP is seen as this node (docs/semantics.md, section 10).

use lb_common::{
    abi::settings::Settings,
    packet::{ACK, SYN},
};

use super::{
    outside::{client, exposed, here, is_seen_as_node, node_port},
    setup::*,
};
use crate::bench::{End, Outcome, tuple};

rows! {
    BOTH => a_pod_is_seen_as_this_node_where_all_are,
    BOTH => the_answer_of_a_pod_here_to_a_masqueraded_pod_is_forwarded,
    BOTH => a_pod_that_reaches_itself_is_seen_as_this_node_where_all_are,
    BOTH => a_pod_of_another_node_is_seen_as_this_node_where_all_are,
    BOTH => what_is_no_cluster_ip_keeps_its_client_where_all_others_are_masqueraded,
}

fn masqueraded<F: TestFamily>(bench: &mut Bench<F>, places: &[Where]) {
    bench.lab.reset();
    bench.world = Default::default();
    bench.world.settings.flags |= Settings::MASQUERADE_ALL;
    exposed(bench, places);
}

fn a_pod_is_seen_as_this_node_where_all_are<F: TestFamily>(bench: &mut Bench<F>) {
    for place in [Where::Elsewhere, Where::Host] {
        masqueraded(bench, &[place]);
        let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
        is_seen_as_node::<F>(&talk);
        let by_loopback = matches!(talk.end, End::IntoLoopback(_));
        assert_eq!(by_loopback, place == Where::Host, "{talk:?}");
        bench.request(&talk, ACK);
        bench.expect_lookups(1);
        bench.reply(&talk, ACK);
        bench.expect_lookups(1);
    }
}

fn the_answer_of_a_pod_here_to_a_masqueraded_pod_is_forwarded<F: TestFamily>(bench: &mut Bench<F>) {
    masqueraded(bench, &[Where::Here]);
    let talk = bench.open(Place::FromPod, pod::<F>(), web::<F>());
    is_seen_as_node::<F>(&talk);
    assert_eq!(talk.backend(), here::<F>());
    let end = End::Forwarded(tuple(web::<F>(), pod::<F>()));
    for flags in [SYN | ACK, ACK] {
        let outcome = bench.answer(&talk, Place::FromPod, flags);
        assert_eq!(outcome, Outcome { reason: lb_common::abi::counter::Reason::Reply, end });
        bench.request(&talk, ACK);
    }
}

fn a_pod_that_reaches_itself_is_seen_as_this_node_where_all_are<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    masqueraded(bench, &[Where::Here]);
    let itself = at(here::<F>().address, 40_000);
    let talk = bench.connect(Place::FromPod, itself, web::<F>());
    assert_eq!(talk.end, End::Bounced(tuple(at(F::node(), 40_000), here::<F>())));
}

fn a_pod_of_another_node_is_seen_as_this_node_where_all_are<F: TestFamily>(bench: &mut Bench<F>) {
    let client = at(F::remote_pod(8), 41_000);
    for place in [Where::Here, Where::Elsewhere] {
        masqueraded(bench, &[place]);
        let talk = bench.connect(Place::FromDevice, client, web::<F>());
        is_seen_as_node::<F>(&talk);
        assert!(matches!(talk.end, End::Forwarded(_)), "{talk:?}");
    }
}

fn what_is_no_cluster_ip_keeps_its_client_where_all_others_are_masqueraded<F: TestFamily>(
    bench: &mut Bench<F>,
) {
    masqueraded(bench, &[Where::Here]);
    for (place, client) in [(Place::FromPod, pod::<F>()), (Place::FromDevice, client::<F>())] {
        let talk = bench.connect(place, client, node_port::<F>());
        assert_eq!(talk.end, End::Onward(tuple(client, here::<F>())));
    }
}
