//! What an event costs, in counted steps.

use super::*;

#[test]
fn claims_that_change_cost_what_changes() {
    let external = |count: usize| {
        json!({
            "clusterIP": "10.0.0.1", "ports": [{ "name": "http", "port": 80 }],
            "externalIPs": addresses(20, count),
        })
    };
    // A hundred Services want the same addresses.
    let others = (0..100).map(|n| aged(&format!("s{n}"), 2, external(200), &[]));
    let mut controller = listed(others.collect(), Vec::new());
    let mut fake = Fake::new(CAPACITY);
    reconcile(&mut controller, 0, &mut fake);
    let (steps, _) = crate::work::of(|| {
        controller.apply(ObjectEvent::Applied(aged("s0", 2, external(199), &[])));
        reconcile(&mut controller, 0, &mut fake)
    });
    let owner = served(&fake);
    assert!(owner.contains(&"20.0.0.199:80 shop/s1:http".to_owned()), "the next by name has it");
    assert!(owner.contains(&"20.0.0.198:80 shop/s0:http".to_owned()));
    // Two Services are looked at: the one that changed, and the one that won an address.
    assert!(steps < 900, "{steps} steps");
}

#[test]
fn a_service_that_waits_for_room_is_planned_when_its_map_has_it() {
    // Two hundred Services wait for nine backends each.
    let names: Vec<String> = (0..200).map(|n| format!("w{n:03}")).collect();
    let services = (0..200).map(|n| service(&names[n], None, &format!("10.0.1.{n}"), 80));
    let slices = (0..200).map(|n| slice(&names[n], &pods(n, 9)));
    let mut controller = listed(
        services.chain([service("a", None, "10.0.0.1", 80)]).collect(),
        slices.chain([slice("a", &pods(300, 6))]).collect(),
    );
    let mut fake = Fake::new(Capacity { backends4: 10, ..CAPACITY });
    reconcile(&mut controller, 0, &mut fake);
    assert_eq!(controller.shortages().count(), 200);
    // An entry becomes free: none of them is planned.
    let mut now = 0;
    let mut settle = |controller: &mut Controller, fake: &mut Fake| {
        let mut planned = 0;
        let (steps, ()) = crate::work::of(|| {
            for _ in 0..10 {
                now += GRACE;
                planned += reconcile(controller, now, fake).services;
            }
        });
        (planned, steps)
    };
    controller.apply(ObjectEvent::Applied(slice("a", &pods(300, 5))));
    let (planned, steps) = settle(&mut controller, &mut fake);
    assert_eq!((planned, controller.shortages().count()), (1, 200));
    assert!(steps < 400, "each is looked at once: {steps} steps");
    // All become free: one of them fits, and the others are left alone after the first few.
    controller.apply(deleted("a"));
    let (planned, _) = settle(&mut controller, &mut fake);
    assert_eq!(controller.shortages().count(), 199);
    assert!(planned <= 1 + 2 * shortages::RETRIES, "{planned} Services were planned");
}

/// The steps of one reconciliation after an event.
fn steps_of(event: ObjectEvent, controller: &mut Controller, fake: &mut Fake) -> usize {
    controller.apply(event);
    crate::work::of(|| reconcile(controller, 0, fake)).0
}

#[test]
fn an_event_costs_the_same_however_many_services_there_are() {
    let steps = |count: usize| {
        let ip = |n: usize| format!("10.0.{}.{}", n / 250, n % 250 + 1);
        let name = |n: usize| format!("s{n}");
        let mut controller = listed(
            (0..count).map(|n| service(&name(n), None, &ip(n), 80)).collect(),
            (0..count).map(|n| slice(&name(n), &pods(n, 3))).collect(),
        );
        controller.apply(service_cidr("10.0.0.0/16"));
        let mut fake = Fake::new(CAPACITY);
        reconcile(&mut controller, 0, &mut fake);
        [
            ObjectEvent::Applied(slice("s5", &pods(5, 4))),
            ObjectEvent::Applied(service("new", None, &ip(count), 80)),
            ObjectEvent::Applied(service("s5", None, &ip(5), 81)),
            ObjectEvent::Deleted(ObjectKind::Service, "shop/s7".into()),
            ObjectEvent::Deleted(ObjectKind::EndpointSlice, "shop/s8-1".into()),
        ]
        .map(|event| steps_of(event, &mut controller, &mut fake))
    };
    let few = steps(20);
    assert_eq!(steps(2_000), few);
    assert!(few.iter().all(|steps| (1..40).contains(steps)), "{few:?}");
}

#[test]
fn an_endpoint_costs_its_service_s_ports_once() {
    let steps = |count: usize| {
        let endpoints = |pods: &[String]| {
            let Object::EndpointSlice(mut object) = slice("big", pods) else { panic!("no slice") };
            let ports = (0..count).map(|n| json!({ "name": format!("p{n}"), "port": 8_000 + n }));
            object.ports = serde_json::from_value(ports.collect()).expect("ports");
            Object::EndpointSlice(object)
        };
        let spec = json!({ "clusterIP": "10.0.0.1", "ports": ports(count, false) });
        let services = vec![object("big", spec, Vec::new()).into()];
        let mut controller = listed(services, vec![endpoints(&pods(1, 1))]);
        let mut fake = Fake::new(CAPACITY);
        reconcile(&mut controller, 0, &mut fake);
        assert_eq!(controller.counts().backends, count);
        steps_of(ObjectEvent::Applied(endpoints(&pods(1, 2))), &mut controller, &mut fake)
    };
    let (few, many) = (steps(10), steps(1_000));
    assert!(many <= few * 100, "{few} steps for 10 ports, {many} for 1,000");
}
