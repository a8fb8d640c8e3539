use super::*;
use crate::{desired::FrontendAddress, model::source_ports::may_be_drawn};

fn frontend(kind: FrontendKind, ip: &str, port: u16) -> DesiredFrontend {
    let ip = ip.parse().expect("an address");
    DesiredFrontend { at: FrontendAddress { ip, port, protocol: 6 }, kind, flags: 0 }
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().expect("a prefix")).collect()
}

fn in_use(frontends: &[DesiredFrontend]) -> InUse {
    let mut in_use = InUse::default();
    for frontend in frontends {
        in_use.add(frontend);
    }
    in_use
}

fn whole(ips: &[&str]) -> InUse {
    let kind = FrontendKind::CLUSTER_IP_ADDRESS;
    in_use(&ips.iter().map(|ip| frontend(kind, ip, 0)).collect::<Vec<_>>())
}

#[test]
fn more_node_addresses_than_fit_are_counted() {
    let addresses = (1..=9).map(|n| IpAddr::from([192, 168, 0, n])).collect();
    let facts = NodeFacts { addresses, ..NodeFacts::default() };
    let settings = settings(&facts, &[], &InUse::default(), &Settings::default());
    assert_eq!(settings.ipv4.node_address_count, 9);
    assert!(settings.ipv4.may_be_node(Ipv4Addr::new(1, 1, 1, 1).into()));
    assert_eq!(settings.ipv6.node_address_count, 0);
}

/// Flows of a Service that is gone go on: what let them in stays.
#[test]
fn the_gate_never_lets_in_less_than_before() {
    let facts = NodeFacts::default();
    let before = settings(&facts, &[], &whole(&["10.0.0.1", "fd00::1"]), &Settings::default());
    assert_eq!(service_prefixes::covered(&before), nets(&["10.0.0.1/32", "fd00::1/128"]));
    let after = settings(&facts, &[], &InUse::default(), &before);
    assert_eq!(service_prefixes::covered(&after), service_prefixes::covered(&before));
    let served = nets(&["10.0.0.0/16"]);
    let within = settings(&facts, &served, &InUse::default(), &after);
    assert_eq!(service_prefixes::covered(&within), nets(&["10.0.0.0/16", "fd00::1/128"]));
    let gone = settings(&facts, &[], &InUse::default(), &within);
    assert_eq!(service_prefixes::covered(&gone), service_prefixes::covered(&within));
    assert_eq!(gone.ipv4.service_cidr_count, 0);
}

#[test]
fn addresses_outside_the_cluster_pass_the_gate_and_node_ports_have_a_range() {
    let facts = NodeFacts { local_ports: (32_768, 60_999), ..NodeFacts::default() };
    let mut used = whole(&["10.0.0.1"]);
    let none = settings(&facts, &[], &InUse::default(), &Settings::default());
    assert_eq!(none.flags, 0);
    let inside = settings(&facts, &[], &used, &none);
    assert_eq!((inside.flags, inside.node_ports), (Settings::EXTERNAL, PortRange::default()));
    let external = frontend(FrontendKind::EXTERNAL, "203.0.113.9", 80);
    let node_port = frontend(FrontendKind::NODE_PORT, "192.0.2.10", 30_080);
    let other = frontend(FrontendKind::NODE_PORT, "192.0.2.10", 30_090);
    assert!(used.add(&external) && used.add(&node_port) && used.add(&other));
    assert!(!used.add(&node_port) && !used.remove(&node_port), "it is there twice");
    let outside = settings(&facts, &[], &used, &inside);
    assert_eq!(outside.flags, Settings::EXTERNAL);
    assert_eq!(outside.node_ports, PortRange { first: 30_080, count: 11 });
    // The address of the node has no need to.
    assert_eq!(service_prefixes::covered(&outside), nets(&["10.0.0.1/32", "203.0.113.9/32"]));
    assert!(!used.remove(&external) && used.remove(&node_port) && used.remove(&other));
    assert!(used.add(&frontend(FrontendKind::NODE_PORT, "192.0.2.10", 25_000)));
    let after = settings(&facts, &[], &used, &outside);
    assert_eq!(
        (after.flags, service_prefixes::covered(&after)),
        (outside.flags, service_prefixes::covered(&outside))
    );
    assert_eq!(after.node_ports, PortRange { first: 25_000, count: 5_091 });
    let gone = settings(&facts, &[], &InUse::default(), &after);
    assert_eq!((gone.flags, gone.node_ports), (after.flags, after.node_ports));
}

#[test]
fn a_node_port_of_any_node_is_no_address_but_a_port_and_a_reason_to_look_outside() {
    let mut used = whole(&["10.0.0.1"]);
    let any = frontend(FrontendKind::NODE_PORT, "0.0.0.0", 30_080);
    assert!(used.add(&any) && !used.add(&frontend(FrontendKind::NODE_PORT, "::", 30_080)));
    let settings = settings(&NodeFacts::default(), &[], &used, &Settings::default());
    assert_eq!(service_prefixes::covered(&settings), nets(&["10.0.0.1/32"]));
    assert_eq!(settings.node_ports, PortRange { first: 30_080, count: 1 });
    assert_eq!((settings.flags, settings.ipv4.node_address_count), (Settings::EXTERNAL, 0));
}

#[test]
fn the_first_frontend_is_news_because_clients_outside_may_reach_it() {
    let mut used = InUse::default();
    assert!(used.add(&frontend(FrontendKind::CLUSTER_IP, "10.0.0.1", 80)));
    assert!(!used.add(&frontend(FrontendKind::CLUSTER_IP, "10.0.0.1", 81)));
    assert!(used.add(&frontend(FrontendKind::EXTERNAL, "10.0.0.1", 80)), "a new address");
    assert!(!used.add(&frontend(FrontendKind::EXTERNAL, "10.0.0.1", 81)));
}

#[test]
fn every_port_may_be_a_node_port() {
    let kind = FrontendKind::NODE_PORT;
    let used = in_use(&[frontend(kind, "192.0.2.1", 1), frontend(kind, "192.0.2.1", 65_535)]);
    let range = node_ports(&used, PortRange::default());
    assert_eq!(range, PortRange { first: 1, count: 65_535 });
    assert_eq!(node_ports(&InUse::default(), range), range);
}

#[track_caller]
fn check_source_ports(local: (u16, u16), node_ports: &[u16], first: u16, count: u16) {
    let found = source_ports(local, node_ports.iter().copied());
    assert_eq!(found, PortRange { first, count });
}

#[test]
fn source_ports_are_the_longest_range_that_is_free() {
    check_source_ports((32_768, 60_999), &[], 1_024, 28_976);
    check_source_ports((32_768, 60_999), &[1_024, 30_080], 1_025, 28_975);
    check_source_ports((32_768, 60_999), &[20_000], 1_024, 18_976);
    check_source_ports((32_768, 60_999), &[10_000, 10_001], 10_002, 19_998);
    check_source_ports((1_024, 40_000), &[], 40_001, 25_535);
    check_source_ports((15_000, 65_535), &[], 1_024, 13_976);
    check_source_ports((10, 20), &[], 32_768, 32_768);
}

#[test]
fn a_short_range_of_source_ports_is_none() {
    check_source_ports((1_024, 65_535), &[], 0, 0);
    check_source_ports((2_024, 65_535), &[], 1_024, 1_000);
    check_source_ports((2_023, 65_535), &[], 0, 0);
    check_source_ports((2_100, 65_535), &[1_500], 0, 0);
}

#[test]
fn a_port_may_be_drawn_where_no_range_of_others_lies() {
    let local = (32_768, 60_999);
    for (port, is_drawn) in [
        (1_023, false),
        (1_024, true),
        (29_999, true),
        (30_000, false),
        (40_000, false),
        (61_000, true),
    ] {
        assert_eq!(may_be_drawn(port, local), is_drawn, "{port}");
    }
}

#[test]
fn prefixes_of_pods_are_kept_by_family() {
    let facts = NodeFacts {
        pod_prefixes: nets(&["10.244.0.0/16", "fd00:244::/56"]),
        ..NodeFacts::default()
    };
    let settings = settings(&facts, &[], &InUse::default(), &Settings::default());
    assert_eq!((settings.ipv4.pod_prefix_count, settings.ipv6.pod_prefix_count), (1, 1));
    assert!(settings.ipv4.is_pod(Ipv4Addr::new(10, 244, 3, 4).into()));
    assert!(!settings.ipv4.is_pod(Ipv4Addr::new(10, 245, 3, 4).into()));
}
