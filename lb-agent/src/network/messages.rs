//! Parses rtnetlink messages into a [`Network`].
//!
//! It decides nothing about programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage, AddressScope},
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType},
};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::{
    error::InterfaceError,
    interfaces::{DefaultRoute, Link, Network},
    sources,
};
use crate::programs::hook::LinkHeader;

/// So many neighbours are remembered. The kernel keeps 1,024 by default (`gc_thresh3`).
const MAX_NEIGHBOURS: usize = 16_384;

/// The consequences of messages: what has to be read or attached again.
#[derive(Debug, Default)]
pub struct Stale {
    /// Everything has to be read again.
    pub all: bool,
    /// The default routes have to be read again.
    pub routes: bool,
    /// Interfaces to read again because their peer has moved to another namespace.
    pub peers: Vec<u32>,
    /// Whether an interface came, went or changed.
    pub link_changed: bool,
    /// Whether interfaces or addresses are others than before.
    pub interfaces: bool,
    /// Whether next hops may have changed.
    pub next_hops: bool,
    /// Whether the source address of a route may have changed that leads to one of these devices;
    /// 0 stands for any device.
    pub sources: BTreeSet<u32>,
    /// Interfaces whose filters may have changed.
    pub filters: BTreeSet<u32>,
}

/// Applies a message, and adds its consequences to `stale`.
pub fn apply(network: &mut Network, message: RouteNetlinkMessage, stale: &mut Stale) {
    if is_of_port(&message) {
        return;
    }
    match message {
        RouteNetlinkMessage::NewLink(message) => {
            // The kernel removes the IPv4 routes of an interface that goes down without a message.
            stale.routes |= !message.header.flags.contains(LinkFlags::Up)
                && network
                    .default_routes
                    .iter()
                    .any(|route| route.interface == message.header.index);
            let (index, link) = parse_link(&message);
            let known = network.links.insert(index, link);
            let is_changed = known.as_ref() != network.links.get(&index);
            stale.link_changed |= is_changed;
            stale.interfaces |= is_changed;
            if !message.header.flags.contains(LinkFlags::Up) {
                stale.sources.insert(index);
            }
        }
        RouteNetlinkMessage::DelLink(message) => {
            let index = message.header.index;
            stale.sources.insert(index);
            network.links.remove(&index);
            network.addresses.retain(|(holder, _)| *holder != index);
            network.on_subnets.retain(|(holder, _)| *holder != index);
            network.default_routes.retain(|route| route.interface != index);
            network.neighbours.retain(|(holder, _), _| *holder != index);
            stale.link_changed = true;
            stale.interfaces = true;
            for attribute in &message.attributes {
                if let LinkAttribute::Link(peer) = attribute
                    && *peer != 0
                {
                    stale.peers.push(*peer);
                }
            }
        }
        RouteNetlinkMessage::NewAddress(message) => {
            stale.sources.insert(message.header.index);
            if let Some(address) = parse_address(&message) {
                stale.interfaces |= network.addresses.insert(address);
                stale.interfaces |= has_subnet(&message) && network.on_subnets.insert(address);
            }
        }
        RouteNetlinkMessage::DelAddress(message) => {
            stale.sources.insert(message.header.index);
            if let Some(address) = parse_address(&message) {
                stale.interfaces |= network.addresses.remove(&address);
                stale.interfaces |= network.on_subnets.remove(&address);
            }
        }
        RouteNetlinkMessage::NewRoute(message) | RouteNetlinkMessage::DelRoute(message) => {
            stale.routes |= message.header.destination_prefix_length == 0;
            stale.next_hops = true;
            stale.sources.extend(sources::devices(&message));
        }
        RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) => {
            stale.next_hops = true;
            stale.sources.insert(0);
        }
        RouteNetlinkMessage::NewNeighbour(message) => {
            stale.next_hops |= update_neighbour(network, &message);
        }
        // With a qdisc its filters go, without a message of their own.
        RouteNetlinkMessage::NewTrafficFilter(message)
        | RouteNetlinkMessage::DelTrafficFilter(message)
        | RouteNetlinkMessage::DelQueueDiscipline(message) => {
            stale.filters.extend(u32::try_from(message.header.index));
        }
        // The deletion of a neighbour (DelNeighbour) changes no MAC: the kernel collects garbage all
        // the time on a network of thousands of neighbours. It stays known here, to be compared
        // with its next MAC.
        _ => {}
    }
}

/// Whether a message is about an interface as the port of a bridge. Such a message has neither
/// the kind of the interface nor the namespace of its peer, and its deletion means that the
/// interface left the bridge; the interface itself is told of by messages of their own.
fn is_of_port(message: &RouteNetlinkMessage) -> bool {
    matches!(
        message,
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link)
            if link.header.interface_family == AddressFamily::Bridge
    )
}

/// Updates a neighbour. Returns whether its MAC changed.
fn update_neighbour(network: &mut Network, message: &NeighbourMessage) -> bool {
    let Some(address) = destination(message) else { return false };
    let is_valid =
        !matches!(message.header.state, NeighbourState::Failed | NeighbourState::Incomplete);
    let mac = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(mac) if is_valid => mac.as_slice().try_into().ok(),
        _ => None,
    });
    let key = (message.header.ifindex, address);
    if network.neighbours.len() >= MAX_NEIGHBOURS {
        network.neighbours.clear();
    }
    match mac {
        Some(mac) => network.neighbours.insert(key, mac) != Some(mac),
        None => network.neighbours.remove(&key).is_some(),
    }
}

fn destination(message: &NeighbourMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
            Some(IpAddr::V4(*address))
        }
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
            Some(IpAddr::V6(*address))
        }
        _ => None,
    })
}

/// Reads everything.
pub(super) async fn read(handle: &Handle) -> Result<Network, InterfaceError> {
    let failed = |source| InterfaceError::Read { source };
    let links: Vec<LinkMessage> =
        handle.link().get().execute().try_collect().await.map_err(failed)?;
    let addresses: Vec<AddressMessage> =
        handle.address().get().execute().try_collect().await.map_err(failed)?;
    Ok(Network {
        links: links.iter().map(parse_link).collect(),
        addresses: addresses.iter().filter_map(parse_address).collect(),
        on_subnets: addresses
            .iter()
            .filter(|message| has_subnet(message))
            .filter_map(parse_address)
            .collect(),
        default_routes: read_routes(handle).await?,
        neighbours: BTreeMap::new(),
    })
}

/// Reads the default routes.
pub(super) async fn read_routes(handle: &Handle) -> Result<BTreeSet<DefaultRoute>, InterfaceError> {
    let families = [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ];
    let mut found = BTreeSet::new();
    for family in families {
        let mut routes = handle.route().get(family).execute();
        while let Some(route) =
            routes.try_next().await.map_err(|source| InterfaceError::Read { source })?
        {
            found.extend(parse_default_route(&route));
        }
    }
    Ok(found)
}

/// What packets have in front of the IP header. The kernel decides alike where it redirects packets
/// (`dev_is_mac_header_xmit`).
fn header(kind: LinkLayerType) -> LinkHeader {
    match kind {
        LinkLayerType::Ether | LinkLayerType::Loopback => LinkHeader::Ethernet,
        LinkLayerType::None
        | LinkLayerType::Rawip
        | LinkLayerType::Ppp
        | LinkLayerType::Tunnel
        | LinkLayerType::Tunnel6
        | LinkLayerType::Sit
        | LinkLayerType::Ipgre
        | LinkLayerType::Ip6gre => LinkHeader::Nothing,
        _ => LinkHeader::Other,
    }
}

/// An interface and its index.
pub(super) fn parse_link(message: &LinkMessage) -> (u32, Link) {
    let kind = message.header.link_layer_type;
    let mut link = Link {
        is_loopback: message.header.flags.contains(LinkFlags::Loopback),
        is_down: !message.header.flags.contains(LinkFlags::Up),
        header: header(kind),
        ..Link::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(address) => {
                link.mac = address.as_slice().try_into().unwrap_or_default();
            }
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::LinkNetNsId(_) => link.has_peer_elsewhere = true,
            LinkAttribute::Controller(controller) => link.controller = Some(*controller),
            LinkAttribute::LinkInfo(infos) => {
                let is_kind = |kind| infos.contains(&LinkInfo::Kind(kind));
                link.is_veth = is_kind(InfoKind::Veth);
                link.is_netkit = is_kind(InfoKind::Netkit);
                link.is_bridge = is_kind(InfoKind::Bridge);
                link.is_dummy = is_kind(InfoKind::Dummy) || is_kind(InfoKind::Ifb);
            }
            _ => {}
        }
    }
    (message.header.index, link)
}

/// An address of global or site scope: those of link and host scope are not reachable from
/// outside.
fn parse_address(message: &AddressMessage) -> Option<(u32, IpAddr)> {
    if !matches!(message.header.scope, AddressScope::Universe | AddressScope::Site) {
        return None;
    }
    // On a point-to-point interface, `Address` is the address of the other end.
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })?;
    Some((message.header.index, address))
}

/// Whether an address comes with a subnet of more than this address.
fn has_subnet(message: &AddressMessage) -> bool {
    let bits = if message.header.family == AddressFamily::Inet6 { 128 } else { 32 };
    message.header.prefix_len < bits
}

fn parse_default_route(message: &RouteMessage) -> Vec<DefaultRoute> {
    let header = &message.header;
    let is_default = header.destination_prefix_length == 0
        && header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast;
    if !is_default {
        return Vec::new();
    }
    let mut route = DefaultRoute {
        is_ipv6: header.address_family == AddressFamily::Inet6,
        metric: 0,
        interface: 0,
        source: None,
    };
    let mut interfaces = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Oif(index) => interfaces.push(*index),
            RouteAttribute::MultiPath(hops) => {
                interfaces.extend(hops.iter().map(|hop| hop.interface_index));
            }
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => {
                route.source = Some(IpAddr::V4(*address));
            }
            RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => {
                route.source = Some(IpAddr::V6(*address));
            }
            _ => {}
        }
    }
    interfaces.into_iter().map(|interface| DefaultRoute { interface, ..route.clone() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_route::tc::TcMessage;

    const INDEX: u32 = 5;

    /// A pod's veth, as the kernel tells of it.
    fn link(attributes: Vec<LinkAttribute>) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = INDEX;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.header.flags = LinkFlags::Up;
        message.attributes = attributes;
        message
    }

    fn neighbour(mac: u8) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = INDEX;
        message.header.state = NeighbourState::Reachable;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet([192, 0, 2, 1].into())),
            NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, mac]),
        ];
        message
    }

    #[test]
    fn only_a_neighbour_with_another_mac_changes_next_hops() {
        let mut network = Network::default();
        let mut changes = |message| {
            let mut stale = Stale::default();
            apply(&mut network, message, &mut stale);
            stale.next_hops
        };
        assert!(changes(RouteNetlinkMessage::NewNeighbour(neighbour(1))));
        assert!(!changes(RouteNetlinkMessage::NewNeighbour(neighbour(1))));
        assert!(!changes(RouteNetlinkMessage::DelNeighbour(neighbour(1))));
        assert!(!changes(RouteNetlinkMessage::NewNeighbour(neighbour(1))), "the same again");
        assert!(!changes(RouteNetlinkMessage::DelNeighbour(neighbour(1))));
        assert!(changes(RouteNetlinkMessage::NewNeighbour(neighbour(2))), "another MAC");
    }

    #[test]
    fn a_message_that_says_what_is_known_changes_no_interface() {
        let mut network = Network::default();
        let mut changes = |message| {
            let mut stale = Stale::default();
            apply(&mut network, message, &mut stale);
            stale.interfaces
        };
        let veth = || link(vec![LinkAttribute::IfName("veth5".to_owned())]);
        let mut address = AddressMessage::default();
        address.header.index = INDEX;
        address.header.prefix_len = 24;
        address.attributes = vec![AddressAttribute::Local([192, 0, 2, 5].into())];
        for (message, first) in [
            (RouteNetlinkMessage::NewLink(veth()), true),
            (RouteNetlinkMessage::NewAddress(address.clone()), true),
            (RouteNetlinkMessage::NewRoute(RouteMessage::default()), false),
            (RouteNetlinkMessage::DelAddress(address), true),
            (RouteNetlinkMessage::DelLink(veth()), true),
        ] {
            assert_eq!(changes(message.clone()), first, "{message:?}");
            let again = matches!(message, RouteNetlinkMessage::DelLink(_));
            assert_eq!(changes(message.clone()), again, "again {message:?}");
        }
    }

    #[test]
    fn a_filter_that_came_or_went_and_a_qdisc_that_went_name_their_interface() {
        let mut network = Network::default();
        let of = |index| {
            let mut message = TcMessage::default();
            message.header.index = index;
            message
        };
        let mut stale = Stale::default();
        for message in [
            RouteNetlinkMessage::NewTrafficFilter(of(3)),
            RouteNetlinkMessage::DelTrafficFilter(of(5)),
            RouteNetlinkMessage::DelQueueDiscipline(of(7)),
            RouteNetlinkMessage::NewQueueDiscipline(of(9)),
        ] {
            apply(&mut network, message, &mut stale);
        }
        assert_eq!(Vec::from_iter(stale.filters), [3, 5, 7]);
        assert!(!stale.interfaces && !stale.next_hops && stale.sources.is_empty());
    }

    #[test]
    fn what_a_bridge_tells_of_its_port_changes_no_interface() {
        let name = || LinkAttribute::IfName("veth5".to_owned());
        let veth = link(vec![
            name(),
            LinkAttribute::LinkNetNsId(1),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)]),
        ]);
        let mut network = Network::default();
        apply(&mut network, RouteNetlinkMessage::NewLink(veth), &mut Stale::default());
        let before = network.links.clone();
        assert!(before[&INDEX].is_veth && before[&INDEX].has_peer_elsewhere);
        let mut port = link(vec![name()]);
        port.header.interface_family = AddressFamily::Bridge;
        for message in
            [RouteNetlinkMessage::NewLink(port.clone()), RouteNetlinkMessage::DelLink(port)]
        {
            let mut stale = Stale::default();
            apply(&mut network, message, &mut stale);
            assert!(network.links == before && !stale.link_changed && !stale.interfaces);
        }
    }
}
