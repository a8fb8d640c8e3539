use serde_json::{Value, json};

use super::*;

fn service(name: &str, ip: &str) -> Object {
    let object = json!({
        "metadata": { "namespace": "shop", "name": name },
        "spec": { "clusterIP": ip, "ports": [{ "port": 80 }] },
    });
    Object::Service(serde_json::from_value(object).expect("a Service"))
}

fn slice(name: &str, service: &str, ip: &str) -> Object {
    let object = json!({
        "metadata": {
            "namespace": "shop",
            "name": name,
            "labels": { "kubernetes.io/service-name": service },
        },
        "addressType": "IPv4",
        "endpoints": [{ "addresses": [ip] }],
        "ports": [{ "name": "", "port": 8080 }],
    });
    Object::EndpointSlice(serde_json::from_value(object).expect("an EndpointSlice"))
}

fn node(labels: Value) -> Object {
    let object = json!({ "metadata": { "name": "here", "labels": labels } });
    Object::Node(serde_json::from_value(object).expect("a Node"))
}

/// A Node with an external address and these InternalIPs.
fn node_at(name: &str, external: &str, internal: &[&str]) -> Object {
    let internal = internal.iter().map(|ip| json!({ "type": "InternalIP", "address": ip }));
    let external = json!({ "type": "ExternalIP", "address": external });
    let addresses: Vec<_> = internal.chain([external]).collect();
    let object = json!({ "metadata": { "name": name }, "status": { "addresses": addresses } });
    Object::Node(serde_json::from_value(object).expect("a Node"))
}

/// A slice of one endpoint on that node.
fn slice_on(name: &str, service: &str, node: &str) -> Object {
    let Object::EndpointSlice(mut object) = slice(name, service, "10.1.0.1") else {
        panic!("no slice");
    };
    object.endpoints.iter_mut().flatten().for_each(|it| it.node_name = Some(node.to_owned()));
    Object::EndpointSlice(object)
}

fn name(name: &str) -> ObjectName {
    ObjectName { namespace: "shop".to_owned(), name: name.to_owned() }
}

#[track_caller]
fn check_dirty(
    snapshot: &mut Snapshot,
    events: impl IntoIterator<Item = ObjectEvent>,
    expected: &[&str],
) {
    events.into_iter().for_each(|event| snapshot.apply(event));
    let dirty = snapshot.take_dirty(|_| true);
    let names: BTreeSet<&str> = dirty.services.iter().map(|name| &**name).collect();
    assert_eq!(names.into_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn it_is_complete_once_every_kind_was_listed() {
    let mut snapshot = Snapshot::new("here", [ObjectKind::Node, ObjectKind::ServiceCidr]);
    for kind in [ObjectKind::Service, ObjectKind::EndpointSlice, ObjectKind::Node] {
        snapshot.apply(ObjectEvent::Replaced(kind, Vec::new()));
        assert!(!snapshot.is_complete());
    }
    assert_eq!(snapshot.awaited().collect::<Vec<_>>(), [ObjectKind::ServiceCidr]);
    snapshot.expect_no(ObjectKind::ServiceCidr);
    assert!(snapshot.is_complete());
}

#[test]
fn an_event_touches_its_service_only() {
    let mut snapshot = Snapshot::new("here", []);
    let services = vec![service("a", "10.0.0.1"), service("b", "10.0.0.2")];
    check_dirty(
        &mut snapshot,
        [ObjectEvent::Replaced(ObjectKind::Service, services)],
        &["shop/a", "shop/b"],
    );
    check_dirty(&mut snapshot, [ObjectEvent::Applied(slice("b-1", "b", "10.1.0.1"))], &["shop/b"]);
    check_dirty(&mut snapshot, [ObjectEvent::Applied(slice("b-1", "b", "10.1.0.1"))], &[]);
    check_dirty(
        &mut snapshot,
        [ObjectEvent::Applied(slice("b-1", "a", "10.1.0.1"))],
        &["shop/a", "shop/b"],
    );
    check_dirty(
        &mut snapshot,
        [ObjectEvent::Deleted(ObjectKind::EndpointSlice, name("b-1"))],
        &["shop/a"],
    );
    check_dirty(&mut snapshot, [ObjectEvent::Deleted(ObjectKind::EndpointSlice, name("b-1"))], &[]);
}

#[test]
fn a_relist_touches_what_differs() {
    let mut snapshot = Snapshot::new("here", []);
    let list = |ips: &[(&str, &str)]| {
        let objects = ips.iter().map(|(name, ip)| service(name, ip)).collect();
        [ObjectEvent::Replaced(ObjectKind::Service, objects)]
    };
    check_dirty(
        &mut snapshot,
        list(&[("a", "10.0.0.1"), ("b", "10.0.0.2")]),
        &["shop/a", "shop/b"],
    );
    check_dirty(&mut snapshot, list(&[("a", "10.0.0.1"), ("b", "10.0.0.2")]), &[]);
    check_dirty(
        &mut snapshot,
        list(&[("a", "10.0.0.3"), ("c", "10.0.0.2")]),
        &["shop/a", "shop/b", "shop/c"],
    );
    assert_eq!(snapshot.names().count(), 2);
}

#[test]
fn only_the_zone_of_this_node_touches_everything() {
    let mut snapshot = Snapshot::new("here", []);
    snapshot.apply(ObjectEvent::Applied(node(json!({ "a": "b" }))));
    assert!(!snapshot.take_dirty(|_| true).everything);
    snapshot.apply(ObjectEvent::Applied(node(json!({ "topology.kubernetes.io/zone": "a" }))));
    assert!(snapshot.take_dirty(|_| true).everything);
    snapshot.apply(ObjectEvent::Deleted(
        ObjectKind::Node,
        ObjectName { namespace: String::new(), name: "here".to_owned() },
    ));
    assert_eq!(snapshot.take_dirty(|_| true), Dirty::default());
    snapshot.apply(ObjectEvent::Replaced(ObjectKind::Node, Vec::new()));
    assert_eq!(snapshot.take_dirty(|_| true), Dirty::default());
    assert!(snapshot.node().is_some_and(|node| node.zone.is_some()), "what worked goes on");
}

#[test]
fn a_node_that_is_reached_by_another_address_touches_the_services_on_it_that_need_it() {
    let mut snapshot = Snapshot::new("here", []);
    let slices = vec![
        slice_on("a-1", "a", "there"),
        slice_on("b-1", "b", "elsewhere"),
        slice_on("c-1", "c", "here"),
        slice_on("c-2", "c", "there"),
        slice_on("d-1", "d", "there"),
    ];
    let services = ["a", "b", "c", "d"].map(|name| service(name, "10.0.0.1"));
    let events = [
        ObjectEvent::Replaced(ObjectKind::Service, services.into()),
        ObjectEvent::Replaced(ObjectKind::EndpointSlice, slices),
    ];
    check_dirty(&mut snapshot, events, &["shop/a", "shop/b", "shop/c", "shop/d"]);
    let mut check = |event: ObjectEvent, services: &[&str], nodes: bool| {
        snapshot.apply(event);
        let dirty = snapshot.take_dirty(|service| &*service.name != "shop/d");
        let names: BTreeSet<&str> = dirty.services.iter().map(|name| &**name).collect();
        assert_eq!(names.into_iter().collect::<Vec<_>>(), services);
        assert_eq!((dirty.nodes, dirty.everything), (nodes, false));
        let held: BTreeSet<_> = snapshot.nodes().addresses().map(|ip| ip.to_string()).collect();
        held.into_iter().collect::<Vec<_>>()
    };
    let there =
        |external, internal: &[&str]| ObjectEvent::Applied(node_at("there", external, internal));
    let on_it = ["shop/a", "shop/c"];
    let held = check(there("203.0.113.1", &["192.0.2.1"]), &on_it, true);
    assert_eq!(held, ["192.0.2.1", "203.0.113.1"]);
    check(there("203.0.113.1", &["192.0.2.1"]), &[], false);
    let held = check(there("203.0.113.2", &["192.0.2.1"]), &[], true);
    assert_eq!(held, ["192.0.2.1", "203.0.113.2"]);
    check(there("203.0.113.2", &["192.0.2.1", "192.0.2.2"]), &[], true);
    check(there("203.0.113.2", &["192.0.2.2", "192.0.2.1"]), &on_it, true);
    check(there("203.0.113.2", &["192.0.2.2", "192.0.2.1", "fd00::1"]), &on_it, true);
    check(ObjectEvent::Applied(node_at("new", "203.0.113.3", &["192.0.2.3"])), &[], true);
    check(ObjectEvent::Applied(node_at("here", "203.0.113.4", &["192.0.2.4"])), &[], true);
    let list = vec![node_at("here", "203.0.113.4", &["192.0.2.4"])];
    let held = check(ObjectEvent::Replaced(ObjectKind::Node, list), &on_it, true);
    assert_eq!(held, ["192.0.2.4", "203.0.113.4"]);
    let gone = ObjectName { namespace: String::new(), name: "there".to_owned() };
    check(ObjectEvent::Deleted(ObjectKind::Node, gone), &[], false);
    assert_eq!(snapshot.nodes().internal_ip("here", IpFamily::V6), None);
}

#[test]
fn refusals_of_another_node_are_not_reported_here() {
    let mut snapshot = Snapshot::new("here", []);
    snapshot.apply(ObjectEvent::Applied(node_at("there", "nowhere", &["192.0.2.1"])));
    assert_eq!(snapshot.take_dirty(|_| true).refusals, []);
    snapshot.apply(ObjectEvent::Applied(node_at("here", "nowhere", &["192.0.2.2"])));
    let refusals = snapshot.take_dirty(|_| true).refusals;
    let own = ObjectName { namespace: String::new(), name: "here".to_owned() };
    assert_eq!(refusals.iter().map(|refusal| &refusal.object).collect::<Vec<_>>(), [&own]);
    assert_eq!(snapshot.nodes().addresses().count(), 2);
    snapshot.apply(ObjectEvent::Applied(node_at("here", "203.0.113.1", &["192.0.2.2"])));
    assert_eq!(snapshot.take_dirty(|_| true).resolved, [(ObjectKind::Node, own)]);
}

#[test]
fn a_refusal_is_reported_once_and_ends_with_its_cause() {
    let mut snapshot = Snapshot::new("here", []);
    snapshot.apply(ObjectEvent::Applied(service("a", "10.0.0.300")));
    assert_eq!(snapshot.take_dirty(|_| true).refusals.len(), 1);
    snapshot.apply(ObjectEvent::Applied(service("a", "10.0.0.300")));
    assert_eq!((snapshot.take_dirty(|_| true).refusals.len(), snapshot.refusals().count()), (0, 1));
    snapshot.apply(ObjectEvent::Applied(service("a", "10.0.0.3")));
    assert_eq!((snapshot.take_dirty(|_| true).refusals.len(), snapshot.refusals().count()), (0, 0));
    snapshot.apply(ObjectEvent::Applied(service("b", "nowhere")));
    snapshot.apply(ObjectEvent::Replaced(ObjectKind::Service, Vec::new()));
    assert_eq!(snapshot.refusals().count(), 0);
}

#[test]
fn a_changed_slice_reports_its_trigger_time() {
    let mut snapshot = Snapshot::new("here", []);
    let at = |ip: &str, time: &str| {
        let Object::EndpointSlice(mut object) = slice("web-1", "web", ip) else {
            panic!("no slice");
        };
        object.metadata.annotations =
            Some([(TRIGGER_TIME_ANNOTATION.into(), time.to_owned())].into());
        ObjectEvent::Applied(Object::EndpointSlice(object))
    };
    let mut triggers = |event: ObjectEvent| {
        snapshot.apply(event);
        let triggers = snapshot.take_dirty(|_| true).triggers.into_iter();
        triggers.map(|trigger| (trigger.service.to_string(), trigger.at.to_string())).collect()
    };
    let told: Vec<_> = triggers(at("10.1.0.1", "2026-11-21T11:41:28.5Z"));
    assert_eq!(told, [("shop/web".to_owned(), "2026-11-21T11:41:28.5Z".to_owned())]);
    assert_eq!(triggers(at("10.1.0.1", "2026-11-21T11:41:29Z")), [], "nothing changed");
    assert_eq!(triggers(at("10.1.0.2", "soon")), []);
    assert_eq!(triggers(ObjectEvent::Applied(slice("web-1", "web", "10.1.0.3"))), []);
    snapshot.apply(at("10.1.0.4", "2026-11-21T11:41:30Z"));
    snapshot.apply(ObjectEvent::Deleted(ObjectKind::EndpointSlice, name("web-1")));
    assert_eq!(snapshot.take_dirty(|_| true).triggers, []);
}

#[test]
fn what_cannot_be_read_stays_as_it_was_until_it_is_deleted() {
    let mut snapshot = Snapshot::new("here", []);
    let kind = ObjectKind::Service;
    let unreadable = |object: &str| Unreadable {
        name: name(object),
        uid: "1".to_owned(),
        field: "spec.ports[0].port".to_owned(),
        error: format!("\u{1b}[2J{}", "no number".repeat(1_000)),
    };
    let list = vec![service("a", "10.0.0.1"), service("b", "10.0.0.2")];
    check_dirty(&mut snapshot, [ObjectEvent::Replaced(kind, list)], &["shop/a", "shop/b"]);
    check_dirty(&mut snapshot, [ObjectEvent::Unreadable(kind, unreadable("a"))], &[]);
    assert!(snapshot.service("shop/a").is_some());
    let refused = |snapshot: &Snapshot| -> Vec<String> {
        snapshot.refusals().map(|refusal| format!("{}", refusal.object)).collect()
    };
    assert_eq!(refused(&snapshot), ["shop/a"]);
    let message = &snapshot.refusals().next().expect("one").message;
    assert!(message.len() < 256 && message.starts_with("\\u{1b}[2J"), "{message}");

    let except = || {
        let list = vec![service("c", "10.0.0.3")];
        ObjectEvent::ReplacedExcept(kind, list, vec![unreadable("a"), unreadable("d")])
    };
    check_dirty(&mut snapshot, [except()], &["shop/b", "shop/c"]);
    assert!(snapshot.service("shop/a").is_some() && snapshot.service("shop/b").is_none());
    assert_eq!(refused(&snapshot), ["shop/a", "shop/d"]);
    snapshot.apply(except());
    assert!(!snapshot.has_changes(), "the same again");

    check_dirty(&mut snapshot, [ObjectEvent::Applied(service("a", "10.0.0.1"))], &[]);
    assert_eq!(refused(&snapshot), ["shop/d"]);
    check_dirty(&mut snapshot, [ObjectEvent::Replaced(kind, Vec::new())], &["shop/a", "shop/c"]);
    assert!(refused(&snapshot).is_empty());
}

#[test]
fn the_nodes_of_endpoints_share_the_reports() {
    let names = ["here", "there", "elsewhere"];
    let slice_on = |nodes: &[&str]| {
        let endpoint = |(at, node): (usize, &&str)| json!({ "addresses": [format!("10.1.0.{}", at + 1)], "nodeName": node });
        let object = json!({
            "metadata": {
                "namespace": "shop", "name": "cart-1",
                "labels": { "kubernetes.io/service-name": "cart" },
            },
            "addressType": "IPv4",
            "endpoints": nodes.iter().enumerate().map(endpoint).collect::<Vec<_>>(),
        });
        Object::EndpointSlice(Box::new(serde_json::from_value(object).expect("an EndpointSlice")))
    };
    let mut snapshots = names.map(|name| Snapshot::new(name, []));
    let mut check = |event: Option<ObjectEvent>, expected: &[usize]| {
        // Each knows its own Node, which makes it no candidate.
        for (snapshot, name) in snapshots.iter_mut().zip(names) {
            let node = json!({ "metadata": { "name": name } });
            let node = serde_json::from_value(node).expect("a Node");
            snapshot.apply(ObjectEvent::Applied(Object::Node(Box::new(node))));
            event.iter().for_each(|event| snapshot.apply(event.clone()));
        }
        let mut counts = [0; 3];
        for number in 0..60 {
            let name = ObjectName { namespace: "shop".to_owned(), name: format!("s{number}") };
            let reports = |snapshot: &Snapshot| snapshot.is_reporter(ObjectKind::Service, &name);
            let reporters: Vec<usize> = (0..3).filter(|at| reports(&snapshots[*at])).collect();
            // What is wrong with a Node is known to its own agent alone.
            assert!(snapshots.iter().all(|one| one.is_reporter(ObjectKind::Node, &name)));
            assert!(expected.len() == 3 && reporters.len() == 3 || reporters.len() == 1);
            reporters.iter().for_each(|at| counts[*at] += 1);
        }
        let reporting: Vec<usize> = (0..3).filter(|at| counts[*at] > 0).collect();
        assert_eq!(reporting, expected, "{counts:?}");
    };
    check(None, &[0, 1, 2]);
    check(Some(ObjectEvent::Applied(slice_on(&["here", "there", "here"]))), &[0, 1]);
    check(Some(ObjectEvent::Applied(slice_on(&["there", "elsewhere"]))), &[1, 2]);
    check(Some(ObjectEvent::Deleted(ObjectKind::EndpointSlice, "shop/cart-1".into())), &[0, 1, 2]);
}
