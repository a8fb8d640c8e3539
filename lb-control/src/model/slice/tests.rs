use serde_json::{Value, json};

use super::*;

fn parsed(mut object: Value) -> Parsed<Slice> {
    object["metadata"] = json!({
        "namespace": "shop",
        "name": "cart-x",
        "labels": { SERVICE_LABEL: "cart" },
    });
    let object = serde_json::from_value(object).expect("an EndpointSlice");
    parse(&object, "here", &mut SharedNames::default())
}

fn slice(object: Value) -> Slice {
    let parsed = parsed(object);
    assert_eq!(parsed.refusals, []);
    parsed.value.expect("a slice with endpoints")
}

#[test]
fn absent_conditions_mean_ready_serving_and_not_terminating() {
    let slice = slice(json!({
        "addressType": "IPv4",
        "endpoints": [
            { "addresses": ["10.1.0.1", "10.1.0.9"] },
            { "addresses": ["10.1.0.2"], "nodeName": "here", "conditions": {} },
            { "addresses": ["10.1.0.3"], "conditions": { "ready": false, "terminating": true } },
        ],
        "ports": [{ "name": "", "port": 8080 }],
    }));
    let ready = Endpoint {
        address: [10, 1, 0, 1].into(),
        is_ready: true,
        is_serving: true,
        is_terminating: false,
        is_local: false,
        node: None,
        hints: None,
    };
    let local = Endpoint { address: [10, 1, 0, 2].into(), is_local: true, ..ready.clone() };
    let draining = Endpoint {
        address: [10, 1, 0, 3].into(),
        is_ready: false,
        is_terminating: true,
        ..ready.clone()
    };
    assert_eq!(&*slice.service, "shop/cart");
    assert_eq!(slice.endpoints, [ready, local, draining]);
}

#[test]
fn a_port_without_name_or_number_is_skipped() {
    let slice = slice(json!({
        "addressType": "IPv6",
        "endpoints": [],
        "ports": [{ "port": 1 }, { "name": "a" }, { "name": "b", "port": 0 },
                  { "name": "c", "port": 3, "protocol": "UDP" }, { "name": "d", "port": 4, "protocol": "SCTP" }],
    }));
    let expected = SlicePort { name: "c".into(), number: 3, protocol: Protocol::Udp };
    assert_eq!((slice.family, slice.ports), (IpFamily::V6, vec![expected]));
}

#[test]
fn a_bad_endpoint_never_costs_the_others() {
    let parsed = parsed(json!({
        "addressType": "IPv4",
        "endpoints": [
            { "addresses": ["nowhere"] },
            { "addresses": ["fd00::1"] },
            { "addresses": [] },
            { "addresses": ["0.0.0.0"] },
            { "addresses": ["10.1.0.1"] },
        ],
        "ports": [{ "name": "a", "port": 65536 }, { "name": "b", "port": 2 }],
    }));
    let refusals: Vec<_> = parsed.refusals.iter().map(ToString::to_string).collect();
    let object = "EndpointSlice shop/cart-x, ";
    assert_eq!(
        refusals,
        [
            format!("{object}ports[0].port: 65536 is not a port number (1 to 65535)"),
            format!("{object}endpoints[0].addresses[0]: \"nowhere\" is not an IP address"),
            format!("{object}endpoints[1].addresses[0]: fd00::1 is not an address of IPv4"),
            format!("{object}endpoints[2].addresses[0]: the endpoint has no address"),
            format!("{object}endpoints[3].addresses[0]: \"0.0.0.0\" is the unspecified address"),
        ]
    );
    let slice = parsed.value.expect("the rest of the slice");
    assert_eq!((slice.endpoints.len(), slice.ports.len()), (1, 1));
}

#[test]
fn slices_of_others_give_nothing() {
    let nothing = Parsed { value: None, refusals: Vec::new() };
    assert_eq!(parsed(json!({ "addressType": "FQDN", "endpoints": [] })), nothing);
    for labels in [json!({}), json!({ SERVICE_LABEL: "cart", HEADLESS_LABEL: "" })] {
        let object = json!({
            "metadata": { "name": "x", "labels": labels },
            "addressType": "IPv4",
            "endpoints": [],
        });
        let object = serde_json::from_value(object).expect("an EndpointSlice");
        assert_eq!(parse(&object, "here", &mut SharedNames::default()), nothing);
    }
}

#[test]
fn equal_hints_are_shared() {
    let hints = json!({ "forZones": [{ "name": "a" }], "forNodes": [{ "name": "here" }] });
    let slice = slice(json!({
        "addressType": "IPv4",
        "endpoints": [
            { "addresses": ["10.1.0.1"], "hints": hints },
            { "addresses": ["10.1.0.2"], "hints": hints },
            { "addresses": ["10.1.0.3"], "hints": {} },
        ],
    }));
    let hints = |at: usize| slice.endpoints[at].hints.as_ref();
    assert!(hints(0).zip(hints(1)).is_some_and(|(a, b)| Arc::ptr_eq(a, b)));
    assert_eq!(hints(0).map(|hints| (hints.zones.len(), hints.nodes.len())), Some((1, 1)));
    assert_eq!(hints(2), None);
}

#[test]
fn the_name_of_another_node_is_held_once() {
    let slice = slice(json!({
        "addressType": "IPv4",
        "endpoints": [
            { "addresses": ["10.1.0.1"], "nodeName": "there" },
            { "addresses": ["10.1.0.2"], "nodeName": "here" },
            { "addresses": ["10.1.0.3"], "nodeName": "there" },
            { "addresses": ["10.1.0.4"], "nodeName": "" },
            { "addresses": ["10.1.0.5"] },
        ],
    }));
    let nodes: Vec<_> = slice.endpoints.iter().map(|endpoint| endpoint.node.as_deref()).collect();
    assert_eq!(nodes, [Some("there"), None, Some("there"), None, None]);
    let node = |at: usize| slice.endpoints[at].node.as_ref();
    assert!(node(0).zip(node(2)).is_some_and(|(a, b)| Arc::ptr_eq(a, b)));
}
