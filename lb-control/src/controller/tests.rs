mod changes;
mod outside;
mod random;
mod tenants;

use std::{net::Ipv4Addr, time::Instant};

use k8s_openapi::api::{core::v1, discovery::v1::EndpointSlice};
use lb_common::abi::{
    address::Address4,
    frontend::{Frontend, FrontendKind},
};
use serde_json::json;

use super::*;
use crate::{
    dataplane::{
        Capacity,
        fake::{Fake, Writes},
    },
    model::event::{Object, ObjectName},
};

const CAPACITY: Capacity = Capacity {
    services: 32_768,
    slots: 1 << 18,
    backends4: 1 << 17,
    backends6: 1 << 10,
    frontends4: 32_768,
    frontends6: 1 << 10,
    ranges4: 1 << 10,
    ranges6: 1 << 10,
    nodes4: 1 << 10,
    nodes6: 1 << 10,
};

fn service(name: &str, created: Option<&str>, ip: &str, port: u16) -> Object {
    let object = json!({
        "metadata": { "namespace": "shop", "name": name, "creationTimestamp": created },
        "spec": { "clusterIP": ip, "ports": [{ "name": "http", "port": port }] },
    });
    Object::Service(Box::new(serde_json::from_value::<v1::Service>(object).expect("a Service")))
}

/// A Service with an address of a load balancer, and this more in its specification.
fn load_balancer(name: &str, number: u8, more: serde_json::Value) -> Object {
    let mut spec = json!({
        "type": "LoadBalancer",
        "clusterIP": format!("10.0.0.{number}"),
        "ports": [{ "name": "http", "port": 80 }],
    });
    spec.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let object = json!({
        "metadata": {
            "namespace": "shop", "name": name,
            "creationTimestamp": format!("2026-01-{number:02}T00:00:00Z"),
        },
        "spec": spec,
        "status": { "loadBalancer": { "ingress": [{ "ip": format!("203.0.113.{number}") }] } },
    });
    Object::Service(Box::new(serde_json::from_value::<v1::Service>(object).expect("a Service")))
}

fn node_ports_on(ips: &[&str]) -> NodeFacts {
    let ips = ips.iter().map(|ip| ip.parse().expect("an address"));
    NodeFacts { node_port_addresses: ips.collect(), ..NodeFacts::default() }
}

/// The frontends of IPv4 that are of a kind, but for node ports of any node.
fn frontends(fake: &Fake, kind: FrontendKind) -> Vec<(String, u16)> {
    let of_kind = fake.frontends4.iter().filter(|(_, frontend)| frontend.kind == kind);
    let of_kind = of_kind.filter(|(key, _)| key.address != Address4::default());
    let mut found: Vec<_> =
        of_kind.map(|(key, _)| (Ipv4Addr::from(key.address).to_string(), key.port.get())).collect();
    found.sort();
    found
}

fn deleted(name: &str) -> ObjectEvent {
    let name = ObjectName { namespace: "shop".to_owned(), name: name.to_owned() };
    ObjectEvent::Deleted(ObjectKind::Service, name)
}

fn slice(service: &str, ips: &[String]) -> Object {
    let endpoints: Vec<_> = ips.iter().map(|ip| json!({ "addresses": [ip] })).collect();
    let object = json!({
        "metadata": {
            "namespace": "shop",
            "name": format!("{service}-1"),
            "labels": { "kubernetes.io/service-name": service },
        },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{ "name": "http", "port": 8080 }],
    });
    let slice: EndpointSlice = serde_json::from_value(object).expect("an EndpointSlice");
    Object::EndpointSlice(Box::new(slice))
}

fn pods(service: usize, count: usize) -> Vec<String> {
    (0..count)
        .map(|pod| format!("10.{}.{}.{}", 128 + service / 250, service % 250, pod + 1))
        .collect()
}

fn listed(services: Vec<Object>, slices: Vec<Object>) -> Controller {
    // These tests have one namespace.
    let limits = Limits { namespace_share: 100, ..Limits::default() };
    let mut controller = Controller::new("here", ExternalMode::Snat, []).with_limits(limits);
    controller.apply(ObjectEvent::Replaced(ObjectKind::Service, services));
    controller.apply(ObjectEvent::Replaced(ObjectKind::EndpointSlice, slices));
    controller
}

fn reconcile(controller: &mut Controller, now: u64, fake: &mut Fake) -> Outcome {
    let outcome = controller.reconcile(now, fake).expect("a fake can be read");
    assert!(outcome.errors.is_empty(), "{:?}", outcome.errors);
    outcome
}

#[test]
fn nothing_is_written_before_both_lists() {
    let mut controller = Controller::new("here", ExternalMode::Snat, []);
    let mut fake = Fake::new(CAPACITY);
    controller.apply(ObjectEvent::Replaced(
        ObjectKind::Service,
        vec![service("a", None, "10.0.0.1", 80)],
    ));
    assert_eq!(reconcile(&mut controller, 0, &mut fake).ops, 0);
    assert_eq!(fake.take_writes(), Writes::default());
    controller.apply(ObjectEvent::Replaced(ObjectKind::EndpointSlice, Vec::new()));
    reconcile(&mut controller, 0, &mut fake);
    assert_eq!(fake.take_writes().upserts, 2);
}

#[test]
fn one_endpoint_of_a_thousand_is_at_most_four_writes() {
    let mut ips: Vec<String> =
        (0..1_000).map(|pod| format!("10.1.{}.{}", pod / 250, pod % 250 + 1)).collect();
    let services = vec![service("big", None, "10.0.0.1", 80)];
    let mut controller = listed(services, vec![slice("big", &ips)]);
    let mut fake = Fake::new(CAPACITY);
    reconcile(&mut controller, 0, &mut fake);
    fake.take_writes();
    let mut check = |ips: &[String], now| {
        controller.apply(ObjectEvent::Applied(slice("big", ips)));
        reconcile(&mut controller, now, &mut fake);
        let Writes { stores, published, upserts, deletes } = fake.take_writes();
        assert!(stores + published <= 4, "{stores} stores, {published} published");
        assert_eq!((upserts, deletes), (0, 0));
        let lengths: u32 = fake.services.iter().map(|service| service.cluster.length()).sum();
        // One entry is that of the address as a whole.
        assert_eq!(lengths as usize, ips.len() + 1);
    };
    let gone = ips.remove(500);
    check(&ips, 1);
    ips.push("10.2.0.1".to_owned());
    check(&ips, 2);
    ips[17] = gone;
    check(&ips, 3);
}

#[test]
#[expect(clippy::disallowed_methods, reason = "it prints how long each step takes")]
fn ten_thousand_services_take_one_system_call_for_each_frontend() {
    let name = |number: usize| format!("s{number}");
    let ip =
        |number: usize| format!("10.{}.{}.{}", number >> 16, (number >> 8) & 255, number & 255);
    let services = (0..10_000).map(|n| service(&name(n), None, &ip(n + 1), 80)).collect();
    let slices: Vec<_> = (0..10_000).map(|n| slice(&name(n), &pods(n, 10))).collect();
    let mut fake = Fake::new(CAPACITY);
    let start = Instant::now();
    let mut controller = listed(services, slices);
    let parsed = start.elapsed();
    let outcome = reconcile(&mut controller, 0, &mut fake);
    let total = start.elapsed();
    println!("10,000 x 10: parsed in {parsed:?}, all in {total:?}, {} ops", outcome.ops);
    assert_eq!(outcome.shortages, []);
    let writes = fake.take_writes();
    // Each Service has a frontend for its port and one for its address.
    assert_eq!((writes.upserts, writes.deletes), (20_000, 0));
    let expected = Counts { services: 20_000, frontends: 20_000, backends: 100_000 };
    assert_eq!(controller.counts(), expected);
    // A relist changes nothing, and neither does a restart.
    let mut next = listed(
        (0..10_000).map(|n| service(&name(n), None, &ip(n + 1), 80)).collect(),
        (0..10_000).map(|n| slice(&name(n), &pods(n, 10))).collect(),
    );
    let start = Instant::now();
    assert_eq!(reconcile(&mut next, 0, &mut fake).ops, 0);
    println!("10,000 x 10: adopted in {:?}", start.elapsed());
    next.apply(ObjectEvent::Applied(slice("s5", &pods(5, 9))));
    let start = Instant::now();
    let outcome = reconcile(&mut next, 1, &mut fake);
    println!("one endpoint: {:?}", start.elapsed());
    assert_eq!((outcome.services, outcome.ops), (1, 2));
}

#[test]
fn the_older_service_keeps_an_address_that_two_ask_for() {
    let young = service("a", Some("2026-02-01T00:00:00Z"), "10.0.0.1", 80);
    let old = service("b", Some("2026-01-01T00:00:00Z"), "10.0.0.1", 80);
    let mut fake = Fake::new(CAPACITY);
    let owner = |fake: &Fake| {
        let key = fake.frontends4.iter().find(|(key, _)| key.port.get() == 80);
        let name = fake.names[key.expect("a frontend").1.service as usize];
        String::from_utf8_lossy(&name.text[..name.length.into()]).into_owned()
    };
    let mut controller = listed(vec![young.clone()], Vec::new());
    reconcile(&mut controller, 0, &mut fake);
    assert_eq!(owner(&fake), "shop/a:http");
    controller.apply(ObjectEvent::Applied(old));
    let outcome = reconcile(&mut controller, 1, &mut fake);
    assert_eq!(owner(&fake), "shop/b:http");
    let texts: Vec<_> = outcome.refusals.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        ["Service shop/a, spec.ports: 10.0.0.1 port 80 belongs to the older Service shop/b"]
    );
    fake.take_writes();
    controller.apply(ObjectEvent::Applied(young));
    assert_eq!(reconcile(&mut controller, 2, &mut fake).refusals, []);
    assert_eq!(fake.take_writes(), Writes::default());
    let name = "shop/b".into();
    controller.apply(ObjectEvent::Deleted(ObjectKind::Service, name));
    reconcile(&mut controller, 3, &mut fake);
    assert_eq!((owner(&fake).as_str(), controller.conflicts().count()), ("shop/a:http", 0));
}

#[test]
fn a_service_that_does_not_fit_is_reported_and_programmed_once_there_is_room() {
    let capacity = Capacity { backends4: 6, ..CAPACITY };
    let mut fake = Fake::new(capacity);
    let services = vec![service("a", None, "10.0.0.1", 80), service("b", None, "10.0.0.2", 80)];
    let slices = vec![slice("a", &pods(1, 3)), slice("b", &pods(2, 4))];
    let mut controller = listed(services, slices);
    let outcome = reconcile(&mut controller, 0, &mut fake);
    let shortage = Shortage {
        service: "shop/b".into(),
        map: Map::Backends4,
        limit: 6,
        needed: 4,
        share: None,
    };
    assert!(shortage.message().contains("BACKENDS4 is full (6 entries)"));
    assert!(shortage.message().contains("--max-backends"));
    assert_eq!(outcome.shortages, [shortage]);
    assert_eq!(fake.frontends4.len(), 2);
    controller.apply(ObjectEvent::Deleted(ObjectKind::Service, "shop/a".into()));
    let mut now = 1;
    let mut outcome = reconcile(&mut controller, now, &mut fake);
    for _ in 0..4 {
        let Some(due) = outcome.next_due else { break };
        now = now.max(due);
        outcome = reconcile(&mut controller, now, &mut fake);
    }
    assert!(now >= GRACE, "room came before the grace period was over");
    assert_eq!(controller.shortages().count(), 0);
    assert_eq!(controller.counts(), Counts { services: 2, frontends: 2, backends: 4 });
}

#[test]
fn a_dataplane_that_fails_now_and_then_converges() {
    for seed in 1..20 {
        let mut fake =
            Fake::new(Capacity { slots: 4_096, backends4: 1_024, services: 256, ..CAPACITY });
        let name = |n: usize| format!("s{n}");
        let ranged = |n: usize, round: usize| {
            let ranges: Vec<_> =
                (0..(n + round) % 3).map(|net| format!("10.{}.0.0/16", net + round)).collect();
            let ports = json!([{ "name": "http", "port": 80, "nodePort": 30000 + n }]);
            let more = json!({ "loadBalancerSourceRanges": ranges, "ports": ports });
            load_balancer(&name(n), n as u8 + 1, more)
        };
        let services = (0..30).map(|n| ranged(n, 0));
        let slices = (0..30).map(|n| slice(&name(n), &pods(n, n % 7)));
        let mut controller = listed(services.collect(), slices.collect());
        controller.set_facts(node_ports_on(&["192.0.2.10"]));
        let mut now = 0;
        for round in 0..5 {
            fake.fail(10, seed * 77 + round);
            for n in 0..30 {
                let ips = pods(n, (n + round as usize) % 7);
                controller.apply(ObjectEvent::Applied(slice(&name(n), &ips)));
                controller.apply(ObjectEvent::Applied(ranged(n, round as usize)));
            }
            let mut tries = 0;
            while !controller
                .reconcile(now, &mut fake)
                .expect("a fake can be read")
                .errors
                .is_empty()
            {
                now += 300;
                tries += 1;
                assert!(tries < 200, "it does not converge");
            }
        }
        fake.fail(0, 1);
        let total: usize = (0..30).map(|n| (n + 4) % 7).sum();
        assert_eq!(controller.counts().backends, total);
        let mut afresh = Fake::new(CAPACITY);
        let services = (0..30).map(|n| ranged(n, 4));
        let slices = (0..30).map(|n| slice(&name(n), &pods(n, (n + 4) % 7)));
        let mut next = listed(services.collect(), slices.collect());
        next.set_facts(node_ports_on(&["192.0.2.10"]));
        reconcile(&mut next, 0, &mut afresh);
        assert_eq!(reached(&fake), reached(&afresh));
        assert_eq!(fake.settings, afresh.settings);
    }
}

#[test]
fn ranges_come_before_the_frontend_that_they_restrict_and_go_after_it() {
    let ranged =
        |ranges: &[&str]| load_balancer("a", 1, json!({ "loadBalancerSourceRanges": ranges }));
    let mut controller = listed(vec![ranged(&["10.0.0.0/8", "fd00::/8"])], Vec::new());
    let mut fake = Fake::new(CAPACITY);
    let mut check = |event: Option<ObjectEvent>, is_ranged: bool, expected: &[&str]| {
        if let Some(event) = event {
            controller.apply(event);
        }
        reconcile(&mut controller, 0, &mut fake);
        let mut of_kind = fake.frontends4.values().filter(|it| it.kind == FrontendKind::EXTERNAL);
        assert_eq!(of_kind.any(|it| it.flags == Frontend::RANGED), is_ranged);
        let state = fake.read_state().expect("a fake can be read");
        let found: Vec<_> = state.ranges().map(|(_, range)| range.to_string()).collect();
        assert_eq!(found, expected);
        // The next agent finds nothing to do.
        let mut next = Planner::adopt(&state, CAPACITY, GRACE);
        let draft = next.begin();
        assert_eq!(next.finish(draft).ops, []);
    };
    let applied = |ranges: &[&str]| Some(ObjectEvent::Applied(ranged(ranges)));
    check(None, true, &["10.0.0.0/8"]);
    check(applied(&["10.0.0.0/8", "10.1.0.0/16"]), true, &["10.0.0.0/8", "10.1.0.0/16"]);
    check(applied(&["192.0.2.0/24"]), true, &["192.0.2.0/24"]);
    check(applied(&[]), false, &[]);
    check(applied(&["192.0.2.0/24", "0.0.0.0/0"]), false, &[]);
    check(applied(&["192.0.2.0/24"]), true, &["192.0.2.0/24"]);
    check(Some(deleted("a")), false, &[]);
}

#[test]
fn ranges_that_do_not_fit_leave_the_service_as_it_was_until_there_is_room() {
    let ranged = |name: &str, number, ranges: &[&str]| {
        load_balancer(name, number, json!({ "loadBalancerSourceRanges": ranges }))
    };
    let services = vec![ranged("a", 1, &["10.0.0.0/8", "11.0.0.0/8"]), ranged("b", 2, &[])];
    let mut controller = listed(services, Vec::new());
    let mut fake = Fake::new(Capacity { ranges4: 3, ..CAPACITY });
    assert_eq!(reconcile(&mut controller, 0, &mut fake).shortages, []);
    controller.apply(ObjectEvent::Applied(ranged("b", 2, &["10.0.0.0/8", "11.0.0.0/8"])));
    let outcome = reconcile(&mut controller, 0, &mut fake);
    let shortage =
        Shortage { service: "shop/b".into(), map: Map::Ranges4, limit: 3, needed: 2, share: None };
    assert_eq!((outcome.shortages, outcome.ops), (vec![shortage], 0));
    assert_eq!(fake.ranges4.len(), 2);
    controller.apply(ObjectEvent::Applied(ranged("a", 1, &["10.0.0.0/8"])));
    let outcome = reconcile(&mut controller, 0, &mut fake);
    assert_eq!((controller.shortages().count(), outcome.next_due), (1, Some(0)));
    assert_eq!(reconcile(&mut controller, 0, &mut fake).fitting, ["shop/b".into()]);
    assert_eq!(controller.shortages().count(), 0);
    assert_eq!(fake.ranges4.len(), 3);
}

/// What every frontend leads to, in the order of frontends: its kind and flags, the
/// service port's name, ranges and backends.
fn reached(fake: &Fake) -> Vec<impl PartialEq + std::fmt::Debug + use<>> {
    let state = fake.read_state().expect("a fake can be read");
    let of = |frontend: &Frontend| {
        let service = frontend.service;
        let (entry, name) = (fake.services[service as usize], fake.names[service as usize]);
        let text = String::from_utf8_lossy(&name.text[..name.length.into()]).into_owned();
        let length = if name.protocol == 0 { 0 } else { entry.cluster.length() };
        let slots = (entry.cluster.start()..).take(length as usize);
        let mut backends: Vec<_> = slots
            .map(|slot| fake.backends4[fake.slots[slot as usize] as usize])
            .map(|backend| (backend.address.be32, backend.port.get()))
            .collect();
        backends.sort_unstable();
        let ranges = state.ranges().filter(|(index, _)| *index == service);
        let ranges: Vec<IpNet> = ranges.map(|(_, range)| range).collect();
        (frontend.kind.kind, frontend.flags, text, ranges, backends)
    };
    fake.frontends4.values().map(of).collect()
}
