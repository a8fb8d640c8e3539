//! What goes by the clock itself, not by how old an entry is: only for interpreters whose
//! clock can be set.

use lb_common::{
    balance::FlowTable,
    packet::{ACK, FIN},
};

use super::setup::*;
use crate::world::{TICKS, seconds};

rows! {
    TCP_ONLY => one_side_keeps_both_directions_alive,
    UDP_ONLY => a_client_that_only_sends_still_gets_the_answer,
    UDP_ONLY => a_backend_that_only_sends_keeps_the_flow,
}

fn one_side_keeps_both_directions_alive<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 2);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    bench.request(&talk, FIN | ACK);
    bench.reply(&talk, FIN | ACK);
    // Nobody answers what is sent now, each time before the entry of its own is old.
    for _ in 0..seconds::TCP_CLOSING {
        bench.lab.pass(2 * TICKS);
        bench.request(&talk, ACK);
    }
    bench.reply(&talk, ACK);
    assert_eq!(bench.lab.flows(FlowTable::Flows).len(), 2);
}

fn a_client_that_only_sends_still_gets_the_answer<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 2);
    let talk = bench.open(Place::FromPod, pod::<F>(), web::<F>());
    for _ in 0..3 * seconds::UDP {
        bench.wait(1);
        bench.request(&talk, 0);
    }
    bench.reply(&talk, 0);
}

fn a_backend_that_only_sends_keeps_the_flow<F: TestFamily>(bench: &mut Bench<F>) {
    service(bench, 2);
    let talk = bench.connect(Place::FromPod, pod::<F>(), web::<F>());
    for _ in 0..2 * seconds::UDP_ANSWERED / 3 {
        bench.wait(3);
        bench.reply(&talk, 0);
    }
    bench.request(&talk, 0);
}
