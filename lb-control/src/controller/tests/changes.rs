//! Which changes are something to reconcile.

use super::*;
use crate::model::event::Unreadable;

#[test]
fn an_event_that_changes_nothing_is_nothing_to_reconcile() {
    let web = || service("a", None, "10.0.0.1", 80);
    let mut controller = listed(vec![web()], Vec::new());
    let mut fake = Fake::new(CAPACITY);
    assert!(controller.has_changes(), "nothing is in the maps");
    reconcile(&mut controller, 0, &mut fake);
    assert!(!controller.has_changes());
    let node = |heartbeat: &str| {
        let node = json!({
            "metadata": { "name": "here" },
            "status": { "conditions": [
                { "type": "Ready", "status": "True", "lastHeartbeatTime": heartbeat },
            ] },
        });
        Object::Node(serde_json::from_value(node).expect("a Node"))
    };
    controller.apply(ObjectEvent::Applied(node("2026-01-01T00:00:00Z")));
    reconcile(&mut controller, 0, &mut fake);
    for event in [
        ObjectEvent::Applied(web()),
        ObjectEvent::Applied(node("2026-01-01T00:05:00Z")),
        ObjectEvent::Replaced(ObjectKind::Service, vec![web()]),
    ] {
        controller.apply(event);
        assert!(!controller.has_changes());
    }
    controller.set_facts(controller.facts().clone());
    assert!(!controller.has_changes(), "the same facts");
    controller.apply(ObjectEvent::Replaced(ObjectKind::Service, Vec::new()));
    assert!(controller.has_changes());
}

/// A change, and its name.
type Change = (&'static str, Box<dyn Fn(&mut Controller)>);

fn applied(what: &'static str, event: ObjectEvent) -> Change {
    (what, Box::new(move |controller| controller.apply(event.clone())))
}

#[test]
fn whatever_decides_about_a_refusal_is_a_change() {
    let ranged = |ranges: &[&str]| {
        let service = load_balancer("a", 1, json!({ "loadBalancerSourceRanges": ranges }));
        ObjectEvent::Applied(service)
    };
    let unreadable = Unreadable {
        name: ObjectName { namespace: "shop".to_owned(), name: "a".to_owned() },
        uid: String::new(),
        field: "spec".to_owned(),
        error: "no object".to_owned(),
    };
    let api_server: ApiServers = [("192.0.2.1".parse().expect("an address"), 6443)].into();
    let cidr = json!({ "metadata": { "name": "c" }, "spec": { "cidrs": ["203.0.113.0/24"] } });
    let cidr = Object::ServiceCidr(serde_json::from_value(cidr).expect("a ServiceCIDR"));
    let mut controller = listed(Vec::new(), Vec::new());
    let mut fake = Fake::new(CAPACITY);
    reconcile(&mut controller, 0, &mut fake);
    // After each: how many refusals are new, and of how many objects less is refused.
    for ((what, change), counts) in [
        (applied("a wrong range", ranged(&["10.0.0.0/8", "wrong"])), (1, 0)),
        (applied("unreadable", ObjectEvent::Unreadable(ObjectKind::Service, unreadable)), (1, 1)),
        (applied("readable again", ranged(&["10.0.0.0/8", "wrong"])), (1, 1)),
        (applied("without the wrong range", ranged(&["10.0.0.0/8"])), (0, 1)),
        (applied("its address in a ServiceCIDR", ObjectEvent::Applied(cidr)), (1, 0)),
        (
            (
                "other API servers",
                Box::new(move |controller| controller.set_api_servers(api_server.clone())),
            ),
            (0, 0),
        ),
        (applied("deleted", deleted("a")), (0, 1)),
    ] as [(Change, (usize, usize)); 7]
    {
        assert!(!controller.has_changes(), "before: {what}");
        change(&mut controller);
        assert!(controller.has_changes(), "{what}");
        let outcome = reconcile(&mut controller, 0, &mut fake);
        assert_eq!((outcome.refusals.len(), outcome.resolved.len()), counts, "{what}");
    }
    assert!(!controller.has_changes());
}
