//! Limits of what one Service may ask for.

use proptest::prelude::*;

use super::*;
use crate::options::Limit;

fn with_most(most: usize, mut change: impl FnMut(&mut Limits) -> &mut Limit) -> Limits {
    let mut limits = Limits::default();
    change(&mut limits).most = most;
    limits
}

#[test]
fn each_list_of_a_service_has_a_limit() {
    let rows: [(&str, Value, &str, Limits); 5] = [
        (
            "spec.ports",
            json!({ "ports": ports(4, false) }),
            "--max-service-ports",
            with_most(3, |limits| &mut limits.ports),
        ),
        (
            "spec.externalIPs",
            json!({ "externalIPs": addresses(20, 2) }),
            "--max-service-external-addresses",
            // The load balancer's address counts too.
            with_most(2, |limits| &mut limits.external_addresses),
        ),
        (
            "spec.loadBalancerSourceRanges",
            json!({ "loadBalancerSourceRanges": ["10.0.0.0/8", "nonsense", "10.0.0.0/8"] }),
            "--max-service-source-ranges",
            with_most(2, |limits| &mut limits.source_ranges),
        ),
        (
            "spec",
            // Three addresses, each with two ports and as a whole.
            json!({ "externalIPs": addresses(20, 1), "ports": ports(2, false) }),
            "--max-service-frontends",
            with_most(8, |limits| &mut limits.frontends),
        ),
        (
            "spec",
            // Two addresses as above, and four node ports.
            json!({ "ports": ports(4, true) }),
            "--max-service-frontends",
            with_most(13, |limits| &mut limits.frontends),
        ),
    ];
    for (field, more, flag, limits) in rows {
        let mut spec = json!({
            "type": "LoadBalancer", "clusterIP": "10.0.0.1", "ports": ports(1, false),
        });
        spec.as_object_mut().expect("an object").extend(more.as_object().expect("one").clone());
        let service = object("big", spec, vec![json!({ "ip": "203.0.113.1" })]);
        let parsed = parse(&service, &limits);
        let [refusal] = &parsed.refusals[..] else { panic!("{field}: {:?}", parsed.refusals) };
        assert!(parsed.value.is_none(), "{field}");
        assert_eq!((&*refusal.field, refusal.reason), (field, RefusalReason::TooLarge));
        assert!(refusal.message.contains(flag), "{}", refusal.message);
        // One more would be allowed.
        let mut roomier = limits;
        for limit in [
            &mut roomier.ports,
            &mut roomier.external_addresses,
            &mut roomier.source_ranges,
            &mut roomier.frontends,
        ] {
            limit.most += 1;
        }
        assert!(parse(&service, &roomier).value.is_some(), "{field}");
    }
}

#[test]
fn a_service_as_large_as_an_object_can_be_costs_no_more_than_its_length() {
    let spec = json!({
        "type": "LoadBalancer", "clusterIP": "10.0.0.1",
        "ports": ports(15_000, false), "externalIPs": addresses(20, 15_000),
    });
    let services =
        vec![Object::from(object("big", spec, Vec::new())), service("a", None, "10.0.0.2", 80)];
    let mut controller = listed(services, Vec::new());
    let mut fake = Fake::new(CAPACITY);
    let (steps, outcome) = crate::work::of(|| reconcile(&mut controller, 0, &mut fake));
    let reasons: Vec<_> = outcome.refusals.iter().map(|refusal| refusal.reason).collect();
    assert_eq!(reasons, [RefusalReason::TooLarge]);
    assert_eq!(controller.counts().frontends, 2, "the other one is served");
    assert!(steps < 100, "{steps} steps");
}

#[test]
fn a_served_service_that_becomes_too_large_is_withdrawn_as_a_whole() {
    let of_ports = |count| {
        let spec = json!({ "clusterIP": "10.0.0.1", "ports": ports(count, false) });
        ObjectEvent::Applied(Object::from(object("a", spec, Vec::new())))
    };
    let limits = with_most(3, |limits| &mut limits.ports);
    let mut controller = Controller::new("here", ExternalMode::Snat, []).with_limits(limits);
    controller.apply(ObjectEvent::Replaced(ObjectKind::Service, Vec::new()));
    controller.apply(ObjectEvent::Replaced(ObjectKind::EndpointSlice, Vec::new()));
    let mut fake = Fake::new(CAPACITY);
    for (count, frontends, refused) in [(3, 4, 0), (4, 0, 1), (4, 0, 0), (2, 3, 0)] {
        controller.apply(of_ports(count));
        let outcome = reconcile(&mut controller, 0, &mut fake);
        assert_eq!((fake.frontends4.len(), outcome.refusals.len()), (frontends, refused));
        // An agent that starts now decides the same.
        let mut next = Controller::new("here", ExternalMode::Snat, []).with_limits(limits);
        let ObjectEvent::Applied(service) = of_ports(count) else { panic!("no object") };
        next.apply(ObjectEvent::Replaced(ObjectKind::Service, vec![service]));
        next.apply(ObjectEvent::Replaced(ObjectKind::EndpointSlice, Vec::new()));
        assert_eq!(reconcile(&mut next, 0, &mut fake).ops, 0, "{count} ports");
    }
}

#[test]
fn a_service_with_too_many_backends_is_withdrawn_and_others_are_served() {
    let limits = with_most(6, |limits| &mut limits.backends);
    let mut controller = Controller::new("here", ExternalMode::Snat, []).with_limits(limits);
    let services = vec![service("a", None, "10.0.0.1", 80), service("b", None, "10.0.0.2", 80)];
    controller.apply(ObjectEvent::Replaced(ObjectKind::Service, services));
    let slices = vec![slice("a", &pods(1, 6)), slice("b", &pods(2, 3))];
    controller.apply(ObjectEvent::Replaced(ObjectKind::EndpointSlice, slices));
    let mut fake = Fake::new(CAPACITY);
    assert_eq!(reconcile(&mut controller, 0, &mut fake).refusals, []);
    for (pods, refused, counts) in [
        (pods(1, 7), 1, Counts { services: 2, frontends: 2, backends: 3 }),
        (pods(1, 8), 0, Counts { services: 2, frontends: 2, backends: 3 }),
        (pods(1, 6), 0, Counts { services: 4, frontends: 4, backends: 9 }),
    ] {
        controller.apply(ObjectEvent::Applied(slice("a", &pods)));
        let outcome = reconcile(&mut controller, 0, &mut fake);
        assert_eq!((outcome.refusals.len(), controller.counts()), (refused, counts));
        for refusal in outcome.refusals {
            assert_eq!(refusal.reason, RefusalReason::TooLarge);
            assert!(refusal.message.contains("--max-service-backends"), "{}", refusal.message);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Frontends and backends are made only of Services within the limits, and no more than were
    /// counted before.
    #[test]
    fn no_more_is_made_of_a_service_than_its_limits_allow(
        port_count in 0usize..60,
        external in 0usize..40,
        balanced in 0usize..40,
        ranges in 0usize..40,
        pod_count in 0usize..40,
        has_node_ports in any::<bool>(),
        is_dual_stack in any::<bool>(),
    ) {
        let mut limits = Limits { namespace_share: 100, ..Limits::default() };
        (limits.ports.most, limits.external_addresses.most) = (50, 60);
        (limits.frontends.most, limits.source_ranges.most, limits.backends.most) = (400, 30, 600);
        let ips = if is_dual_stack { vec!["10.0.0.1", "fd00::1"] } else { vec!["10.0.0.1"] };
        let spec = json!({
            "type": "LoadBalancer", "clusterIPs": ips, "ports": ports(port_count, has_node_ports),
            "externalIPs": addresses(20, external),
            "loadBalancerSourceRanges":
                addresses(30, ranges).iter().map(|ip| format!("{ip}/32")).collect::<Vec<_>>(),
        });
        let ingress = addresses(40, balanced).into_iter().map(|ip| json!({ "ip": ip })).collect();
        let big = object("big", spec, ingress);
        let on_nodes = 3;
        let mut node_ports = node_ports_on(&["192.0.2.1", "192.0.2.2"]);
        node_ports.node_port_addresses.insert("2001:db8::1".parse().expect("an address"));

        let is_within = port_count <= 50 && external + balanced <= 60 && ranges <= 30;
        let parsed = parse(&big, &limits);
        let counted = parsed.value.as_ref().map_or(0, |service| service.frontend_count());
        prop_assert!(counted <= limits.frontends.most);
        prop_assert!(is_within || parsed.value.is_none());

        let mut controller =
            Controller::new("here", ExternalMode::Snat, []).with_limits(limits);
        let mut endpoints = slice("big", &pods(1, pod_count));
        if let Object::EndpointSlice(slice) = &mut endpoints {
            let names = json!((0..port_count)
                .map(|n| json!({ "name": format!("p{n}"), "port": 8080 }))
                .collect::<Vec<_>>());
            slice.ports = serde_json::from_value(names).expect("ports");
        }
        controller.apply(ObjectEvent::Replaced(ObjectKind::Service, vec![big.into()]));
        controller.apply(ObjectEvent::Replaced(ObjectKind::EndpointSlice, vec![endpoints]));
        controller.set_facts(node_ports);
        let mut fake = Fake::new(Capacity { ranges4: 1 << 12, ranges6: 1 << 12, ..CAPACITY });
        let (steps, outcome) = crate::work::of(|| reconcile(&mut controller, 0, &mut fake));
        let Counts { frontends, backends, .. } = controller.counts();
        prop_assert!(frontends <= counted + on_nodes * port_count, "{frontends} {counted}");
        prop_assert!(backends <= limits.backends.most);
        let is_served = parsed.value.is_some() && port_count * pod_count <= 600;
        prop_assert_eq!(frontends > 0, is_served);
        prop_assert_eq!(
            outcome.refusals.iter().any(|it| it.reason == RefusalReason::TooLarge),
            !is_served
        );
        // Linear in the object, and in what is made of it.
        let length = port_count + external + balanced + ranges + pod_count;
        prop_assert!(steps <= 10 * (length + frontends + backends + 10), "{steps} steps");
    }
}
