use serde_json::{Value, json};

use super::*;

fn parsed(spec: Value) -> Parsed<Service> {
    let object = json!({ "metadata": { "namespace": "shop", "name": "cart" }, "spec": spec });
    parse(&serde_json::from_value(object).expect("a Service"), &Limits::default())
}

fn service(spec: Value) -> Service {
    let parsed = parsed(spec);
    assert_eq!(parsed.refusals, []);
    parsed.value.expect("a service with frontends")
}

#[track_caller]
fn check_refused(spec: Value, expected: &[&str], ports: &[u16]) {
    let parsed = parsed(spec);
    let refusals: Vec<_> = parsed.refusals.iter().map(ToString::to_string).collect();
    assert_eq!(refusals, expected);
    let ports_left: Vec<_> =
        parsed.value.iter().flat_map(|service| &service.ports).map(|port| port.number).collect();
    assert_eq!(ports_left, ports);
}

#[test]
fn an_object_without_defaults_is_enough() {
    let service = service(json!({ "clusterIP": "10.0.0.1", "ports": [{ "port": 80 }] }));
    assert_eq!(&*service.name, "shop/cart");
    assert_eq!(service.cluster_ips, [IpAddr::from([10, 0, 0, 1])]);
    let port = Port { name: "".into(), number: 80, protocol: Protocol::Tcp, node_port: None };
    assert_eq!(service.ports, [port]);
    assert_eq!((service.affinity_seconds, service.policy), (0, Policy::default()));
}

#[test]
fn an_annotation_says_how_clients_outside_reach_other_nodes() {
    let check = |annotations: Value, expected: Option<ExternalMode>, refused: &[&str]| {
        let object = json!({
            "metadata": { "namespace": "shop", "name": "cart", "annotations": annotations },
            "spec": { "clusterIP": "10.0.0.1", "ports": [{ "port": 80 }] },
        });
        let parsed = parse(&serde_json::from_value(object).expect("a Service"), &Limits::default());
        let refusals: Vec<_> = parsed.refusals.iter().map(ToString::to_string).collect();
        assert_eq!(refusals, refused);
        assert_eq!(parsed.value.expect("a service with frontends").external_mode, expected);
    };
    let annotation = |value: &str| json!({ "lb-agent/external-mode": value });
    check(json!({}), None, &[]);
    check(annotation("snat"), Some(ExternalMode::Snat), &[]);
    check(annotation("dsr"), Some(ExternalMode::Dsr), &[]);
    let refused = "Service shop/cart, metadata.annotations[lb-agent/external-mode]: \
                   \"DSR\" is neither snat nor dsr; what --external-mode says is used";
    check(annotation("DSR"), None, &[refused]);
}

#[test]
fn what_is_no_business_of_the_proxy_gives_nothing() {
    for spec in [
        json!({ "clusterIP": "None", "ports": [{ "port": 80 }] }),
        json!({ "clusterIP": "", "ports": [{ "port": 80 }] }),
        json!({ "ports": [{ "port": 80 }] }),
        json!({ "clusterIPs": ["None"] }),
        json!({ "clusterIP": "10.0.0.1", "type": "ExternalName", "externalName": "a.b" }),
    ] {
        assert_eq!(parsed(spec), Parsed { value: None, refusals: Vec::new() });
    }
    let object = json!({
        "metadata": { "name": "cart", "labels": { PROXY_NAME_LABEL: "other" } },
        "spec": { "clusterIP": "10.0.0.1", "ports": [{ "port": 80 }] },
    });
    let object = serde_json::from_value(object).expect("a Service");
    assert_eq!(parse(&object, &Limits::default()), Parsed { value: None, refusals: Vec::new() });
}

#[test]
fn both_families_and_one_port_number_with_both_protocols() {
    let service = service(json!({
        "clusterIP": "10.0.0.1",
        "clusterIPs": ["10.0.0.1", "fd00::1"],
        "ports": [
            { "name": "dns", "port": 53, "protocol": "UDP" },
            { "name": "dns-tcp", "port": 53, "protocol": "TCP" },
        ],
    }));
    assert_eq!(service.cluster_ips.len(), 2);
    assert_eq!(service.ports.len(), 2);
}

#[test]
fn a_service_without_ports_still_has_its_address() {
    assert_eq!(service(json!({ "clusterIP": "10.0.0.1" })).ports, []);
}

#[test]
fn a_bad_port_never_costs_the_others() {
    check_refused(
        json!({
            "clusterIP": "10.0.0.1",
            "ports": [
                { "name": "a", "port": 80 },
                { "name": "b", "port": 81, "protocol": "SCTP" },
                { "name": "c", "port": 0 },
                { "name": "d", "port": 70000 },
                { "name": "e", "port": 80 },
                { "name": "a", "port": 82 },
                { "name": "no:colon", "port": 83 },
                { "name": "f", "port": 80, "protocol": "UDP" },
            ],
        }),
        &[
            "Service shop/cart, spec.ports[1].protocol: protocol \"SCTP\" is not supported, only TCP and UDP are",
            "Service shop/cart, spec.ports[2].port: 0 is not a port number (1 to 65535)",
            "Service shop/cart, spec.ports[3].port: 70000 is not a port number (1 to 65535)",
            "Service shop/cart, spec.ports[4].port: 80 is the number of an earlier port of the same protocol",
            "Service shop/cart, spec.ports[5].name: \"a\" is the name of an earlier port of the same protocol",
            "Service shop/cart, spec.ports[6].name: \"no:colon\" is not a port name",
        ],
        &[80, 80],
    );
}

#[test]
fn a_bad_address_never_costs_the_other() {
    check_refused(
        json!({ "clusterIPs": ["10.0.0.256", "fd00::1"], "ports": [{ "port": 80 }] }),
        &["Service shop/cart, spec.clusterIPs[0]: \"10.0.0.256\" is not an IP address"],
        &[80],
    );
    check_refused(
        json!({ "clusterIPs": ["10.0.0.1", "10.0.0.2"], "ports": [{ "port": 80 }] }),
        &["Service shop/cart, spec.clusterIPs[1]: 10.0.0.2 is a second ClusterIP of IPv4"],
        &[80],
    );
    check_refused(
        json!({ "clusterIP": "127.0.0.1", "ports": [{ "port": 80 }] }),
        &["Service shop/cart, spec.clusterIP: \"127.0.0.1\" is a loopback address"],
        &[80],
    );
}

#[test]
fn affinity_has_a_default_and_limits() {
    let spec = |timeout: Value| {
        json!({
            "clusterIP": "10.0.0.1",
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": { "clientIP": timeout },
        })
    };
    assert_eq!(service(spec(json!({ "timeoutSeconds": 7 }))).affinity_seconds, 7);
    assert_eq!(service(spec(json!({}))).affinity_seconds, 10_800);
    let parsed = parsed(spec(json!({ "timeoutSeconds": 0 })));
    assert_eq!(parsed.value.map(|service| service.affinity_seconds), Some(10_800));
    assert_eq!(parsed.refusals.len(), 1);
}

#[test]
fn policies_and_what_makes_a_service_reachable_from_outside() {
    let policy = |spec: Value| service(spec).policy;
    assert!(
        policy(json!({ "clusterIP": "10.0.0.1", "internalTrafficPolicy": "Local" })).internal_local
    );
    let node_port = json!({
        "clusterIP": "10.0.0.1",
        "externalTrafficPolicy": "Local",
        "ports": [{ "port": 80, "nodePort": 30080 }],
    });
    let expected =
        Policy { external_local: true, externally_reachable: true, internal_local: false };
    assert_eq!(policy(node_port), expected);
    assert!(
        policy(json!({ "clusterIP": "10.0.0.1", "externalIPs": ["1.2.3.4"] })).externally_reachable
    );
}

#[test]
fn only_a_load_balancer_with_local_policy_has_a_health_check_port() {
    let spec = |kind: &str, policy: &str, port: Value| {
        json!({
            "clusterIP": "10.0.0.1",
            "type": kind,
            "externalTrafficPolicy": policy,
            "healthCheckNodePort": port,
        })
    };
    for (kind, policy, port, expected) in [
        ("LoadBalancer", "Local", json!(32000), Some(32000)),
        ("LoadBalancer", "Local", json!(0), None),
        ("LoadBalancer", "Local", json!(null), None),
        ("LoadBalancer", "Cluster", json!(32000), None),
        ("NodePort", "Local", json!(32000), None),
    ] {
        let found = service(spec(kind, policy, port.clone())).health_check_node_port;
        assert_eq!(found, expected, "{kind} {policy} {port}");
    }
    check_refused(
        spec("LoadBalancer", "Local", json!(70000)),
        &["Service shop/cart, spec.healthCheckNodePort: 70000 is not a port number (1 to 65535)"],
        &[],
    );
}

/// What is left of the addresses and ranges of a load balancer's Service, and what was
/// refused.
#[track_caller]
fn check_outside(spec: Value, ingress: Value, expected: [&[&str]; 3], refused: &[&str]) {
    let mut spec = spec;
    spec["clusterIP"] = json!("10.0.0.1");
    let object = json!({
        "metadata": { "namespace": "shop", "name": "cart" },
        "spec": spec,
        "status": { "loadBalancer": { "ingress": ingress } },
    });
    let parsed = parse(&serde_json::from_value(object).expect("a Service"), &Limits::default());
    let service = parsed.value.expect("a service with frontends");
    let texts = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>();
    let ranges: Vec<_> = service.source_ranges.iter().map(ToString::to_string).collect();
    let found = [texts(&service.load_balancer_ips), texts(&service.external_ips), ranges];
    assert_eq!(found, expected);
    assert_eq!(service.policy.externally_reachable, !found[0].is_empty() || !found[1].is_empty());
    let refusals: Vec<_> = parsed.refusals.iter().map(ToString::to_string).collect();
    assert_eq!(refusals, refused);
}

#[test]
fn a_load_balancer_s_addresses_count_where_its_packets_arrive_as_they_are() {
    let load_balancer = json!({ "type": "LoadBalancer" });
    let ingress = json!([
        { "ip": "192.0.2.1" },
        { "ip": "192.0.2.2", "ipMode": "VIP" },
        { "ip": "192.0.2.3", "ipMode": "Proxy" },
        { "hostname": "lb.example" },
        { "ip": "" },
        { "ip": "2001:db8::1", "ipMode": "" },
        { "ip": "192.0.2.1" },
    ]);
    let expected = ["192.0.2.1", "192.0.2.2", "2001:db8::1"];
    check_outside(load_balancer.clone(), ingress.clone(), [&expected, &[], &[]], &[]);
    check_outside(json!({ "type": "NodePort" }), ingress, [&[], &[], &[]], &[]);
    let bad = json!([{ "ip": "192.0.2.1" }, { "ip": "192.0.2" }]);
    let refused =
        "Service shop/cart, status.loadBalancer.ingress[1].ip: \"192.0.2\" is not an IP address";
    check_outside(load_balancer, bad, [&["192.0.2.1"], &[], &[]], &[refused]);
}

#[test]
fn external_ips_and_ranges_are_checked_one_by_one() {
    let spec = json!({
        "externalIPs": ["198.51.100.1", "127.0.0.1", "2001:db8::2", "198.51.100.1", "x"],
        "loadBalancerSourceRanges": [" 10.1.2.3/8 ", "10.0.0.0/8", "1.2.3.4", "2001:db8::/32\t"],
    });
    check_outside(
        spec,
        json!([]),
        [&[], &["198.51.100.1", "2001:db8::2"], &["10.0.0.0/8", "2001:db8::/32"]],
        &[
            "Service shop/cart, spec.externalIPs[1]: \"127.0.0.1\" is a loopback address",
            "Service shop/cart, spec.externalIPs[4]: \"x\" is not an IP address",
            "Service shop/cart, spec.loadBalancerSourceRanges[2]: \"1.2.3.4\" is not an IP prefix",
        ],
    );
}

#[test]
fn node_ports_are_those_that_were_allocated() {
    let spec = json!({
        "clusterIP": "10.0.0.1",
        "type": "LoadBalancer",
        "ports": [
            { "name": "a", "port": 80, "nodePort": 30080 },
            { "name": "b", "port": 80, "nodePort": 30080, "protocol": "UDP" },
            { "name": "c", "port": 81, "nodePort": 0 },
            { "name": "d", "port": 82 },
            { "name": "e", "port": 83, "nodePort": 30080 },
            { "name": "f", "port": 84, "nodePort": 65536 },
        ],
    });
    let parsed = parsed(spec);
    let ports = parsed.value.expect("a service").ports;
    let node_ports: Vec<_> =
        ports.iter().map(|port| port.node_port.map_or(0, NonZeroU16::get)).collect();
    assert_eq!(node_ports, [30080, 30080, 0, 0, 0, 0]);
    let refusals: Vec<_> = parsed.refusals.iter().map(ToString::to_string).collect();
    let expected = [
        "Service shop/cart, spec.ports[4].nodePort: 30080 is the node port of an earlier port of the same protocol",
        "Service shop/cart, spec.ports[5].nodePort: 65536 is not a port number (1 to 65535)",
    ];
    assert_eq!(refusals, expected);
}
