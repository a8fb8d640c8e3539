//! The text of a manifest file, and what the agent makes of the objects in it.

use std::collections::BTreeMap;

use lb_agent::watch::{
    admit::admit,
    manifests::parse::{Format, ParseError, parse},
};
use lb_control::{
    controller::Controller,
    dataplane::{Capacity, fake::Fake},
    desired::NodeFacts,
    model::event::{Object, ObjectEvent, ObjectKind},
    options::ExternalMode,
};

/// Small maps, because they are made anew for each input.
const SMALL: Capacity = Capacity {
    services: 256,
    slots: 1 << 11,
    backends4: 512,
    backends6: 512,
    frontends4: 1024,
    frontends6: 1024,
    ranges4: 128,
    ranges6: 128,
    nodes4: 64,
    nodes6: 64,
};

/// The node of the agent. Objects of the corpus name it.
const NODE: &str = "node-1";

const KINDS: [ObjectKind; 4] =
    [ObjectKind::Service, ObjectKind::EndpointSlice, ObjectKind::Node, ObjectKind::ServiceCidr];

/// Parses a file, in both formats, and serves its objects. An error names a line of the text.
pub(crate) fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let lines = 1 + text.split('\n').count() as u64;
    for format in [Format::Yaml, Format::Json] {
        match parse(text, format) {
            Ok(found) => {
                assert!(found.iter().all(|found| (1..=lines).contains(&found.line)), "{found:?}");
                serve(found.into_iter().filter_map(|found| admit(found.object)));
            }
            Err(ParseError { line, field, message }) => {
                assert!((1..=lines).contains(&line), "line {line} of {lines}: {message}");
                let is_one_line = !message.contains('\n') && !field.contains('\n');
                assert!(is_one_line && !message.is_empty(), "{field:?} {message:?}");
            }
        }
    }
}

/// An agent programs the objects, and the next agent finds nothing to change in what packets see.
fn serve(objects: impl Iterator<Item = Object>) {
    let mut lists: BTreeMap<(ObjectKind, String), Object> = BTreeMap::new();
    for object in objects {
        lists.insert((object.kind(), object.name().to_string()), object);
    }
    if lists.is_empty() {
        return;
    }
    let mut fake = Fake::new(SMALL);
    let first = at_rest(&lists, &mut fake);
    let programmed = (fake.frontends4.clone(), fake.frontends6.clone());
    // Which Services get the room of a full map depends on what holds it already.
    if first.shortages().count() > 0 {
        return;
    }
    at_rest(&lists, &mut fake);
    assert!(programmed == (fake.frontends4, fake.frontends6), "the next agent changed frontends");
}

/// A controller that has listed these objects and has nothing left to do.
fn at_rest(lists: &BTreeMap<(ObjectKind, String), Object>, fake: &mut Fake) -> Controller {
    let expected = [ObjectKind::Node, ObjectKind::ServiceCidr];
    let mut controller = Controller::new(NODE, ExternalMode::Snat, expected);
    let addresses = ["192.0.2.10", "2001:db8::10"].map(|ip| ip.parse().expect("an address"));
    controller.set_facts(NodeFacts {
        addresses: addresses.into_iter().collect(),
        node_port_addresses: addresses.into_iter().collect(),
        ..NodeFacts::default()
    });
    for kind in KINDS {
        let of_kind = lists.iter().filter(|((of, _), _)| *of == kind);
        let objects = of_kind.map(|(_, object)| object.clone()).collect();
        controller.apply(ObjectEvent::Replaced(kind, objects));
    }
    let mut now = 0;
    for _ in 0..100 {
        let outcome = controller.reconcile(now, fake).expect("the maps of a test can be read");
        assert!(outcome.errors.is_empty(), "{:?}", outcome.errors);
        match outcome.next_due {
            _ if controller.has_changes() => {}
            // The controller never stops to try Services that do not fit: those are no progress.
            Some(due) if due > now => now = due,
            _ => return controller,
        }
    }
    panic!("it does not come to rest");
}
