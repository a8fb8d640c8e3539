use super::*;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn veth(name: &str) -> Link {
    Link { name: name.into(), is_veth: true, has_peer_elsewhere: true, ..Link::default() }
}

fn node() -> Network {
    let loopback = Link { name: "lo".into(), is_loopback: true, ..Link::default() };
    let bridge = Link { name: "cni0".into(), is_bridge: true, ..Link::default() };
    let links =
        [(1, loopback), (2, veth("eth0")), (3, veth("eth1")), (4, bridge), (5, veth("veth9"))];
    let route = DefaultRoute { is_ipv6: false, metric: 0, interface: 2, source: None };
    Network {
        links: links.into(),
        addresses: [(2, "192.0.2.10"), (3, "2001:db8::10"), (4, "10.0.0.1"), (5, "10.0.9.9")]
            .map(|(index, text)| (index, address(text)))
            .into(),
        default_routes: [route].into(),
        on_subnets: BTreeSet::new(),
        neighbours: BTreeMap::new(),
    }
}

#[test]
fn default_routes_and_node_addresses_make_a_device_external_and_other_veths_are_pods() {
    let roles = node().roles(&Patterns::Auto, &Patterns::Auto, &[address("2001:db8::10")]);
    let expected = [(1, Role::Loopback), (2, Role::External), (3, Role::External), (5, Role::Pod)];
    assert_eq!(roles, expected.into());
    let points = attach_points(&roles, |_| LinkHeader::Ethernet);
    assert_eq!(points.get(&(5, Direction::Egress)), Some(&"to_pod"));
    assert_eq!(points.get(&(1, Direction::Ingress)), None);
}

#[test]
fn every_device_that_packets_of_other_machines_come_in_by_is_external() {
    let link = |name: &str| Link { name: name.into(), ..Link::default() };
    let port = |name: &str, controller| Link { controller: Some(controller), ..link(name) };
    let rows = [
        ("an overlay", 10, link("flannel.1"), Some(Role::External)),
        ("a second network card", 11, link("eth7"), Some(Role::External)),
        ("a device that is down", 30, Link { is_down: true, ..link("sit0") }, None),
        (
            "an L3 device",
            31,
            Link { header: LinkHeader::Nothing, ..link("tailscale0") },
            Some(Role::External),
        ),
        ("a port of a bond", 12, port("eth8", 13), None),
        ("its bond", 13, link("bond0"), Some(Role::External)),
        ("a dummy", 14, Link { is_dummy: true, ..link("kube-ipvs0") }, None),
        ("a bridge of pods", 15, Link { is_bridge: true, ..link("cni1") }, None),
        ("a port of a pod", 16, Link { controller: Some(15), ..veth("veth16") }, Some(Role::Pod)),
        (
            "a bridge with a network card",
            17,
            Link { is_bridge: true, ..link("br0") },
            Some(Role::External),
        ),
        ("its network card", 18, port("eth9", 17), None),
        ("no packet of another machine", 19, Link { is_veth: true, ..link("pair0") }, None),
        ("a veth with a subnet behind it", 20, veth("eth2"), Some(Role::External)),
        ("a pod's veth with a gateway address", 21, veth("veth21"), Some(Role::Pod)),
        (
            "a pod's netkit device",
            22,
            Link { is_netkit: true, has_peer_elsewhere: true, ..link("nk22") },
            Some(Role::Pod),
        ),
    ];
    let mut network = node();
    network.addresses.extend([(20, address("172.19.0.2")), (21, address("10.244.1.1"))]);
    network.on_subnets.insert((20, address("172.19.0.2")));
    network.links.extend(rows.iter().map(|(_, index, link, _)| (*index, link.clone())));
    let roles = network.roles(&Patterns::Auto, &Patterns::Auto, &[]);
    for (what, index, _, expected) in rows {
        assert_eq!(roles.get(&index).copied(), expected, "{what}");
    }
}

#[test]
fn of_too_many_external_interfaces_the_last_guesses_get_no_role() {
    let mut network = node();
    let link = |index: u32| Link { name: format!("vlan{index}"), ..Link::default() };
    network.links.extend((10..40).map(|index| (index, link(index))));
    network.addresses.insert((39, address("192.0.2.39")));
    let held = [address("192.0.2.39")];
    let roles = network.roles(&Patterns::Auto, &Patterns::Auto, &held);
    let external: Vec<u32> = network.with_role(&roles, Role::External).map(|i| i.index).collect();
    // The one with the default route, the first guesses, and the one with the Node's address.
    let expected: Vec<u32> = [2].into_iter().chain(10..24).chain([39]).collect();
    assert_eq!(external, expected);
    let (_, excess) = network.roles_and_excess(&Patterns::Auto, &Patterns::Auto, &held);
    let excess: Vec<u32> = excess.iter().map(|interface| interface.index).collect();
    assert_eq!(excess, (24..39).rev().collect::<Vec<_>>());
    // Those that are asked for are for the operator to choose.
    let named = Patterns::Named(vec!["vlan*".into()]);
    let roles = network.roles(&named, &Patterns::Auto, &held);
    assert_eq!(network.with_role(&roles, Role::External).count(), 30);
}

#[test]
fn an_interface_keeps_its_role_until_the_addresses_of_the_node_are_known() {
    let network = node();
    let find = |held: &mut BTreeMap<u32, Role>| {
        let mut roles = network.roles(&Patterns::Auto, &Patterns::Auto, &[]);
        network.keep_held_roles(&mut roles, held);
        roles
    };
    let fresh = find(&mut BTreeMap::new());
    assert_eq!(fresh.get(&3), Some(&Role::Pod));
    assert_eq!(fresh.get(&4), None);
    let mut held: BTreeMap<u32, Role> =
        [(2, Role::Pod), (3, Role::External), (4, Role::External), (9, Role::Pod)].into();
    let expected = [
        (1, Role::Loopback),
        (2, Role::External),
        (3, Role::External),
        (4, Role::External),
        (5, Role::Pod),
    ];
    assert_eq!(find(&mut held), expected.into());
    assert_eq!(held, expected.into(), "a role of a removed interface is forgotten");
    let listed = network.devices(&held);
    assert_eq!(listed.iter().map(|device| device.ifindex).collect::<Vec<_>>(), [2, 3, 4]);
}

#[test]
fn every_program_has_the_role_of_its_interface() {
    for role in [Role::Pod, Role::External, Role::Loopback] {
        for header in [LinkHeader::Ethernet, LinkHeader::Nothing] {
            for program in attach_points(&[(7, role)].into(), |_| header).values() {
                assert_eq!(Role::of_program(program), Some(role), "{program}");
            }
        }
    }
    assert_eq!(Role::of_program("connect4"), None);
}

#[test]
fn programs_for_replies_are_attached_first() {
    let roles =
        [(1, Role::Loopback), (3, Role::External), (5, Role::Pod), (6, Role::External)].into();
    let is_l3 = |index| if index == 6 { LinkHeader::Nothing } else { LinkHeader::Ethernet };
    let points = in_order(attach_points(&roles, is_l3));
    let programs: Vec<_> = points.into_iter().map(|(_, program)| program).collect();
    let expected =
        ["loopback", "from_device", "to_device", "to_pod", "from_pod", "from_l3", "to_l3"];
    assert_eq!(programs, expected);
}

#[test]
fn a_device_with_another_header_gets_no_role_and_is_named() {
    let mut network = node();
    network.links.entry(2).and_modify(|link| link.header = LinkHeader::Other);
    let mut roles = network.roles(&Patterns::Auto, &Patterns::Auto, &[]);
    network.keep_held_roles(&mut roles, &mut [(2, Role::External)].into());
    assert_eq!(roles.get(&2), None);
    let named: Vec<_> = network.unsupported(&Patterns::Auto, &[]).collect();
    assert_eq!(named, [Interface { index: 2, name: "eth0".into() }]);
}

#[test]
fn lists_replace_what_is_found() {
    let devices = Patterns::Named(vec!["eth1".into()]);
    let pods = Patterns::Named(vec!["cali*".into(), "cn*0".into()]);
    let roles = node().roles(&devices, &pods, &[]);
    assert_eq!(roles, [(1, Role::Loopback), (3, Role::External), (4, Role::Pod)].into());
    let tap = Link { name: "tap7".into(), ..Link::default() };
    let mut network = node();
    network.links.insert(7, tap);
    let role_of = |pods: &Patterns| network.roles(&Patterns::Auto, pods, &[]).get(&7).copied();
    assert_eq!(role_of(&Patterns::Auto), Some(Role::External));
    assert_eq!(role_of(&Patterns::Named(vec!["tap*".into()])), Some(Role::Pod));
}

#[test]
fn the_address_of_a_bridge_is_the_node_s_and_that_of_a_veth_is_not() {
    let network = node();
    let roles = network.roles(&Patterns::Auto, &Patterns::Auto, &[]);
    let node = network.node(&roles);
    // eth1 counts as a pod's interface while the addresses of the Node are unknown.
    assert_eq!(node.addresses, [address("192.0.2.10"), address("10.0.0.1")]);
    assert_eq!(node.pod_side_addresses, [address("2001:db8::10"), address("10.0.9.9")]);
    assert_eq!(node.default_sources, [address("192.0.2.10")]);
    assert_eq!(node.pods, 2);
}

#[test]
fn an_address_is_held_by_every_interface_but_that_of_ipvs() {
    let dummy = |name: &str| Link { name: name.into(), is_dummy: true, ..Link::default() };
    let mut network = node();
    network.links.extend([(6, dummy(KUBE_IPVS)), (7, dummy("nodelocaldns"))]);
    network.addresses.extend([(6, address("10.96.0.1")), (6, address("10.96.0.10"))]);
    let held = |network: &Network| network.node(&BTreeMap::new()).held_addresses;
    let before = held(&network);
    assert!(before.contains(&address("192.0.2.10")) && !before.contains(&address("10.96.0.10")));
    network.addresses.insert((7, address("10.96.0.10")));
    assert!(held(&network).contains(&address("10.96.0.10")));
}
