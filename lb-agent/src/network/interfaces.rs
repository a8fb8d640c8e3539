//! Which program belongs on which interface, and which addresses this node has: pure functions
//! of the interfaces, addresses and routes of the network namespace.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use lb_common::abi::settings::{Device, MAX_DEVICES};
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
    /// Whether it is a dummy, which no packet comes in by, or an ifb, which only packets of another
    /// interface pass (the bandwidth plug-in has one for each pod).
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
        self.roles_and_excess(devices, pods, node_addresses).0
    }

    /// [`Self::roles`], and the external interfaces that have no role because DEVICES has no room for
    /// them: the newest ones, but none that has a default route, an address of the Node, or is in
    /// `--devices`.
    pub fn roles_and_excess(
        &self,
        devices: &Patterns,
        pods: &Patterns,
        node_addresses: &[IpAddr],
    ) -> (BTreeMap<u32, Role>, Vec<Interface>) {
        let mut roles = self.all_roles(devices, pods, node_addresses);
        let external: Vec<Interface> = self.with_role(&roles, Role::External).collect();
        let is_guessed = |interface: &Interface| {
            devices.matches(&interface.name).is_none()
                && !self.faces_outside(interface.index, node_addresses)
        };
        let too_many = external.len().saturating_sub(MAX_DEVICES as usize);
        let newest = external.into_iter().rev();
        let excess: Vec<Interface> = newest.filter(is_guessed).take(too_many).collect();
        for interface in &excess {
            roles.remove(&interface.index);
        }
        (roles, excess)
    }

    fn all_roles(
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
            self.faces_outside(index, node_addresses)
                || (pods.matches(&link.name) != Some(true) && self.leads_outside(index, link))
        })
    }

    /// Whether an interface has a default route or an address of the Node.
    fn faces_outside(&self, index: u32, node_addresses: &[IpAddr]) -> bool {
        let holds = |address: &IpAddr| self.addresses.contains(&(index, *address));
        self.default_routes.iter().any(|route| route.interface == index)
            || node_addresses.iter().any(holds)
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
mod tests;
