//! Which program belongs on which interface, and which addresses this node has: pure
//! functions of what the kernel says of the network namespace.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use lb_common::abi::settings::Device;
use lb_control::model::network::{Interface, NodeNetwork};

use crate::{
    options::values::Patterns,
    programs::hook::{Direction, Place, Role},
};

/// An interface, as the kernel describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// The name.
    pub name: String,
    /// The link-layer address, if it has 6 bytes.
    pub mac: [u8; 6],
    /// The longest packet that it sends, bytes.
    pub mtu: u32,
    /// Whether it is a loopback device.
    pub is_loopback: bool,
    /// Whether its packets have no Ethernet header, which the programs read: those of
    /// tun, wireguard and ppp have none.
    pub is_headerless: bool,
    /// Whether it is a veth.
    pub is_veth: bool,
    /// Whether its peer is in another network namespace.
    pub has_peer_elsewhere: bool,
}

/// A default route of the main table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DefaultRoute {
    /// Whether it is of IPv6.
    pub is_ipv6: bool,
    /// Its metric: the lowest wins.
    pub metric: u32,
    /// The interface it leads to.
    pub interface: u32,
    /// The source address that it prefers.
    pub source: Option<IpAddr>,
}

/// What the kernel says of the network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// Interfaces by index.
    pub links: BTreeMap<u32, Link>,
    /// Addresses of global scope, with the interface that holds them.
    pub addresses: BTreeSet<(u32, IpAddr)>,
    /// Default routes.
    pub default_routes: BTreeSet<DefaultRoute>,
    /// MACs of neighbours that were told of since everything was read, by interface.
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
            .filter(|(_, link)| !link.is_headerless)
            .filter_map(|(index, link)| {
                let role = if link.is_loopback {
                    Role::Loopback
                } else if self.is_external(*index, link, devices, node_addresses) {
                    Role::External
                } else if pods
                    .matches(&link.name)
                    .unwrap_or(link.is_veth && link.has_peer_elsewhere)
                {
                    Role::Pod
                } else {
                    return None;
                };
                Some((*index, role))
            })
            .collect()
    }

    /// Interfaces that would be external, had their packets an Ethernet header.
    pub fn headerless(
        &self,
        devices: &Patterns,
        node_addresses: &[IpAddr],
    ) -> impl Iterator<Item = Interface> {
        self.links
            .iter()
            .filter(|(_, link)| link.is_headerless)
            .filter(|(index, link)| self.is_external(**index, link, devices, node_addresses))
            .map(|(index, link)| Interface { index: *index, name: link.name.clone() })
    }

    fn is_external(
        &self,
        index: u32,
        link: &Link,
        devices: &Patterns,
        node_addresses: &[IpAddr],
    ) -> bool {
        devices.matches(&link.name).unwrap_or_else(|| {
            let holds = |address: &IpAddr| self.addresses.contains(&(index, *address));
            self.default_routes.iter().any(|route| route.interface == index)
                || node_addresses.iter().any(holds)
        })
    }

    /// Makes `roles`, found without the addresses of the Node object, do for as long as
    /// these are not known: they could make any interface external and take no device's
    /// role away. So an interface keeps the role in `held`, which an earlier agent gave
    /// to it, unless its own is external. `held` goes on with the outcome.
    pub fn keep(&self, roles: &mut BTreeMap<u32, Role>, held: &mut BTreeMap<u32, Role>) {
        held.retain(|index, _| self.links.get(index).is_some_and(|link| !link.is_headerless));
        for (index, role) in &*held {
            let kept = roles.entry(*index).or_insert(*role);
            if *kept == Role::Pod {
                *kept = *role;
            }
        }
        held.clone_from(roles);
    }

    /// What follows from the roles for the rest of the agent.
    pub fn node(&self, roles: &BTreeMap<u32, Role>) -> NodeNetwork {
        let mut node = NodeNetwork::default();
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

    /// The entries of DEVICES, but for the epoch.
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

/// Which program belongs in which place.
pub fn places(roles: &BTreeMap<u32, Role>) -> BTreeMap<Place, &'static str> {
    let mut places = BTreeMap::new();
    for (index, role) in roles {
        match role {
            Role::Pod => {
                places.insert((*index, Direction::Ingress), "from_pod");
                places.insert((*index, Direction::Egress), "to_pod");
            }
            Role::External => {
                places.insert((*index, Direction::Ingress), "from_device");
                places.insert((*index, Direction::Egress), "to_device");
            }
            Role::Loopback => {
                places.insert((*index, Direction::Egress), "loopback");
            }
        }
    }
    places
}

/// Places in the order in which their programs are attached; they are detached in
/// reverse. What a pod sends is balanced only where its answers are translated back,
/// and what comes in by a device is, before anything is sent out for it.
pub fn in_order(
    places: impl IntoIterator<Item = (Place, &'static str)>,
) -> Vec<(Place, &'static str)> {
    let mut ordered: Vec<_> = places.into_iter().collect();
    ordered.sort_by_key(|((index, _), program)| {
        (*index, matches!(*program, "from_pod" | "to_device"))
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
        let bridge = Link { name: "cni0".into(), ..Link::default() };
        let links =
            [(1, loopback), (2, veth("eth0")), (3, veth("eth1")), (4, bridge), (5, veth("veth9"))];
        let route = DefaultRoute { is_ipv6: false, metric: 0, interface: 2, source: None };
        Network {
            links: links.into(),
            addresses: [(2, "192.0.2.10"), (3, "2001:db8::10"), (4, "10.0.0.1"), (5, "10.0.9.9")]
                .map(|(index, text)| (index, address(text)))
                .into(),
            default_routes: [route].into(),
            neighbours: BTreeMap::new(),
        }
    }

    #[test]
    fn default_routes_and_node_addresses_make_a_device_external_and_other_veths_are_pods() {
        let roles = node().roles(&Patterns::Auto, &Patterns::Auto, &[address("2001:db8::10")]);
        let expected =
            [(1, Role::Loopback), (2, Role::External), (3, Role::External), (5, Role::Pod)];
        assert_eq!(roles, expected.into());
        assert_eq!(places(&roles).get(&(5, Direction::Egress)), Some(&"to_pod"));
        assert_eq!(places(&roles).get(&(1, Direction::Ingress)), None);
    }

    #[test]
    fn an_interface_keeps_its_role_until_the_addresses_of_the_node_are_known() {
        let network = node();
        let find = |held: &mut BTreeMap<u32, Role>| {
            let mut roles = network.roles(&Patterns::Auto, &Patterns::Auto, &[]);
            network.keep(&mut roles, held);
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
        assert_eq!(held, expected.into(), "what is gone is forgotten");
        let listed = network.devices(&held);
        assert_eq!(listed.iter().map(|device| device.ifindex).collect::<Vec<_>>(), [2, 3, 4]);
    }

    #[test]
    fn every_program_tells_the_role_that_it_is_of() {
        for role in [Role::Pod, Role::External, Role::Loopback] {
            for program in places(&[(7, role)].into()).values() {
                assert_eq!(Role::of_program(program), Some(role), "{program}");
            }
        }
        assert_eq!(Role::of_program("connect4"), None);
    }

    #[test]
    fn answers_find_their_program_before_requests_do() {
        let places = places(&[(3, Role::External), (5, Role::Pod), (1, Role::Loopback)].into());
        let programs: Vec<_> = in_order(places).into_iter().map(|(_, program)| program).collect();
        assert_eq!(programs, ["loopback", "from_device", "to_device", "to_pod", "from_pod"]);
    }

    #[test]
    fn a_device_without_ethernet_headers_gets_no_role_and_is_named() {
        let mut network = node();
        network.links.entry(2).and_modify(|link| link.is_headerless = true);
        let mut roles = network.roles(&Patterns::Auto, &Patterns::Auto, &[]);
        network.keep(&mut roles, &mut [(2, Role::External)].into());
        assert_eq!(roles.get(&2), None);
        let named: Vec<_> = network.headerless(&Patterns::Auto, &[]).collect();
        assert_eq!(named, [Interface { index: 2, name: "eth0".into() }]);
    }

    #[test]
    fn lists_replace_what_is_found() {
        let devices = Patterns::Named(vec!["eth1".into()]);
        let pods = Patterns::Named(vec!["cali*".into(), "cn*0".into()]);
        let roles = node().roles(&devices, &pods, &[]);
        assert_eq!(roles, [(1, Role::Loopback), (3, Role::External), (4, Role::Pod)].into());
    }

    #[test]
    fn the_address_of_a_bridge_is_the_node_s_and_that_of_a_veth_is_not() {
        let network = node();
        let roles = network.roles(&Patterns::Auto, &Patterns::Auto, &[]);
        let node = network.node(&roles);
        // eth1 is taken for a pod's as long as nobody says that it is the node's.
        assert_eq!(node.addresses, [address("192.0.2.10"), address("10.0.0.1")]);
        assert_eq!(node.pod_side_addresses, [address("2001:db8::10"), address("10.0.9.9")]);
        assert_eq!(node.default_sources, [address("192.0.2.10")]);
        assert_eq!(node.pods, 2);
    }
}
