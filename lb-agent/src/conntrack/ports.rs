//! Source ports of this node that are in use by conntrack or by lb.
//!
//! Both pick source ports for connections that they translate, and neither knows the other's. If a
//! backend saw one port twice, both connections would break. So at start the ports of conntrack are
//! reserved in FLOWS, by entries that change nothing of a packet, and before a drain the ports of
//! lb's flows are reserved in conntrack.

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
    time::Duration,
};

use lb_common::abi::{
    address::{Address, Address4, Address6, Be16},
    flow::{ANSWERED, Action, Flow, FlowKey, Tuple},
    frontend::TCP,
};
use lb_control::model::source_ports::may_be_drawn;
use lb_sys::TypedMap;
use nix::ifaddrs::getifaddrs;

use super::table::{Conntrack, Direction};
use crate::maps::{pins::Pins, read::opened, timeouts};

/// Neither the index of a service port nor the id of a backend.
const NONE: u32 = u32::MAX;

/// Reserves in FLOWS the source ports that TCP connections of conntrack use at addresses of this
/// node. Returns how many. UDP needs no reservation: the programs take over whole UDP flows.
///
/// # Errors
/// Those of netlink and of the maps. A kernel without conntrack is no error.
pub fn reserve(pins: &Pins) -> io::Result<usize> {
    let (own, local_ports) = (addresses()?, timeouts::local_ports());
    let is_in_range = |reply: &Direction| may_be_drawn(reply.destination.port(), local_ports);
    let mut entries4 = Vec::new();
    let mut entries6 = Vec::new();
    let Some(mut conntrack) = Conntrack::open()? else { return Ok(0) };
    conntrack.replies(|reply| {
        if reply.is_tcp && is_in_range(&reply) && own.contains(&reply.destination.ip()) {
            match (reply.source.ip(), reply.destination.ip()) {
                (IpAddr::V4(source), IpAddr::V4(destination)) => {
                    entries4.push(tuple::<Address4>(source, destination, &reply));
                }
                (IpAddr::V6(source), IpAddr::V6(destination)) => {
                    entries6.push(tuple::<Address6>(source, destination, &reply));
                }
                _ => {}
            }
        }
    })?;
    if entries4.is_empty() && entries6.is_empty() {
        return Ok(0);
    }
    let clock = lb_sys::obj_get(&pins.clock())?;
    let now = lb_sys::ticks_now(clock.as_fd())?;
    Ok(insert(pins, "FLOWS4", entries4, now)? + insert(pins, "FLOWS6", entries6, now)?)
}

fn tuple<A: Address>(
    source: impl Into<A>,
    destination: impl Into<A>,
    reply: &Direction,
) -> Tuple<A> {
    Tuple {
        source: source.into(),
        destination: destination.into(),
        source_port: Be16::new(reply.source.port()),
        destination_port: Be16::new(reply.destination.port()),
    }
}

fn insert<A: Address>(
    pins: &Pins,
    map: &'static str,
    replies: Vec<Tuple<A>>,
    now: u32,
) -> io::Result<usize> {
    let map: TypedMap<FlowKey<A>, Flow<A>> =
        opened(pins, map, TypedMap::new).map_err(io::Error::other)?;
    let mut inserted = 0;
    for tuple in replies {
        let key = FlowKey { tuple, protocol: TCP.into() };
        if map.get(&key)?.is_some() {
            continue;
        }
        let flow = Flow {
            rewrite: tuple,
            action: Action::REPLY,
            state: ANSWERED,
            backend: NONE,
            service: NONE,
            last_seen: now,
            ..Flow::default()
        };
        map.set(&key, &flow)?;
        inserted += 1;
    }
    Ok(inserted)
}

/// Reserves in conntrack, for `longest`, the source ports of this node that lb's flows use. Returns
/// how many.
///
/// # Errors
/// Those of netlink and of the maps. A kernel without conntrack is no error.
pub fn reserve_in_conntrack(pins: &Pins, longest: Duration) -> io::Result<usize> {
    let mut flows = Vec::new();
    for map in ["FLOWS4", "EMBRYONIC4"] {
        collect_translated::<Address4, _>(pins, map, Ipv4Addr::from, &mut flows)?;
    }
    for map in ["FLOWS6", "EMBRYONIC6"] {
        collect_translated::<Address6, _>(pins, map, Ipv6Addr::from, &mut flows)?;
    }
    if flows.is_empty() {
        return Ok(0);
    }
    let Some(mut conntrack) = Conntrack::open()? else { return Ok(0) };
    for flow in &flows {
        conntrack.add(*flow, longest)?;
    }
    Ok(flows.len())
}

/// Adds the translated requests of flows whose source became an address of this node.
fn collect_translated<A: Address, I: Into<IpAddr>>(
    pins: &Pins,
    map: &'static str,
    ip: impl Fn(A) -> I,
    flows: &mut Vec<Direction>,
) -> io::Result<()> {
    let map: TypedMap<FlowKey<A>, Flow<A>> =
        opened(pins, map, TypedMap::new).map_err(io::Error::other)?;
    let at = |address: A, port: Be16| SocketAddr::new(ip(address).into(), port.get());
    map.visit(|keys, values| {
        let requests = keys.iter().zip(values).filter(|(key, flow)| {
            let action = flow.action;
            let is_source_translated = flow.rewrite.source != key.tuple.source;
            is_source_translated && !action.is_reply() && !action.is_one_way()
        });
        flows.extend(requests.map(|(key, flow)| Direction {
            source: at(flow.rewrite.source, flow.rewrite.source_port),
            destination: at(flow.rewrite.destination, flow.rewrite.destination_port),
            is_tcp: key.protocol == u32::from(TCP),
        }));
        true
    })
}

/// The addresses of this network namespace.
fn addresses() -> io::Result<HashSet<IpAddr>> {
    let all = getifaddrs().map_err(io::Error::from)?.filter_map(|entry| entry.address);
    Ok(all
        .filter_map(|address| {
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        })
        .collect())
}
