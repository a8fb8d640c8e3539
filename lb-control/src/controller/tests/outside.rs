//! Clients outside the cluster: node ports, external addresses, and what nodes tunnel to each
//! other.

use lb_common::abi::{
    address::Be16,
    frontend::{FrontendKey, FrontendKind, TCP},
    service::Service,
    settings::PortRange,
};
use serde_json::json;

use super::*;

#[test]
fn node_ports_follow_the_addresses_of_the_node() {
    let ports = json!({ "ports": [{ "name": "http", "port": 80, "nodePort": 30080 }] });
    let services = vec![load_balancer("a", 1, ports), load_balancer("b", 2, json!({}))];
    let mut controller = listed(services, Vec::new());
    let mut fake = Fake::new(CAPACITY);
    let mut check = |ips: &[&str], looked_at| {
        controller.set_facts(node_ports_on(ips));
        let outcome = reconcile(&mut controller, 0, &mut fake);
        assert_eq!(outcome.services, looked_at);
        let found = frontends(&fake, FrontendKind::NODE_PORT);
        assert_eq!(found, ips.iter().map(|ip| ((*ip).to_owned(), 30080)).collect::<Vec<_>>());
        let of_any_node = FrontendKey::of_any_node(Be16::new(30080), TCP);
        assert!(fake.frontends4.contains_key(&of_any_node));
        let settings = fake.settings;
        assert_eq!(settings.node_ports, PortRange { first: 30080, count: 1 });
        assert_eq!(settings.flags, Settings::EXTERNAL);
    };
    check(&["192.0.2.10"], 2);
    check(&["127.0.0.1", "192.0.2.11"], 1);
    check(&[], 1);
    check(&["192.0.2.11"], 1);
    check(&["192.0.2.11"], 0);
}

#[test]
fn an_external_ip_never_takes_a_node_port_from_another_service() {
    let node_port = json!({ "ports": [{ "name": "http", "port": 80, "nodePort": 30080 }] });
    let external = json!({
        "externalIPs": ["192.0.2.10"], "ports": [{ "name": "http", "port": 30080 }],
    });
    let mut controller =
        listed(vec![load_balancer("b", 2, node_port), load_balancer("a", 1, external)], Vec::new());
    controller.set_facts(node_ports_on(&["127.0.0.1", "192.0.2.10"]));
    let mut fake = Fake::new(CAPACITY);
    let outcome = reconcile(&mut controller, 0, &mut fake);
    let texts: Vec<_> = outcome.refusals.iter().map(ToString::to_string).collect();
    let expected =
        "Service shop/a, spec.ports: 192.0.2.10 port 30080 is a node port of Service shop/b";
    assert_eq!(texts, [expected]);
    let both = ["127.0.0.1", "192.0.2.10"].map(|ip| (ip.to_owned(), 30080));
    assert_eq!(frontends(&fake, FrontendKind::NODE_PORT), both);
    controller.apply(deleted("b"));
    reconcile(&mut controller, 1, &mut fake);
    assert_eq!(frontends(&fake, FrontendKind::NODE_PORT), []);
    let external = ["192.0.2.10", "203.0.113.1"].map(|ip| (ip.to_owned(), 30080));
    assert_eq!(frontends(&fake, FrontendKind::EXTERNAL), external);
    assert_eq!(controller.conflicts().count(), 0);
}

fn node(name: &str, ips: &[&str]) -> Object {
    let address = |ip: &&str| json!({ "type": "InternalIP", "address": ip });
    let addresses: Vec<_> = ips.iter().map(address).collect();
    let object = json!({ "metadata": { "name": name }, "status": { "addresses": addresses } });
    Object::Node(serde_json::from_value(object).expect("a Node"))
}

/// A load balancer whose packets of clients outside reach other nodes in this way.
fn of_mode(mode: Option<&str>) -> Object {
    let mut object = load_balancer("a", 1, json!({}));
    let mode = mode.map(|mode| ("lb-agent/external-mode".to_owned(), mode.to_owned()));
    object.metadata_mut().annotations = Some(mode.into_iter().collect());
    object
}

/// A slice with these endpoints, each on the node of the same position.
fn slice_on(service: &str, ips: &[String], nodes: &[Option<&str>]) -> Object {
    let Object::EndpointSlice(mut object) = slice(service, ips) else { panic!("no slice") };
    for (endpoint, node) in object.endpoints.iter_mut().flatten().zip(nodes) {
        endpoint.node_name = node.map(str::to_owned);
    }
    Object::EndpointSlice(object)
}

#[test]
fn backends_of_services_with_direct_return_have_the_address_of_their_node() {
    let nodes = [Some("one"), Some("here"), None, Some("two"), Some("one")];
    let services = vec![of_mode(Some("dsr")), service("b", None, "10.0.0.2", 80)];
    let slices = vec![
        slice_on("a", &pods(1, 5), &nodes),
        slice_on("b", &pods(2, 2), &[Some("one"), Some("two")]),
    ];
    let mut controller = listed(services, slices);
    // The last one's address is this node's: it is no matter which node it is said to be on.
    let addresses = [pods(1, 5)[4].parse().expect("an address")].into();
    controller.set_facts(NodeFacts { addresses, ..NodeFacts::default() });
    let mut fake = Fake::new(CAPACITY);
    reconcile(&mut controller, 0, &mut fake);
    let mut check = |event: ObjectEvent,
                     ops: usize,
                     looked_at: usize,
                     nodes: [[u8; 4]; 5],
                     all: &[&str]| {
        controller.apply(event);
        let outcome = reconcile(&mut controller, 0, &mut fake);
        assert_eq!((outcome.ops, outcome.services, outcome.nodes_left_out), (ops, looked_at, 0));
        let found: Vec<_> = fake.backends4[1..6].iter().map(|it| Ipv4Addr::from(it.node)).collect();
        assert_eq!(found, nodes.map(Ipv4Addr::from));
        let others = &fake.backends4[6..8];
        assert!(others.iter().all(|it| it.node == Address4::default()), "{others:?}");
        let held = fake.read_state().expect("a fake can be read");
        assert_eq!(held.nodes().map(|ip| ip.to_string()).collect::<Vec<_>>(), all);
        assert!(fake.backends4.iter().all(|backend| backend.generation == 0));
    };
    let (one, two, none) = ([192, 0, 2, 1], [192, 0, 2, 2], [0; 4]);
    let list = vec![node("one", &["fd00::1", "192.0.2.1"]), node("here", &["192.0.2.9"])];
    let all = ["192.0.2.1", "192.0.2.9", "fd00::1"];
    check(ObjectEvent::Replaced(ObjectKind::Node, list), 4, 1, [one, none, none, none, none], &all);
    let came = ObjectEvent::Applied(node("two", &["192.0.2.2"]));
    let all = ["192.0.2.1", "192.0.2.2", "192.0.2.9", "fd00::1"];
    check(came, 2, 1, [one, none, none, two, none], &all);
    let moved = ObjectEvent::Applied(node("one", &["192.0.2.3"]));
    let all = ["192.0.2.2", "192.0.2.3", "192.0.2.9"];
    check(moved, 4, 1, [[192, 0, 2, 3], none, none, two, none], &all);
    let gone = ObjectName { namespace: String::new(), name: "two".to_owned() };
    let all = ["192.0.2.3", "192.0.2.9"];
    let deleted = ObjectEvent::Deleted(ObjectKind::Node, gone);
    check(deleted, 2, 1, [[192, 0, 2, 3], none, none, none, none], &all);
    let same = ObjectEvent::Applied(node("one", &["192.0.2.3"]));
    check(same, 0, 0, [[192, 0, 2, 3], none, none, none, none], &all);
}

#[test]
fn all_nodes_are_needed_while_a_service_uses_direct_return() {
    let annotated = |mode: &str| of_mode(Some(mode));
    let mut fake = Fake::new(CAPACITY);
    let mut controller = listed(vec![annotated("dsr")], Vec::new());
    assert!(controller.uses_direct_return(), "before the first plan");
    reconcile(&mut controller, 0, &mut fake);
    assert!(controller.uses_direct_return());
    controller.apply(ObjectEvent::Applied(annotated("snat")));
    reconcile(&mut controller, 0, &mut fake);
    assert!(!controller.uses_direct_return());
    assert!(!listed(vec![annotated("snat")], Vec::new()).uses_direct_return());
}

#[test]
fn more_addresses_of_nodes_than_fit_cost_no_service() {
    let mut fake = Fake::new(Capacity { nodes4: 2, ..CAPACITY });
    let mut controller =
        listed(vec![service("a", None, "10.0.0.1", 80)], vec![slice("a", &pods(1, 3))]);
    controller.apply(ObjectEvent::Applied(node("one", &["192.0.2.1", "192.0.2.2", "192.0.2.3"])));
    let outcome = reconcile(&mut controller, 0, &mut fake);
    assert_eq!((outcome.nodes_left_out, outcome.shortages.len()), (1, 0));
    assert_eq!((fake.nodes4.len(), controller.counts().backends), (2, 3));
    assert_eq!(reconcile(&mut controller, 1, &mut fake).nodes_left_out, 1);
    controller.apply(ObjectEvent::Applied(node("one", &["192.0.2.3"])));
    assert_eq!(reconcile(&mut controller, 2, &mut fake).nodes_left_out, 0);
    assert_eq!(fake.nodes4.len(), 1);
}

/// Which Service has the node port 30080 on any node, and what is told.
#[track_caller]
fn check_node_port(controller: &mut Controller, fake: &mut Fake, owner: &str, told: &[&str]) {
    let outcome = reconcile(controller, 0, fake);
    let key = FrontendKey::of_any_node(Be16::new(30080), TCP);
    let name = fake.names[fake.frontends4[&key].service as usize];
    assert_eq!(String::from_utf8_lossy(&name.text[..name.length.into()]), owner);
    let texts: Vec<_> = outcome.refusals.iter().map(ToString::to_string).collect();
    assert_eq!(texts, told);
}

#[test]
fn a_node_port_that_two_ask_for_is_one_conflict() {
    let node_port = |name: &str, number: u8| {
        let ports = json!([{ "name": "http", "port": 80, "nodePort": 30080 }]);
        let ips = [format!("10.0.0.{number}"), format!("fd00::{number}")];
        load_balancer(name, number, json!({ "clusterIPs": ips, "ports": ports }))
    };
    let mut fake = Fake::new(CAPACITY);
    let mut controller = listed(vec![node_port("a", 2), node_port("b", 1)], Vec::new());
    let (b, told) = ("shop/b:http", "spec.ports: node port 30080 belongs to the older Service");
    controller.set_facts(node_ports_on(&["127.0.0.1", "192.0.2.10", "::1"]));
    check_node_port(&mut controller, &mut fake, b, &[&format!("Service shop/a, {told} shop/b")]);
    controller.set_facts(node_ports_on(&[]));
    check_node_port(&mut controller, &mut fake, b, &[]);
    controller.set_facts(node_ports_on(&["192.0.2.11"]));
    check_node_port(&mut controller, &mut fake, b, &[]);
    assert_eq!(controller.conflicts().count(), 1);
    controller.apply(ObjectEvent::Applied(node_port("b", 3)));
    let told = format!("Service shop/b, {told} shop/a");
    check_node_port(&mut controller, &mut fake, "shop/a:http", &[&told]);
    controller.apply(deleted("a"));
    check_node_port(&mut controller, &mut fake, b, &[]);
    assert_eq!(controller.conflicts().count(), 0);
}

#[test]
fn packets_of_clients_outside_are_encapsulated_if_flag_or_annotation_says_so() {
    let check = |flag: ExternalMode, rows: &[(Option<&str>, bool)]| {
        let mut controller = Controller::new("here", flag, []);
        controller
            .apply(ObjectEvent::Replaced(ObjectKind::EndpointSlice, vec![slice("a", &pods(1, 3))]));
        // Clients outside cannot reach it: nothing is encapsulated.
        let services = vec![service("b", None, "10.0.0.9", 80), of_mode(None)];
        controller.apply(ObjectEvent::Replaced(ObjectKind::Service, services));
        let mut fake = Fake::new(CAPACITY);
        reconcile(&mut controller, 0, &mut fake);
        fake.take_writes();
        for (mode, is_encapsulated) in rows {
            controller.apply(ObjectEvent::Applied(of_mode(*mode)));
            let outcome = reconcile(&mut controller, 0, &mut fake);
            let tunnelled = fake.services.iter().filter(|entry| entry.flags & Service::DSR != 0);
            assert_eq!(tunnelled.count(), usize::from(*is_encapsulated), "{flag:?} {mode:?}");
            assert_eq!(outcome.refusals.len(), usize::from(*mode == Some("none")));
            let Writes { upserts, deletes, published, .. } = fake.take_writes();
            assert_eq!((upserts, deletes, published), (0, 0, 0));
        }
    };
    let rows = [(None, false), (Some("dsr"), true), (Some("none"), false), (Some("snat"), false)];
    check(ExternalMode::Snat, &rows);
    let rows = [(None, true), (Some("snat"), false), (Some("none"), true), (Some("dsr"), true)];
    check(ExternalMode::Dsr, &rows);
}

/// The API servers, as endpoints of `default/kubernetes`.
fn api_servers(ips: &[&str]) -> Object {
    let endpoints: Vec<_> = ips.iter().map(|ip| json!({ "addresses": [ip] })).collect();
    let object = json!({
        "metadata": {
            "namespace": "default",
            "name": "kubernetes",
            "labels": { "kubernetes.io/service-name": "kubernetes" },
        },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{ "name": "https", "port": 6443 }],
    });
    let slice: EndpointSlice = serde_json::from_value(object).expect("an EndpointSlice");
    Object::EndpointSlice(Box::new(slice))
}

#[test]
fn no_service_gets_the_address_of_an_api_server() {
    let ports = json!({ "ports": [{ "name": "http", "port": 6443, "nodePort": 6443 }] });
    let mut controller = listed(vec![load_balancer("a", 9, ports)], Vec::new());
    controller.set_facts(node_ports_on(&["192.0.2.10"]));
    let mut fake = Fake::new(CAPACITY);
    // The address of the load balancer, and that of this node with the node port.
    for (servers, refused) in [
        (&["203.0.113.9"][..], &["203.0.113.9"][..]),
        (&["203.0.113.8", "192.0.2.10"], &["192.0.2.10"]),
        (&["203.0.113.8"], &[]),
        (&["203.0.113.9"], &["203.0.113.9"]),
    ] {
        controller.apply(ObjectEvent::Applied(api_servers(servers)));
        let outcome = reconcile(&mut controller, 0, &mut fake);
        let messages: Vec<_> =
            outcome.refusals.iter().map(|refusal| refusal.message.clone()).collect();
        assert_eq!(messages.len(), refused.len(), "{servers:?}: {messages:?}");
        for (message, ip) in messages.iter().zip(refused) {
            assert!(message.contains(ip) && message.contains("default/kubernetes"), "{message}");
        }
        let mut served = frontends(&fake, FrontendKind::EXTERNAL);
        served.extend(frontends(&fake, FrontendKind::NODE_PORT));
        let expected: Vec<_> = ["203.0.113.9", "192.0.2.10"]
            .into_iter()
            .filter(|ip| !refused.contains(ip))
            .map(|ip| (ip.to_owned(), 6443))
            .collect();
        assert_eq!(served, expected, "{servers:?}");
        // The ClusterIP stays.
        assert_eq!(frontends(&fake, FrontendKind::CLUSTER_IP).len(), 1);
    }
}

#[test]
fn a_cluster_ip_that_an_interface_holds_is_left_to_its_process() {
    let mut controller = listed(
        vec![load_balancer("a", 1, json!({})), load_balancer("b", 2, json!({}))],
        Vec::new(),
    );
    let mut fake = Fake::new(CAPACITY);
    let held = |ips: &[&str]| NodeFacts {
        held_addresses: ips.iter().map(|ip| ip.parse().expect("an address")).collect(),
        ..NodeFacts::default()
    };
    for (ips, left, served) in [
        (&["192.0.2.10", "10.0.0.1"][..], &["shop/a"][..], &["10.0.0.2"][..]),
        (&["10.0.0.1"], &[], &["10.0.0.2"]),
        (&["10.0.0.1", "10.0.0.2", "203.0.113.1"], &["shop/b"], &[]),
        (&[], &[], &["10.0.0.1", "10.0.0.2"]),
        (&["10.0.0.1"], &["shop/a"], &["10.0.0.2"]),
    ] {
        controller.set_facts(held(ips));
        let outcome = reconcile(&mut controller, 0, &mut fake);
        let names: Vec<&str> = outcome.left_to_processes.iter().map(|(name, _)| &**name).collect();
        assert_eq!(names, left, "{ips:?}");
        assert_eq!(outcome.refusals, []);
        for (kind, port) in [(FrontendKind::CLUSTER_IP, 80), (FrontendKind::CLUSTER_IP_ADDRESS, 0)]
        {
            let expected: Vec<_> = served.iter().map(|ip| ((*ip).to_owned(), port)).collect();
            assert_eq!(frontends(&fake, kind), expected, "{ips:?}");
        }
        // A load balancer's address that the node holds is served: other machines may send to it.
        assert_eq!(frontends(&fake, FrontendKind::EXTERNAL).len(), 2);
    }
}
