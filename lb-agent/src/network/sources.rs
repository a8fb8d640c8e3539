//! The source address that the kernel prefers on each route of this node, which is the one that
//! its masquerade takes: packets that leave by an overlay have the address of the overlay's device.
//!
//! The kernel is asked once for each prefix of a route, not for each destination.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::error::InterfaceError;
use crate::maps::sources::SourcesByRoute;

/// How many addresses of a prefix are tried until one is found that has no longer prefix and is no
/// address of this node.
const ATTEMPTS: usize = 64;

/// The source address of each prefix that is routed by a device for which `is_external` holds.
/// Prefixes with the source of the prefix around them are left out.
///
/// It has a connection of its own, because the kernel rejects a second dump on a connection while the
/// first one is not complete (`__netlink_dump_start`).
pub(super) async fn read(
    is_external: impl Fn(u32) -> bool,
) -> Result<SourcesByRoute, InterfaceError> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|source| InterfaceError::Connect { source })?;
    let connection = tokio::spawn(connection);
    let sources = read_by(&handle, is_external).await;
    connection.abort();
    sources
}

async fn read_by(
    handle: &Handle,
    is_external: impl Fn(u32) -> bool,
) -> Result<SourcesByRoute, InterfaceError> {
    let mut prefixes = BTreeSet::new();
    let mut external = BTreeSet::new();
    let families = [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ];
    for family in families {
        let mut routes = handle.route().get(family).execute();
        while let Some(route) =
            routes.try_next().await.map_err(|source| InterfaceError::Read { source })?
        {
            let Some(prefix) = unicast_prefix(&route) else { continue };
            prefixes.insert(prefix);
            if devices(&route).any(&is_external) {
                external.insert(prefix);
            }
        }
    }
    let mut sources = SourcesByRoute::new();
    for prefix in external {
        if let Some(source) = source_of(handle, prefix, &prefixes).await {
            sources.insert(prefix, source);
        }
    }
    Ok(reduced(sources))
}

/// The kernel's preferred source address for `prefix`.
async fn source_of(handle: &Handle, prefix: IpNet, all: &BTreeSet<IpNet>) -> Option<IpAddr> {
    for address in representatives(prefix, all).take(ATTEMPTS) {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let request =
            RouteMessageBuilder::<IpAddr>::new().destination_prefix(address, bits).ok()?;
        let mut answers = handle.route().get(request.build()).execute();
        // An error is a route that leads nowhere (`unreachable`, `throw`), or none by now.
        let answer = answers.try_next().await.ok()??;
        if answer.header.kind == RouteType::Unicast {
            return preferred_source(&answer);
        }
    }
    None
}

/// Addresses in `prefix` that are in no longer prefix of `all`, one from each gap between those.
fn representatives(prefix: IpNet, all: &BTreeSet<IpNet>) -> impl Iterator<Item = IpAddr> {
    // Prefixes are in the order of their addresses: those inside `prefix` follow it.
    let inside = all.range(prefix..).take_while(|other| other.network() <= prefix.broadcast());
    let longer: Vec<IpNet> =
        inside.filter(|other| **other != prefix && prefix.contains(*other)).copied().collect();
    let mut next = Some(first_of(prefix));
    std::iter::from_fn(move || {
        loop {
            let address = next.filter(|address| prefix.contains(address))?;
            match longer
                .iter()
                .filter(|other| other.contains(&address))
                .max_by_key(|other| other.broadcast())
            {
                Some(other) => next = successor(other.broadcast()),
                None => {
                    next = successor(address);
                    return Some(address);
                }
            }
        }
    })
}

/// The first address that stands for a prefix. Those of "this network" (RFC 1122, 3.2.1.3) and of
/// IPv6's reserved blocks are routed in their own ways.
fn first_of(prefix: IpNet) -> IpAddr {
    const FIRST4: Ipv4Addr = Ipv4Addr::new(1, 0, 0, 0);
    const FIRST6: Ipv6Addr = Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0);
    match prefix {
        IpNet::V4(prefix) if prefix.contains(&FIRST4) => FIRST4.max(prefix.network()).into(),
        IpNet::V6(prefix) if prefix.contains(&FIRST6) => FIRST6.max(prefix.network()).into(),
        prefix => prefix.network(),
    }
}

fn successor(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(ip) => ip.to_bits().checked_add(1).map(|ip| Ipv4Addr::from_bits(ip).into()),
        IpAddr::V6(ip) => ip.to_bits().checked_add(1).map(|ip| Ipv6Addr::from_bits(ip).into()),
    }
}

/// The prefixes without those that have the source of the next shorter prefix around them.
fn reduced(sources: SourcesByRoute) -> SourcesByRoute {
    let around = |prefix: IpNet| {
        std::iter::successors(prefix.supernet(), IpNet::supernet)
            .find_map(|shorter| sources.get(&shorter))
    };
    let kept = sources.iter().filter(|(prefix, source)| around(**prefix) != Some(*source));
    kept.map(|(prefix, source)| (*prefix, *source)).collect()
}

/// The destination of a route to other hosts of global scope, in any table.
fn unicast_prefix(route: &RouteMessage) -> Option<IpNet> {
    if route.header.kind != RouteType::Unicast {
        return None;
    }
    let destination = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    });
    let unspecified = match route.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let address = destination.unwrap_or(unspecified);
    let is_local = match address {
        IpAddr::V4(ip) => ip.is_multicast() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_multicast() || ip.is_unicast_link_local(),
    };
    (!is_local).then(|| IpNet::new(address, route.header.destination_prefix_length).ok())?
}

/// The devices that a route sends packets to.
pub(super) fn devices(route: &RouteMessage) -> impl Iterator<Item = u32> {
    route.attributes.iter().flat_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    })
}

fn preferred_source(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::PrefSource(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_stands_for_a_prefix_only_outside_longer_prefixes() {
        let rows: [(&str, &[&str], &[&str]); 7] = [
            ("10.244.2.0/24", &[], &["10.244.2.0", "10.244.2.1"]),
            ("0.0.0.0/0", &["10.0.0.0/8"], &["1.0.0.0", "1.0.0.1"]),
            ("0.0.0.0/0", &["0.0.0.0/1"], &["128.0.0.0", "128.0.0.1"]),
            ("10.0.0.0/8", &["10.0.0.0/16", "10.1.0.0/16"], &["10.2.0.0", "10.2.0.1"]),
            ("10.0.0.0/31", &["10.0.0.0/32", "10.0.0.1/32"], &[]),
            ("::/0", &["2000::/3"], &["4000::", "4000::1"]),
            ("255.255.255.255/32", &[], &["255.255.255.255"]),
        ];
        for (prefix, longer, expected) in rows {
            let mut all: BTreeSet<IpNet> = longer.iter().map(|text| net(text)).collect();
            all.insert(net(prefix));
            let found: Vec<IpAddr> = representatives(net(prefix), &all).take(2).collect();
            let expected: Vec<IpAddr> = expected.iter().map(|text| ip(text)).collect();
            assert_eq!(found, expected, "{prefix} beside {longer:?}");
        }
    }

    #[test]
    fn a_prefix_with_the_source_of_the_one_around_it_is_left_out() {
        let table = |rows: &[(&str, &str)]| -> SourcesByRoute {
            rows.iter().map(|(prefix, source)| (net(prefix), ip(source))).collect()
        };
        let all = table(&[
            ("0.0.0.0/0", "192.0.2.1"),
            ("192.0.2.0/24", "192.0.2.1"),
            ("10.244.0.0/16", "192.0.2.1"),
            ("10.244.2.0/24", "10.244.1.0"),
            ("10.244.2.128/25", "10.244.1.0"),
            ("10.244.2.192/26", "192.0.2.1"),
            ("2001:db8::/64", "2001:db8::1"),
        ]);
        let expected = table(&[
            ("0.0.0.0/0", "192.0.2.1"),
            ("10.244.2.0/24", "10.244.1.0"),
            ("10.244.2.192/26", "192.0.2.1"),
            ("2001:db8::/64", "2001:db8::1"),
        ]);
        assert_eq!(reduced(all), expected);
    }
}
