use k8s_openapi::api::{core::v1, discovery::v1::EndpointSlice};
use serde_json::{Value, json};

use super::*;
use crate::{
    model::event::{Object, ObjectEvent},
    snapshot::Snapshot,
};

const V4: IpFamily = IpFamily::V4;
const V6: IpFamily = IpFamily::V6;

fn service(cluster_ips: &[&str]) -> Object {
    let object = json!({
        "metadata": { "namespace": "shop", "name": "cart", "uid": "u-1" },
        "spec": {
            "type": "LoadBalancer",
            "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 32000,
            "clusterIPs": cluster_ips,
            "ports": [{ "name": "http", "port": 80 }, { "name": "https", "port": 443 }],
        },
    });
    Object::Service(Box::new(serde_json::from_value::<v1::Service>(object).expect("a Service")))
}

fn slice(name: &str, family: &str, ports: &[u16], endpoints: &Value) -> Object {
    let port = |number: &u16| json!({ "name": format!("p{number}"), "port": number });
    let object = json!({
        "metadata": {
            "namespace": "shop",
            "name": name,
            "labels": { "kubernetes.io/service-name": "cart" },
        },
        "addressType": family,
        "endpoints": endpoints,
        "ports": ports.iter().map(port).collect::<Vec<_>>(),
    });
    let slice: EndpointSlice = serde_json::from_value(object).expect("an EndpointSlice");
    Object::EndpointSlice(Box::new(slice))
}

fn endpoint(ip: &str, node: &str, conditions: Value) -> Value {
    json!({ "addresses": [ip], "nodeName": node, "conditions": conditions })
}

fn ready(ip: &str, node: &str) -> Value {
    endpoint(ip, node, json!({ "ready": true, "serving": true, "terminating": false }))
}

fn counted(cluster_ips: &[&str], slices: Vec<Object>) -> BTreeMap<IpFamily, usize> {
    let mut snapshot = Snapshot::new("here", []);
    for object in slices.into_iter().chain([service(cluster_ips)]) {
        snapshot.apply(ObjectEvent::Applied(object));
    }
    let entry = snapshot.service("shop/cart").expect("a Service");
    let check = of_service(entry).expect("a health check");
    assert_eq!((check.port, &*check.uid), (32000, "u-1"));
    check.local_endpoints
}

#[test]
fn only_ready_endpoints_of_this_node_count() {
    for (conditions, node, expected) in [
        (json!({ "ready": true, "serving": true, "terminating": false }), "here", 1),
        (json!({}), "here", 1),
        (json!({ "ready": true, "serving": true, "terminating": false }), "there", 0),
        (json!({ "ready": false, "serving": false, "terminating": false }), "here", 0),
        (json!({ "ready": false, "serving": true, "terminating": true }), "here", 0),
        (json!({ "ready": false, "serving": true, "terminating": false }), "here", 0),
    ] {
        let endpoints = json!([endpoint("10.1.0.1", node, conditions.clone())]);
        let found = counted(&["10.0.0.1"], vec![slice("a", "IPv4", &[8080], &endpoints)]);
        assert_eq!(found, BTreeMap::from([(V4, expected)]), "{node} {conditions}");
    }
}

#[test]
fn an_address_counts_once_in_its_own_family() {
    let two = json!([ready("10.1.0.1", "here"), ready("10.1.0.2", "here")]);
    let again = json!([ready("10.1.0.2", "here"), ready("10.1.0.3", "there")]);
    let of_ipv6 = json!([ready("fd00::1", "here")]);
    let slices = || {
        vec![
            slice("a", "IPv4", &[8080, 8443], &two),
            slice("b", "IPv4", &[8080], &again),
            slice("c", "IPv6", &[8080], &of_ipv6),
        ]
    };
    assert_eq!(counted(&["10.0.0.1", "fd00::f"], slices()), BTreeMap::from([(V4, 2), (V6, 1)]));
    assert_eq!(counted(&["fd00::f"], slices()), BTreeMap::from([(V6, 1)]));
    assert_eq!(counted(&["10.0.0.1", "fd00::f"], vec![]), BTreeMap::from([(V4, 0), (V6, 0)]));
    let without_port = vec![slice("a", "IPv4", &[], &two)];
    assert_eq!(counted(&["10.0.0.1"], without_port), BTreeMap::from([(V4, 0)]));
}

fn check(port: u16, created: Option<&str>, families: &[IpFamily]) -> Check {
    Check {
        uid: "".into(),
        created: created.map(|text| text.parse().expect("a time")),
        port,
        local_endpoints: families.iter().map(|family| (*family, 1)).collect(),
    }
}

#[track_caller]
fn check_layout(
    checks: &[(&str, Check)],
    addresses: &[&str],
    listeners: &[(&str, &str)],
    conflicts: &[(&str, &str)],
) {
    let wanted = Wanted {
        checks: checks.iter().map(|(name, check)| (Arc::from(*name), check.clone())).collect(),
        addresses: addresses.iter().map(|text| text.parse().expect("an address")).collect(),
    };
    let layout = wanted.layout();
    let found: Vec<_> =
        layout.listeners.iter().map(|(address, name)| (address.to_string(), &**name)).collect();
    let expected: Vec<_> =
        listeners.iter().map(|(address, name)| ((*address).to_owned(), *name)).collect();
    assert_eq!(found, expected);
    let found: Vec<_> =
        layout.conflicts.iter().map(|(loser, owner)| (&**loser, &**owner)).collect();
    assert_eq!(found, conflicts);
}

#[test]
fn every_service_listens_on_the_addresses_of_its_families() {
    check_layout(
        &[("a/both", check(1, None, &[V4, V6])), ("a/four", check(2, None, &[V4]))],
        &["192.0.2.1", "127.0.0.1", "2001:db8::1"],
        &[
            ("127.0.0.1:1", "a/both"),
            ("127.0.0.1:2", "a/four"),
            ("192.0.2.1:1", "a/both"),
            ("192.0.2.1:2", "a/four"),
            ("[2001:db8::1]:1", "a/both"),
        ],
        &[],
    );
    check_layout(&[("a/both", check(1, None, &[V4, V6]))], &[], &[], &[]);
}

#[test]
fn a_port_that_two_ask_for_is_the_older_one_s() {
    let old = Some("2025-01-01T00:00:00Z");
    let new = Some("2026-01-01T00:00:00Z");
    let address = ["192.0.2.1"];
    let a = |created| ("a/a", check(1, created, &[V4]));
    let b = |created| ("a/b", check(1, created, &[V4]));
    let (a_has_it, b_has_it) = (&[("192.0.2.1:1", "a/a")], &[("192.0.2.1:1", "a/b")]);
    check_layout(&[a(old), b(new)], &address, a_has_it, &[("a/b", "a/a")]);
    check_layout(&[a(new), b(old)], &address, b_has_it, &[("a/a", "a/b")]);
    check_layout(&[a(None), b(old)], &address, b_has_it, &[("a/a", "a/b")]);
    check_layout(&[a(None), b(None)], &address, a_has_it, &[("a/b", "a/a")]);
    check_layout(
        &[a(None), ("a/b", check(1, None, &[V6]))],
        &["192.0.2.1", "2001:db8::1"],
        &[("192.0.2.1:1", "a/a"), ("[2001:db8::1]:1", "a/b")],
        &[],
    );
}

#[test]
fn a_family_that_is_allowed_as_a_whole_is_listened_on_as_a_whole() {
    let own = ["192.0.2.1", "127.0.0.1", "2001:db8::1", "::1"];
    for (selected, expected) in [
        ("primary", &own[..]),
        ("192.0.2.0/24,127.0.0.0/8,::/0", &["192.0.2.1", "127.0.0.1", "::"]),
        ("0.0.0.0/0,2001:db8::/32,::1/128", &["0.0.0.0", "2001:db8::1", "::1"]),
        ("0.0.0.0/0,::/0", &["0.0.0.0", "::"]),
    ] {
        let ips = |texts: &[&str]| -> BTreeSet<IpAddr> {
            texts.iter().map(|text| text.parse().expect("an address")).collect()
        };
        let selected = selected.parse().expect("a value of the flag");
        assert_eq!(listen_addresses(&selected, &ips(&own)), ips(expected));
    }
    let whole = "0.0.0.0/0".parse().expect("a value of the flag");
    assert!(listen_addresses(&whole, &BTreeSet::new()).is_empty());
}

#[test]
fn an_answer_is_good_with_an_endpoint_and_a_healthy_proxy() {
    let wanted = Wanted {
        checks: Checks::from([("a/b".into(), check(1, None, &[V4]))]),
        addresses: BTreeSet::new(),
    };
    for (service, family, is_proxy_healthy, count, is_good) in [
        ("a/b", V4, true, 1, true),
        ("a/b", V4, false, 1, false),
        ("a/b", V6, true, 0, false),
        ("a/gone", V4, true, 0, false),
    ] {
        let answer = wanted.answer(service, family, is_proxy_healthy);
        assert_eq!(answer, Answer { local_endpoints: count, is_proxy_healthy });
        assert_eq!(answer.is_good(), is_good);
    }
}

#[test]
fn the_body_has_tabs_and_no_last_newline() {
    let answer = Answer { local_endpoints: 12, is_proxy_healthy: false };
    let expected = "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"cart\"\n\t},\n\
                    \t\"localEndpoints\": 12,\n\t\"serviceProxyHealthy\": false\n}";
    assert_eq!(answer.body("shop/cart"), expected);
}
