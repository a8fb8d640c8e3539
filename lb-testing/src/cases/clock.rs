//! Cases in which the clock itself matters, not the age of an entry: only for interpreters whose
//! clock can be set.

use lb_common::packet::{ACK, FIN};

use super::setup::*;
use crate::world::{TICKS, seconds};

cases! {
    TCP_ONLY => one_side_keeps_both_directions_alive,
    UDP_ONLY => a_client_that_only_sends_still_gets_the_answer,
    UDP_ONLY => a_backend_that_only_sends_keeps_the_flow,
}

fn one_side_keeps_both_directions_alive<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 2);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    scene.request(&flow, FIN | ACK);
    scene.reply(&flow, FIN | ACK);
    // The backend answers none of these; each comes before the request entry expires.
    for _ in 0..seconds::TCP_CLOSING {
        scene.interpreter.advance(2 * TICKS);
        scene.request(&flow, ACK);
    }
    scene.reply(&flow, ACK);
    assert_eq!(scene.interpreter.flows().len(), 1);
}

fn a_client_that_only_sends_still_gets_the_answer<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 2);
    let flow = scene.open(TestSite::FromPod, pod::<F>(), web::<F>());
    for _ in 0..3 * seconds::UDP {
        scene.wait(1);
        scene.request(&flow, 0);
    }
    scene.reply(&flow, 0);
}

fn a_backend_that_only_sends_keeps_the_flow<F: TestFamily>(scene: &mut Scene<F>) {
    service(scene, 2);
    let flow = scene.connect(TestSite::FromPod, pod::<F>(), web::<F>());
    for _ in 0..2 * seconds::UDP_STREAM / 3 {
        scene.wait(3);
        scene.reply(&flow, 0);
    }
    scene.request(&flow, 0);
}
