//! What one tenant can ask for, and what it cannot take from others.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    model::{RefusalReason, service::parse},
    options::{Limit, Limits},
};

fn object(name: &str, spec: Value, ingress: Vec<Value>) -> v1::Service {
    let object = json!({
        "metadata": {
            "namespace": "shop", "name": name, "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": spec,
        "status": { "loadBalancer": { "ingress": ingress } },
    });
    serde_json::from_value(object).expect("a Service")
}

fn ports(count: usize, has_node_ports: bool) -> Vec<Value> {
    let port = |n: usize| {
        let node_port = if has_node_ports { 20_000 + n } else { 0 };
        json!({ "name": format!("p{n}"), "port": n + 1, "nodePort": node_port })
    };
    (0..count).map(port).collect()
}

fn addresses(first: u8, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{first}.{}.{}.{}", n >> 16, (n >> 8) & 255, n & 255)).collect()
}

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

/// Who serves each address and port of IPv4, but for addresses as a whole.
fn served(fake: &Fake) -> Vec<String> {
    let of_ports = fake.frontends4.iter().filter(|(key, _)| key.protocol != 0);
    let of_ports = of_ports.filter(|(key, _)| key.address != Address4::default());
    let mut found: Vec<_> = of_ports
        .map(|(key, frontend)| {
            let name = fake.names[frontend.service as usize];
            let name = String::from_utf8_lossy(&name.text[..name.length.into()]).into_owned();
            format!("{}:{} {name}", Ipv4Addr::from(key.address), key.port.get())
        })
        .collect();
    found.sort();
    found
}

fn texts(outcome: &Outcome) -> Vec<String> {
    outcome.refusals.iter().map(ToString::to_string).collect()
}

/// A Service of an age, with a spec.
fn aged(name: &str, day: u8, spec: Value, ingress: &[&str]) -> Object {
    let ingress = ingress.iter().map(|ip| json!({ "ip": ip })).collect();
    let mut object = object(name, spec, ingress);
    let created = format!("2026-01-{day:02}T00:00:00Z");
    object.metadata.creation_timestamp =
        Some(serde_json::from_value(json!(created)).expect("a time"));
    object.into()
}

#[test]
fn the_kind_of_a_claim_decides_before_the_age_of_the_service() {
    let port = |number: u16| json!([{ "name": "http", "port": number }]);
    // Each row: an older Service with the weaker claim to an address, a younger one with the
    // stronger claim, the address, and what the older one is told.
    let weak = json!({ "clusterIP": "10.0.0.1", "externalIPs": ["10.0.0.9"], "ports": port(80) });
    let cluster_ip = json!({ "clusterIP": "10.0.0.9", "ports": port(80) });
    let on_node = json!({
        "clusterIP": "10.0.0.1", "externalIPs": ["192.0.2.10"], "ports": port(30_080),
    });
    let node_port = json!({
        "type": "NodePort", "clusterIP": "10.0.0.2",
        "ports": [{ "name": "http", "port": 81, "nodePort": 30_080 }],
    });
    let external = json!({
        "clusterIP": "10.0.0.1", "externalIPs": ["203.0.113.9"], "ports": port(80),
    });
    let balanced = json!({ "type": "LoadBalancer", "clusterIP": "10.0.0.2", "ports": port(80) });
    type Row<'a> = (Value, &'a [&'a str], Value, &'a [&'a str], &'a str, &'a str);
    let rows: [Row<'_>; 4] = [
        (weak, &[], cluster_ip, &[], "10.0.0.9:80", "10.0.0.9 port 80 is a ClusterIP"),
        (
            on_node,
            &[],
            node_port.clone(),
            &[],
            "192.0.2.10:30080",
            "192.0.2.10 port 30080 is a node port",
        ),
        (
            external,
            &[],
            balanced.clone(),
            &["203.0.113.9"],
            "203.0.113.9:80",
            "203.0.113.9 port 80 is a load balancer address",
        ),
        (
            json!({ "type": "LoadBalancer", "clusterIP": "10.0.0.1", "ports": port(30_080) }),
            &["192.0.2.10"],
            node_port,
            &[],
            "192.0.2.10:30080",
            "192.0.2.10 port 30080 is a node port",
        ),
    ];
    for (weaker, of_weaker, stronger, of_stronger, at, told) in rows {
        let (old, young) =
            (aged("old", 1, weaker, of_weaker), aged("young", 2, stronger, of_stronger));
        let mut controller = listed(vec![old.clone()], Vec::new());
        controller.set_facts(node_ports_on(&["192.0.2.10"]));
        let mut fake = Fake::new(CAPACITY);
        reconcile(&mut controller, 0, &mut fake);
        assert!(served(&fake).contains(&format!("{at} shop/old:http")), "{at}");
        controller.apply(ObjectEvent::Applied(young.clone()));
        let outcome = reconcile(&mut controller, 0, &mut fake);
        assert!(served(&fake).contains(&format!("{at} shop/young:http")), "{at}");
        assert_eq!(
            texts(&outcome),
            [format!("Service shop/old, spec.ports: {told} of Service shop/young")]
        );
        // Whatever comes first, and after a restart.
        let mut other = listed(vec![young, old], Vec::new());
        other.set_facts(node_ports_on(&["192.0.2.10"]));
        assert_eq!(reconcile(&mut other, 0, &mut fake).ops, 0, "{at}");
        controller.apply(deleted("young"));
        assert_eq!(texts(&reconcile(&mut controller, 0, &mut fake)), [""; 0]);
        assert!(served(&fake).contains(&format!("{at} shop/old:http")), "{at}");
    }
}

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

fn service_cidr(prefix: &str) -> ObjectEvent {
    let object = json!({ "metadata": { "name": "services" }, "spec": { "cidrs": [prefix] } });
    let object: k8s_openapi::api::networking::v1::ServiceCIDR =
        serde_json::from_value(object).expect("a ServiceCIDR");
    ObjectEvent::Applied(object.into())
}

#[test]
fn addresses_of_a_service_cidr_are_for_cluster_ips_alone() {
    let spec = json!({
        "type": "LoadBalancer", "clusterIP": "10.0.0.1",
        "externalIPs": ["10.0.0.1", "10.0.0.7", "20.0.0.1"],
        "ports": [{ "name": "http", "port": 80 }, { "name": "dns", "port": 53 }],
    });
    let mut controller = listed(vec![aged("a", 1, spec, &["10.0.0.8"])], Vec::new());
    controller.apply(service_cidr("10.0.0.0/16"));
    let mut fake = Fake::new(CAPACITY);
    let outcome = reconcile(&mut controller, 0, &mut fake);
    let reasons: Vec<_> = outcome.refusals.iter().map(|refusal| refusal.reason).collect();
    assert_eq!(
        reasons,
        [RefusalReason::ForbiddenAddress; 2],
        "each address once, not its own ClusterIP"
    );
    for (refusal, ip) in outcome.refusals.iter().zip(["10.0.0.7", "10.0.0.8"]) {
        assert!(refusal.message.starts_with(&format!("{ip} is in a ServiceCIDR,")), "{refusal}");
    }
    let ips = |fake: &Fake| {
        let mut ips: Vec<_> =
            fake.frontends4.keys().map(|key| Ipv4Addr::from(key.address).to_string()).collect();
        ips.sort();
        ips.dedup();
        ips
    };
    assert_eq!(ips(&fake), ["10.0.0.1", "20.0.0.1"]);
    // It is told again only after it was right.
    assert_eq!(texts(&reconcile(&mut controller, 1, &mut fake)), [""; 0]);
    controller.apply(service_cidr("10.0.0.0/29"));
    assert_eq!(texts(&reconcile(&mut controller, 2, &mut fake)), [""; 0]);
    assert_eq!(ips(&fake), ["10.0.0.1", "10.0.0.8", "20.0.0.1"]);
}

#[test]
fn the_api_server_that_the_agent_asks_is_no_service_s() {
    let spec = json!({
        "clusterIP": "10.0.0.1", "externalIPs": ["192.0.2.1"],
        "ports": [{ "name": "https", "port": 6443 }, { "name": "http", "port": 80 }],
    });
    let mut controller = listed(vec![aged("a", 1, spec, &[])], Vec::new());
    let mut fake = Fake::new(CAPACITY);
    let server = |ip: &str| [(ip.parse().expect("an address"), 6443)].into();
    controller.set_api_servers(server("192.0.2.1"));
    let outcome = reconcile(&mut controller, 0, &mut fake);
    let own = ["10.0.0.1:6443 shop/a:https", "10.0.0.1:80 shop/a:http", "192.0.2.1:80 shop/a:http"];
    assert_eq!(served(&fake), own, "the other port of that address is served");
    assert_eq!(outcome.refusals.len(), 1);
    assert!(outcome.refusals[0].message.starts_with("192.0.2.1 port 6443 is an API server"));
    controller.set_api_servers(server("192.0.2.2"));
    reconcile(&mut controller, 1, &mut fake);
    assert!(served(&fake).contains(&"192.0.2.1:6443 shop/a:https".to_owned()));
}

#[test]
fn addresses_that_no_machine_can_reach_a_service_at_are_refused() {
    for (ip, why) in [
        ("127.0.0.1", "a loopback address"),
        ("::1", "a loopback address"),
        ("0.0.0.0", "the unspecified address"),
        ("::", "the unspecified address"),
        ("169.254.169.254", "a link-local address"),
        ("fe80::1", "a link-local address"),
        ("224.0.0.1", "a multicast address"),
        ("ff02::1", "a multicast address"),
        ("255.255.255.255", "the broadcast address"),
    ] {
        let spec = json!({
            "type": "LoadBalancer", "clusterIPs": ["10.0.0.1", "fd00::1"],
            "externalIPs": [ip], "ports": ports(1, false),
        });
        let parsed = parse(&object("a", spec, vec![json!({ "ip": ip })]), &Limits::default());
        let told: Vec<_> = parsed.refusals.iter().map(|refusal| &*refusal.message).collect();
        assert_eq!(told, vec![format!("\"{ip}\" is {why}"); 2]);
        let service = parsed.value.expect("the rest of it");
        assert_eq!((service.external_ips, service.load_balancer_ips), (Vec::new(), Vec::new()));
    }
}

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

#[test]
fn a_namespace_gets_its_share_of_every_map() {
    let endpoints = |count| {
        let Object::EndpointSlice(mut object) = slice("s1", &pods(1, count)) else {
            panic!("no slice")
        };
        object.metadata.namespace = Some("greedy".to_owned());
        if let Some(port) = object.ports.iter_mut().flatten().next() {
            port.name = Some("p0".to_owned());
        }
        Object::from(*object)
    };
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

#[test]
fn what_is_mended_is_told() {
    let name = || ObjectName { namespace: "shop".to_owned(), name: "a".to_owned() };
    let with = |ip: &str, protocol: &str| {
        let spec = json!({
            "clusterIP": "10.0.0.1", "externalIPs": [ip],
            "ports": [{ "name": "a", "port": 80 }, { "name": "b", "port": 81, "protocol": protocol }],
        });
        ObjectEvent::Applied(aged("a", 2, spec, &[]))
    };
    let mut controller = listed(
        vec![aged(
            "b",
            1,
            json!({ "clusterIP": "10.0.0.2", "externalIPs": ["20.0.0.2"], "ports": ports(80, false) }),
            &[],
        )],
        Vec::new(),
    );
    controller.apply(service_cidr("10.0.0.0/16"));
    let mut fake = Fake::new(CAPACITY);
    use RefusalReason::{AddressInUse, ForbiddenAddress, UnsupportedProtocol};
    for (event, reasons, is_mended) in [
        (with("20.0.0.1", "TCP"), vec![], false),
        (with("20.0.0.1", "SCTP"), vec![UnsupportedProtocol], false),
        (with("20.0.0.2", "SCTP"), vec![UnsupportedProtocol, AddressInUse], false),
        (with("10.0.0.9", "SCTP"), vec![UnsupportedProtocol, ForbiddenAddress], true),
        (with("10.0.0.9", "TCP"), vec![ForbiddenAddress], true),
        (with("20.0.0.1", "TCP"), vec![], true),
        (with("20.0.0.1", "SCTP"), vec![UnsupportedProtocol], false),
        // In a relist it is no longer there.
        (ObjectEvent::Replaced(ObjectKind::Service, Vec::new()), vec![], true),
    ] {
        controller.apply(event);
        let outcome = reconcile(&mut controller, 0, &mut fake);
        let found: Vec<_> =
            controller.refusal_reasons(ObjectKind::Service, &name()).into_iter().collect();
        assert_eq!(found, reasons);
        assert_eq!(
            outcome.mended.contains(&(ObjectKind::Service, name())),
            is_mended,
            "{reasons:?}"
        );
    }
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
