//! Which program belongs on which interface, and which addresses this node has: pure functions
//! of the interfaces, addresses and routes of the network namespace.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use lb_common::abi::settings::Device;
use lb_control::model::network::{Interface, NodeNetwork};

use crate::{
    options::values::Patterns,
    programs::hook::{AttachPoint, Direction, LinkHeader, Role},
};

/// The dummy that holds every ClusterIP where kube-proxy ran in its mode ipvs: no process serves
/// there.
const KUBE_IPVS: &str = "kube-ipvs0";

/// An interface, as the kernel describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// The name.
    pub name: String,
    /// The link-layer address, if it has 6 bytes.
    pub mac: [u8; 6],
    /// The MTU, bytes.
    pub mtu: u32,
    /// Whether it is a loopback device.
    pub is_loopback: bool,
    /// Whether it is administratively down.
    pub is_down: bool,
    /// What its packets have in front of the IP header.
    pub header: LinkHeader,
    /// Whether it is a veth.
    pub is_veth: bool,
    /// Whether it is a netkit device, which is one end of a pair like a veth.
    pub is_netkit: bool,
    /// Whether its peer is in another network namespace.
    pub has_peer_elsewhere: bool,
    /// Whether it is a bridge.
    pub is_bridge: bool,
    /// Whether it is a dummy device, which no packet comes in by.
    pub is_dummy: bool,
    /// The bridge, bond or other device that it is a port of.
    pub controller: Option<u32>,
}

impl Link {
    /// Whether it is one end of a pair, as the interfaces of pods are.
    fn is_paired(&self) -> bool {
        self.is_veth || self.is_netkit
    }
}

/// A default route of the main table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DefaultRoute {
    /// Whether it is an IPv6 route.
    pub is_ipv6: bool,
    /// Its metric: the lowest wins.
    pub metric: u32,
    /// Its interface.
    pub interface: u32,
    /// Its preferred source address.
    pub source: Option<IpAddr>,
}

/// The network namespace, as the kernel describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// Interfaces by index.
    pub links: BTreeMap<u32, Link>,
    /// Addresses of global scope, with the interface that holds them.
    pub addresses: BTreeSet<(u32, IpAddr)>,
    /// Those of them whose interface leads to a subnet of more than this address.
    pub on_subnets: BTreeSet<(u32, IpAddr)>,
    /// Default routes.
    pub default_routes: BTreeSet<DefaultRoute>,
    /// MACs of neighbours that were reported since everything was read, by interface.
    pub neighbours: BTreeMap<(u32, IpAddr), [u8; 6]>,
}

impl Network {
    /// The role of every interface that has one. `devices` and `pods` are `--devices` and
    /// `--pod-interfaces`; `node_addresses` are those of the Node object.
    pub fn roles(
        &self,
        devices: &Patterns,
        pods: &Patterns,
        node_addresses: &[IpAddr],
    ) -> BTreeMap<u32, Role> {
        self.links
            .iter()
            .filter(|(_, link)| link.header != LinkHeader::Other)
            .filter_map(|(index, link)| {
                let is_pod = || {
                    pods.matches(&link.name).unwrap_or(link.is_paired() && link.has_peer_elsewhere)
                };
                let role = if link.is_loopback {
                    Role::Loopback
                } else if self.is_external(*index, link, devices, pods, node_addresses) {
                    Role::External
                } else if link.header == LinkHeader::Ethernet && is_pod() {
                    Role::Pod
                } else {
                    return None;
                };
                Some((*index, role))
            })
            .collect()
    }

    /// Interfaces that would be external if there were programs for their packets' header.
    pub fn unsupported(
        &self,
        devices: &Patterns,
        node_addresses: &[IpAddr],
    ) -> impl Iterator<Item = Interface> {
        self.links
            .iter()
            .filter(|(_, link)| link.header == LinkHeader::Other)
            .filter(|(index, link)| {
                self.is_external(**index, link, devices, &Patterns::Auto, node_addresses)
            })
            .map(|(index, link)| Interface { index: *index, name: link.name.clone() })
    }

    fn is_external(
        &self,
        index: u32,
        link: &Link,
        devices: &Patterns,
        pods: &Patterns,
        node_addresses: &[IpAddr],
    ) -> bool {
        devices.matches(&link.name).unwrap_or_else(|| {
            let holds = |address: &IpAddr| self.addresses.contains(&(index, *address));
            self.default_routes.iter().any(|route| route.interface == index)
                || node_addresses.iter().any(holds)
                || (pods.matches(&link.name) != Some(true) && self.leads_outside(index, link))
        })
    }

    /// Whether packets of other machines come in by an interface that has neither a default route
    /// nor an address of the Node: an overlay, a second network card, a VLAN. A port hands its
    /// packets to its controller. A bridge leads outside if one of its ports is no pod's.
    fn leads_outside(&self, index: u32, link: &Link) -> bool {
        if link.is_down || link.is_dummy || link.controller.is_some() {
            return false;
        }
        if link.is_paired() {
            // The host side of a pod's pair has no address, or a gateway address without a subnet.
            return link.has_peer_elsewhere && self.on_subnets.iter().any(|(on, _)| *on == index);
        }
        let mut ports = self.links.values().filter(|port| port.controller == Some(index));
        !link.is_bridge || ports.any(|port| !port.is_paired())
    }

    /// Completes `roles`, found without the addresses of the Node object, until these are known.
    /// They can make any interface external, and never make an external one anything else. So an
    /// interface keeps the role in `held`, which an earlier agent gave to it, unless its own is
    /// external. `held` becomes the result.
    pub fn keep_held_roles(&self, roles: &mut BTreeMap<u32, Role>, held: &mut BTreeMap<u32, Role>) {
        let has_programs = |link: &Link| link.header != LinkHeader::Other;
        held.retain(|index, _| self.links.get(index).is_some_and(has_programs));
        for (index, role) in &*held {
            let kept = roles.entry(*index).or_insert(*role);
            if *kept == Role::Pod {
                *kept = *role;
            }
        }
        held.clone_from(roles);
    }

    /// The network of the node, for the rest of the agent.
    pub fn node(&self, roles: &BTreeMap<u32, Role>) -> NodeNetwork {
        let is_held = |(index, _): &&(u32, IpAddr)| {
            self.links.get(index).is_none_or(|link| link.name != KUBE_IPVS)
        };
        let held = self.addresses.iter().filter(is_held).map(|(_, address)| *address);
        let mut node = NodeNetwork { held_addresses: held.collect(), ..NodeNetwork::default() };
        let rank = |index: &u32| u8::from(roles.get(index) != Some(&Role::External));
        let mut addresses: Vec<_> = self.addresses.iter().collect();
        addresses.sort_by_key(|(index, address)| (rank(index), *index, *address));
        for (index, address) in addresses {
            let list = match roles.get(index) {
                Some(Role::Pod) => &mut node.pod_side_addresses,
                _ => &mut node.addresses,
            };
            if !list.contains(address) {
                list.push(*address);
            }
        }
        for is_ipv6 in [false, true] {
            let mut routes = self.default_routes.iter().filter(|route| route.is_ipv6 == is_ipv6);
            node.default_sources.extend(routes.find_map(|route| self.source_of(route)));
        }
        node.devices = self.with_role(roles, Role::External).collect();
        node.pods = self.with_role(roles, Role::Pod).count();
        node
    }

    fn source_of(&self, route: &DefaultRoute) -> Option<IpAddr> {
        let own = |(index, address): &(u32, IpAddr)| {
            (*index == route.interface && address.is_ipv6() == route.is_ipv6).then_some(*address)
        };
        route.source.or_else(|| self.addresses.iter().find_map(own))
    }

    fn with_role<'a>(
        &'a self,
        roles: &'a BTreeMap<u32, Role>,
        role: Role,
    ) -> impl Iterator<Item = Interface> + 'a {
        self.links
            .iter()
            .filter(move |(index, _)| roles.get(index) == Some(&role))
            .map(|(index, link)| Interface { index: *index, name: link.name.clone() })
    }

    /// The entries of DEVICES, without the epoch.
    pub fn devices(&self, roles: &BTreeMap<u32, Role>) -> Vec<Device> {
        self.links
            .iter()
            .filter(|(index, _)| roles.get(index) == Some(&Role::External))
            .map(|(index, link)| Device {
                ifindex: *index,
                mac: link.mac,
                flags: if link.is_veth { Device::XDP_REDIRECT } else { 0 },
                mtu: link.mtu,
                epoch: 0,
            })
            .collect()
    }
}

/// The program of each attach point.
pub fn attach_points(
    roles: &BTreeMap<u32, Role>,
    header: impl Fn(u32) -> LinkHeader,
) -> BTreeMap<AttachPoint, &'static str> {
    let of_role = |(index, role): (&u32, &Role)| {
        let (ingress, egress) = match role {
            Role::Pod => (Some("from_pod"), "to_pod"),
            Role::External if header(*index) == LinkHeader::Nothing => (Some("from_l3"), "to_l3"),
            Role::External => (Some("from_device"), "to_device"),
            Role::Loopback => (None, "loopback"),
        };
        let egress = ((*index, Direction::Egress), egress);
        let ingress = ingress.map(|program| ((*index, Direction::Ingress), program));
        ingress.into_iter().chain([egress])
    };
    roles.iter().flat_map(of_role).collect()
}

/// Attach points in the order in which their programs are attached; they are detached in reverse.
/// A program that translates replies comes before the one that translates requests of the same
/// interface: `to_pod` before `from_pod`, `from_device` before `to_device`, `from_l3` before `to_l3`.
pub fn in_order(
    points: impl IntoIterator<Item = (AttachPoint, &'static str)>,
) -> Vec<(AttachPoint, &'static str)> {
    let mut ordered: Vec<_> = points.into_iter().collect();
    ordered.sort_by_key(|((index, _), program)| {
        (*index, matches!(*program, "from_pod" | "to_device" | "to_l3"))
    });
    ordered
}

#[cfg(test)]
mod tests {
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
        let expected =
            [(1, Role::Loopback), (2, Role::External), (3, Role::External), (5, Role::Pod)];
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
            ("a device that is down", 22, Link { is_down: true, ..link("sit0") }, None),
            (
                "an L3 device",
                23,
                Link { header: LinkHeader::Nothing, ..link("tailscale0") },
                Some(Role::External),
            ),
            ("a port of a bond", 12, port("eth8", 13), None),
            ("its bond", 13, link("bond0"), Some(Role::External)),
            ("a dummy", 14, Link { is_dummy: true, ..link("kube-ipvs0") }, None),
            ("a bridge of pods", 15, Link { is_bridge: true, ..link("cni1") }, None),
            (
                "a port of a pod",
                16,
                Link { controller: Some(15), ..veth("veth16") },
                Some(Role::Pod),
            ),
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
        assert!(
            before.contains(&address("192.0.2.10")) && !before.contains(&address("10.96.0.10"))
        );
        network.addresses.insert((7, address("10.96.0.10")));
        assert!(held(&network).contains(&address("10.96.0.10")));
    }
}
