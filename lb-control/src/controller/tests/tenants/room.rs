//! The share of the maps that a namespace has.

use super::*;

/// A Service of a namespace with so many ports, and its address.
fn of_namespace(namespace: &str, number: u8, count: usize) -> Object {
    let spec = json!({ "clusterIP": format!("10.0.0.{number}"), "ports": ports(count, false) });
    let mut object = object(&format!("s{number}"), spec, Vec::new());
    object.metadata.namespace = Some(namespace.to_owned());
    object.into()
}

fn of_defaults(services: Vec<Object>) -> Controller {
    let mut controller = Controller::new("here", ExternalMode::Snat, []);
    controller.apply(ObjectEvent::Replaced(ObjectKind::Service, services));
    controller.apply(ObjectEvent::Replaced(ObjectKind::EndpointSlice, Vec::new()));
    controller
}

#[test]
fn one_namespace_leaves_half_of_what_is_free_to_others() {
    // Each Service takes ten entries of SERVICES, of which there are 100.
    let greedy = (1..=12).map(|number| of_namespace("greedy", number, 9));
    let mut controller = of_defaults(greedy.collect());
    let mut fake = Fake::new(Capacity { services: 100, ..CAPACITY });
    let outcome = reconcile(&mut controller, 0, &mut fake);
    assert_eq!((controller.counts().services, outcome.shortages.len()), (50, 7));
    for shortage in &outcome.shortages {
        assert_eq!((shortage.map, shortage.share), (Map::Services, Some(50)));
        let message = shortage.message();
        assert!(
            message.contains("--max-namespace-share") && !message.contains("full"),
            "{message}"
        );
    }
    // Others get half of the rest, and so on; the first one gets no more.
    for (number, namespace, total, refused) in [
        (20, "a", 60, 0),
        (21, "a", 70, 0),
        (22, "a", 70, 1),
        (23, "b", 80, 0),
        (24, "greedy", 80, 1),
    ] {
        controller.apply(ObjectEvent::Applied(of_namespace(namespace, number, 9)));
        let outcome = reconcile(&mut controller, 0, &mut fake);
        assert_eq!(
            (controller.counts().services, outcome.shortages.len()),
            (total, refused),
            "{number}"
        );
    }
    // What it has may change, as long as it does not grow; a restart changes nothing.
    controller.apply(ObjectEvent::Applied(of_namespace("greedy", 1, 9)));
    let ObjectEvent::Applied(Object::Service(mut moved)) =
        ObjectEvent::Applied(of_namespace("greedy", 1, 9))
    else {
        panic!("no Service")
    };
    moved.spec.as_mut().expect("a spec").ports.as_mut().expect("ports")[0].name =
        Some("new".to_owned());
    controller.apply(ObjectEvent::Applied(Object::Service(moved.clone())));
    assert_eq!(reconcile(&mut controller, 0, &mut fake).shortages, []);
    let mut services: Vec<_> = (2..=12).map(|number| of_namespace("greedy", number, 9)).collect();
    services.push(Object::Service(moved));
    services.extend(
        [(20, "a"), (21, "a"), (23, "b")].map(|(n, namespace)| of_namespace(namespace, n, 9)),
    );
    let mut next = of_defaults(services);
    assert_eq!(reconcile(&mut next, 0, &mut fake).ops, 0);
    assert_eq!(next.counts().services, 80);
}

/// A slice of the Service s1 of [`of_namespace`].
fn endpoints_of_s1(ips: &[String]) -> Object {
    let Object::EndpointSlice(mut object) = slice("s1", ips) else { panic!("no slice") };
    object.metadata.namespace = Some("greedy".to_owned());
    if let Some(port) = object.ports.iter_mut().flatten().next() {
        port.name = Some("p0".to_owned());
    }
    Object::from(*object)
}

#[test]
fn other_endpoints_in_place_of_all_need_no_more_than_there_is() {
    let mut controller = of_defaults(vec![of_namespace("greedy", 1, 1)]);
    let mut fake = Fake::new(Capacity { slots: 100, ..CAPACITY });
    // A block of 32 slots is within the share; one of 64, which the last step would get if there
    // were no share, is not.
    for ips in [pods(1, 20), pods(1, 30), pods(2, 30)] {
        controller.apply(ObjectEvent::Applied(endpoints_of_s1(&ips)));
        let outcome = reconcile(&mut controller, 0, &mut fake);
        assert_eq!(outcome.shortages, []);
        assert!(outcome.ops > 0);
        assert_eq!(controller.counts().backends, ips.len());
    }
}

#[test]
fn a_namespace_gets_its_share_of_every_map() {
    let endpoints = |count| endpoints_of_s1(&pods(1, count));
    let ranged = || {
        let Object::Service(mut object) = of_namespace("greedy", 1, 1) else {
            panic!("no Service")
        };
        let spec = object.spec.as_mut().expect("a spec");
        spec.type_ = Some("LoadBalancer".to_owned());
        let ranges = (0..5).map(|n| format!("10.{n}.0.0/16"));
        spec.load_balancer_source_ranges = Some(ranges.collect());
        let status = json!({ "loadBalancer": { "ingress": [{ "ip": "203.0.113.1" }] } });
        object.status = serde_json::from_value(status).expect("a status");
        Object::Service(object)
    };
    for (capacity, map) in [
        (Capacity { backends4: 9, ..CAPACITY }, Map::Backends4),
        (Capacity { slots: 12, ..CAPACITY }, Map::Slots),
        (Capacity { frontends4: 6, ..CAPACITY }, Map::Frontends4),
        (Capacity { ranges4: 9, ..CAPACITY }, Map::Ranges4),
    ] {
        let mut controller = of_defaults(vec![ranged()]);
        controller.apply(ObjectEvent::Applied(endpoints(5)));
        let mut fake = Fake::new(capacity);
        let outcome = reconcile(&mut controller, 0, &mut fake);
        let found: Vec<_> = outcome.shortages.iter().map(|it| (it.map, it.share)).collect();
        assert_eq!(found, [(map, Some(50))]);
        assert_eq!(controller.counts().frontends, 0, "{map}: it is not half programmed");
        // Nothing of it was reserved for good: however often it is refused, a smaller one fits.
        for pods in [5, 6, 5, 6, 5, 6] {
            controller.apply(ObjectEvent::Applied(endpoints(pods)));
            reconcile(&mut controller, 0, &mut fake);
        }
        if map == Map::Slots {
            controller.apply(ObjectEvent::Applied(endpoints(3)));
            reconcile(&mut controller, 0, &mut fake);
            assert_eq!(controller.counts().backends, 3, "{map}");
        }
        let limits = Limits { namespace_share: 100, ..Limits::default() };
        let mut all = of_defaults(vec![ranged()]).with_limits(limits);
        all.apply(ObjectEvent::Applied(endpoints(5)));
        let mut fake = Fake::new(capacity);
        assert_eq!(reconcile(&mut all, 0, &mut fake).shortages, [], "{map} has room for all");
    }
}
