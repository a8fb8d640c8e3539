//! Which addresses a Service gets, and which none.

use super::*;

fn texts(outcome: &Outcome) -> Vec<String> {
    outcome.refusals.iter().map(ToString::to_string).collect()
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
fn a_conflict_of_three_names_the_owner_of_now() {
    let spec = json!({
        "clusterIP": "10.0.0.1", "externalIPs": ["203.0.113.9"],
        "ports": [{ "name": "http", "port": 80 }],
    });
    let services = [("a", 1), ("b", 2), ("c", 3)];
    let services = services.map(|(name, day)| aged(name, day, spec.clone(), &[]));
    let mut controller = listed(services.to_vec(), Vec::new());
    let mut fake = Fake::new(CAPACITY);
    reconcile(&mut controller, 0, &mut fake);
    let external = |controller: &Controller| -> Vec<String> {
        let of_external = controller
            .conflicts()
            .filter(|conflict| conflict.frontend.ip.to_string() == "203.0.113.9");
        of_external.map(|conflict| format!("{} to {}", conflict.service, conflict.owner)).collect()
    };
    assert_eq!(external(&controller), ["shop/b to shop/a", "shop/c to shop/a"]);
    controller.apply(deleted("a"));
    let (steps, outcome) = crate::work::of(|| reconcile(&mut controller, 1, &mut fake));
    assert_eq!(external(&controller), ["shop/c to shop/b"]);
    assert_eq!(outcome.services, 2, "the Service that is gone and the next owner ({steps} steps)");
    // If another event leads to a new plan for the waiting Service, its report names the present owner.
    controller.apply(ObjectEvent::Applied(slice("c", &pods(1, 1))));
    let told = texts(&reconcile(&mut controller, 2, &mut fake));
    let expected = ["10.0.0.1 port 80", "203.0.113.9 port 80"]
        .map(|at| format!("Service shop/c, spec.ports: {at} belongs to the older Service shop/b"));
    assert_eq!(told, expected);
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
    // Without a claim to the whole address, no packet of a pod to the API server is dropped.
    assert_eq!(frontends(&fake, FrontendKind::EXTERNAL_ADDRESS), []);
    controller.set_api_servers(server("192.0.2.2"));
    reconcile(&mut controller, 1, &mut fake);
    assert!(served(&fake).contains(&"192.0.2.1:6443 shop/a:https".to_owned()));
    assert_eq!(frontends(&fake, FrontendKind::EXTERNAL_ADDRESS), [("192.0.2.1".to_owned(), 0)]);
    // Every port of the Service is served there, so nothing is reported.
    controller.set_api_servers([("192.0.2.1".parse().expect("an address"), 8443)].into());
    let outcome = reconcile(&mut controller, 2, &mut fake);
    assert_eq!((texts(&outcome), served(&fake).len()), (Vec::new(), 4));
    assert_eq!(frontends(&fake, FrontendKind::EXTERNAL_ADDRESS), []);
    let name = ObjectName { namespace: "shop".to_owned(), name: "a".to_owned() };
    assert_eq!(controller.refusal_reasons(ObjectKind::Service, &name), [].into());
}

#[test]
fn an_external_ip_is_no_address_of_a_pod() {
    let ips = ["10.244.1.6", "10.244.2.1", "20.0.0.1"];
    let spec = json!({
        "type": "LoadBalancer", "clusterIP": "10.0.0.1", "externalIPs": ips,
        "ports": [{ "name": "http", "port": 80 }, { "name": "dns", "port": 53 }],
    });
    let mut controller = listed(vec![aged("a", 1, spec, &["10.244.3.9"])], Vec::new());
    let facts = |prefixes: &[&str], own: &[&str]| NodeFacts {
        addresses: own.iter().map(|ip| ip.parse().expect("an address")).collect(),
        pod_prefixes: prefixes.iter().map(|net| net.parse().expect("a prefix")).collect(),
        ..NodeFacts::default()
    };
    let mut fake = Fake::new(CAPACITY);
    // Each row: the prefixes of pods, the addresses of this node, the external IPs that are served,
    // and those that are newly refused. The load balancer's address is a controller's to choose.
    type Row<'a> = (&'a [&'a str], &'a [&'a str], &'a [&'a str], &'a [&'a str]);
    let pods = &["10.244.0.0/16"][..];
    let rows: [Row<'_>; 5] = [
        (&[], &[], &ips, &[]),
        (pods, &["10.244.2.1"], &["10.244.2.1", "20.0.0.1"], &["10.244.1.6"]),
        (pods, &[], &["20.0.0.1"], &["10.244.2.1"]),
        (pods, &[], &["20.0.0.1"], &[]),
        (&["fd00:244::/48"], &[], &ips, &[]),
    ];
    for (time, (prefixes, own, expected, refused)) in rows.into_iter().enumerate() {
        controller.set_facts(facts(prefixes, own));
        let outcome = reconcile(&mut controller, time as u64, &mut fake);
        let texts: Vec<_> = outcome.refusals.iter().map(|refusal| &*refusal.message).collect();
        assert_eq!(texts.len(), refused.len(), "{texts:?}");
        for (refusal, ip) in outcome.refusals.iter().zip(refused) {
            assert_eq!(refusal.reason, RefusalReason::ForbiddenAddress);
            assert_eq!(refusal.field, "spec.externalIPs");
            assert!(
                refusal.message.starts_with(&format!("{ip} is an address of pods")),
                "{texts:?}"
            );
        }
        let mut expected: Vec<_> = [&["10.244.3.9"], expected].concat();
        expected.sort_unstable();
        let whole = expected.iter().map(|ip| ((*ip).to_owned(), 0)).collect::<Vec<_>>();
        assert_eq!(frontends(&fake, FrontendKind::EXTERNAL_ADDRESS), whole);
        let with_ports =
            expected.iter().flat_map(|ip| [53, 80].map(|port| ((*ip).to_owned(), port)));
        assert_eq!(frontends(&fake, FrontendKind::EXTERNAL), with_ports.collect::<Vec<_>>());
    }
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

#[test]
fn what_is_resolved_is_reported() {
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
    for (event, reasons, is_resolved) in [
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
            outcome.resolved.contains(&(ObjectKind::Service, name())),
            is_resolved,
            "{reasons:?}"
        );
    }
}
