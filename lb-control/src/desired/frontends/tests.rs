use serde_json::{Value, json};

use super::*;
use crate::{model::service::parse, options::Limits};

fn service(spec: Value, ingress: &[&str]) -> Service {
    let ingress: Vec<_> = ingress.iter().map(|ip| json!({ "ip": ip })).collect();
    let object = json!({
        "metadata": { "namespace": "shop", "name": "cart" },
        "spec": spec,
        "status": { "loadBalancer": { "ingress": ingress } },
    });
    let parsed = parse(&serde_json::from_value(object).expect("a Service"), &Limits::default());
    assert_eq!(parsed.refusals, []);
    parsed.value.expect("a service with frontends")
}

fn text(frontend: &DesiredFrontend) -> String {
    let FrontendAddress { ip, port, .. } = frontend.at;
    let kind = match frontend.kind {
        FrontendKind::CLUSTER_IP => "cluster ip",
        FrontendKind::NODE_PORT => "node port",
        FrontendKind::EXTERNAL => "external",
        _ => "something else",
    };
    let ranged = if frontend.is_ranged() { " ranged" } else { "" };
    format!("{ip} {port} {kind}{ranged}")
}

/// The frontends of each port, in both families.
#[track_caller]
fn check(spec: Value, ingress: &[&str], expected: &[&[&str]]) {
    let service = service(spec, ingress);
    let nodes = ["192.0.2.10", "127.0.0.1", "2001:db8::10", "::1"];
    let nodes = nodes.iter().map(|ip| ip.parse().expect("an address")).collect();
    let families = service.cluster_ips.iter();
    let found: Vec<Vec<String>> = families
        .flat_map(|ip| of_ports(&service, *ip, &nodes))
        .map(|port| port.iter().map(text).collect())
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn a_node_port_is_served_on_the_addresses_of_the_service_s_families() {
    let ports = json!([{ "port": 80, "nodePort": 30080 }]);
    check(
        json!({ "clusterIP": "10.0.0.1", "ports": ports }),
        &[],
        &[&[
            "0.0.0.0 30080 node port",
            "10.0.0.1 80 cluster ip",
            "127.0.0.1 30080 node port",
            "192.0.2.10 30080 node port",
        ]],
    );
    check(
        json!({ "clusterIPs": ["10.0.0.1", "fd00::1"], "ports": ports }),
        &[],
        &[
            &[
                "0.0.0.0 30080 node port",
                "10.0.0.1 80 cluster ip",
                "127.0.0.1 30080 node port",
                "192.0.2.10 30080 node port",
            ],
            &[
                ":: 30080 node port",
                "::1 30080 node port",
                "2001:db8::10 30080 node port",
                "fd00::1 80 cluster ip",
            ],
        ],
    );
}

#[test]
fn an_address_of_a_family_that_the_service_lacks_is_ignored() {
    let spec = json!({
        "type": "LoadBalancer", "clusterIP": "fd00::1", "ports": [{ "port": 80 }],
        "externalIPs": ["198.51.100.1", "2001:db8::7"],
    });
    let expected: &[&str] =
        &["2001:db8::7 80 external", "2001:db8::9 80 external", "fd00::1 80 cluster ip"];
    check(spec, &["203.0.113.9", "2001:db8::9"], &[expected]);
}

#[test]
fn ranges_restrict_the_load_balancer_s_addresses_of_their_family() {
    let spec = |ranges: Value| {
        json!({
            "type": "LoadBalancer", "clusterIPs": ["10.0.0.1", "fd00::1"],
            "ports": [{ "port": 80 }], "externalIPs": ["198.51.100.1", "203.0.113.9"],
            "loadBalancerSourceRanges": ranges,
        })
    };
    let open: &[&str] =
        &["10.0.0.1 80 cluster ip", "198.51.100.1 80 external", "203.0.113.9 80 external"];
    let restricted: &[&str] =
        &["10.0.0.1 80 cluster ip", "198.51.100.1 80 external", "203.0.113.9 80 external ranged"];
    let open6: &[&str] = &["2001:db8::9 80 external", "fd00::1 80 cluster ip"];
    let restricted6: &[&str] = &["2001:db8::9 80 external ranged", "fd00::1 80 cluster ip"];
    let ingress = ["203.0.113.9", "2001:db8::9"];
    check(spec(json!([])), &ingress, &[open, open6]);
    check(spec(json!(["10.0.0.0/8"])), &ingress, &[restricted, open6]);
    check(spec(json!(["2001:db8::/32"])), &ingress, &[open, restricted6]);
    check(spec(json!(["10.0.0.0/8", "0.0.0.0/0", "::/1"])), &ingress, &[open, restricted6]);
}

#[test]
fn two_ports_of_a_service_never_have_the_same_frontend() {
    let spec = json!({
        "clusterIP": "10.0.0.1", "externalIPs": ["192.0.2.10", "10.0.0.1"],
        "ports": [
            { "name": "a", "port": 80, "nodePort": 30080 },
            { "name": "b", "port": 30080, "nodePort": 30081 },
        ],
    });
    let first: &[&str] = &[
        "0.0.0.0 30080 node port",
        "10.0.0.1 80 cluster ip",
        "127.0.0.1 30080 node port",
        "192.0.2.10 80 external",
    ];
    let second: &[&str] = &[
        "0.0.0.0 30081 node port",
        "10.0.0.1 30080 cluster ip",
        "127.0.0.1 30081 node port",
        "192.0.2.10 30080 external",
        "192.0.2.10 30081 node port",
    ];
    check(spec, &[], &[first, second]);
}

#[test]
fn a_node_port_has_its_frontend_of_any_node_without_any_address_here() {
    let spec = json!({ "clusterIP": "fd00::1", "ports": [{ "port": 80, "nodePort": 30080 }] });
    let service = service(spec, &[]);
    let found = of_ports(&service, service.cluster_ips[0], &BTreeSet::new());
    let texts: Vec<_> = found.iter().flatten().map(text).collect();
    assert_eq!(texts, [":: 30080 node port", "fd00::1 80 cluster ip"]);
}

#[test]
fn a_node_that_is_let_in_is_so_from_the_load_balancer_s_address_too() {
    let spec = json!({
        "clusterIP": "10.0.0.1", "type": "LoadBalancer", "ports": [{ "port": 80 }],
        "loadBalancerSourceRanges": ["198.51.100.0/24", "192.0.2.0/28"],
    });
    let service = service(spec, &["203.0.113.9", "2001:db8::9"]);
    let found = |node: &[&str]| -> Vec<String> {
        let node = node.iter().map(|ip| ip.parse().expect("an address")).collect();
        let found = allowed_clients(&service, IpFamily::V4, &node);
        found.iter().map(ToString::to_string).collect()
    };
    assert_eq!(found(&["192.0.2.16"]), ["192.0.2.0/28", "198.51.100.0/24"]);
    assert_eq!(
        found(&["192.0.2.16", "192.0.2.10"]),
        ["192.0.2.0/28", "198.51.100.0/24", "203.0.113.9/32"]
    );
}
