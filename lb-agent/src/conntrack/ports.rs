//! Source ports of this node that are in use by conntrack or by lb.
//!
//! Both pick source ports for connections that they translate, and neither knows the other's. If a
//! backend saw one port twice, both connections would break. So when lb takes over from another proxy
//! the ports of conntrack are reserved in the table of flows, by flows of no Service, which change nothing
//! of a packet, and before a drain the ports of lb's flows are reserved in conntrack.

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
    time::Duration,
};

use lb_common::{
    abi::{
        address::{Address, Address4, Address6, Be16},
        flow::{ANSWERED, Action, CONFIRMED, Flow, FlowKey, RESET, Tuple},
        frontend::TCP,
        settings::{Lifetimes, Settings},
        traffic::NO_SERVICE,
    },
    balance::{NewFlow, track},
    flow_table::PROTECTED,
};
use lb_control::model::source_ports::may_be_drawn;
use nix::ifaddrs::getifaddrs;

use super::table::{Conntrack, Direction};
use crate::maps::{
    flow_table::{FlowAddress, FlowTable, Flows, LiveFlow},
    pins::Pins,
    timeouts,
};

/// The id of no backend.
const NO_BACKEND: u32 = u32::MAX;

/// Whether lb has no flows yet, so that the connections of the node were another proxy's until now.
///
/// # Errors
/// Those of the maps.
pub fn is_takeover(pins: &Pins) -> io::Result<bool> {
    let table4 = FlowTable::<Address4>::readable(pins).map_err(io::Error::other)?;
    let table6 = FlowTable::<Address6>::readable(pins).map_err(io::Error::other)?;
    Ok(table4.live().next().is_none() && table6.live().next().is_none())
}

/// At most this part of the places is reserved at a time. It is done twice, see
/// [`run`](crate::run).
const SHARE: u32 = 20;

/// Reserves in the table of flows the source ports that TCP connections of conntrack use at addresses of this
/// node, for as long as a port rests whose connection is closed: two minutes by default. Returns how many.
/// UDP needs no reservation: the programs take over whole UDP flows.
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
    let at = Moment::new(lb_sys::ticks_now(clock.as_fd())?, lb_sys::ticks_per_second()?);
    let table4 = FlowTable::writable(pins).map_err(io::Error::other)?;
    let table6 = FlowTable::writable(pins).map_err(io::Error::other)?;
    Ok(insert(&table4, entries4, &at) + insert(&table6, entries6, &at))
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

/// When flows are inserted. The settings may not be programmed yet.
struct Moment {
    time: u32,
    protected: u32,
    lifetimes: Lifetimes,
}

impl Moment {
    fn new(jiffies: u32, ticks_per_second: u32) -> Self {
        let time_shift = Settings::time_shift_of(ticks_per_second);
        let settings = Settings { ticks_per_second, time_shift, ..Settings::default() };
        Self {
            time: settings.time(jiffies),
            protected: settings.times(PROTECTED),
            lifetimes: track::lifetimes(&timeouts::timeouts(ticks_per_second)),
        }
    }
}

/// Inserts flows with these replies. Returns how many have become reserved: a reply that another
/// flow has needs no reservation, and a full table has room for none.
fn insert<A: Address>(table: &impl Flows<A>, replies: Vec<Tuple<A>>, at: &Moment) -> usize {
    let most = (table.places() / SHARE) as usize;
    let reserved = replies.into_iter().take(most).filter(|reply| {
        let request = reply.reversed();
        let flow = Flow {
            rewrite: request,
            action: Action::REQUEST,
            state: ANSWERED | CONFIRMED | RESET,
            backend: NO_BACKEND,
            service: NO_SERVICE,
            last_seen: at.time,
            ..Flow::default()
        };
        let mut new = NewFlow::default();
        (new.flow, new.protected) = (flow, at.protected);
        (new.reply_key.tuple, new.reply_key.protocol) = (*reply, TCP.into());
        new.reply_action = Action::REPLY;
        let key = FlowKey { tuple: request, protocol: TCP.into() };
        table.insert(&key, &mut new, &at.lifetimes).is_ok()
    });
    reserved.count()
}

/// Reserves in conntrack, for `longest`, the source ports of this node that lb's flows use. Returns
/// how many.
///
/// # Errors
/// Those of netlink and of the maps. A kernel without conntrack is no error.
pub fn reserve_in_conntrack(pins: &Pins, longest: Duration) -> io::Result<usize> {
    let mut flows = Vec::new();
    collect_translated::<Address4, _>(pins, Ipv4Addr::from, &mut flows)?;
    collect_translated::<Address6, _>(pins, Ipv6Addr::from, &mut flows)?;
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
fn collect_translated<A: FlowAddress, I: Into<IpAddr>>(
    pins: &Pins,
    ip: impl Fn(A) -> I,
    flows: &mut Vec<Direction>,
) -> io::Result<()> {
    let table = FlowTable::<A>::readable(pins).map_err(io::Error::other)?;
    let at = |address: A, port: Be16| SocketAddr::new(ip(address).into(), port.get());
    let translated = table.live().filter(|LiveFlow { entry, .. }| {
        entry.translated.source != entry.request.source && !entry.actions[0].is_one_way()
    });
    flows.extend(translated.map(|flow| {
        let Tuple { source, source_port, destination, destination_port } = flow.entry.translated;
        Direction {
            source: at(source, source_port),
            destination: at(destination, destination_port),
            is_tcp: flow.protocol() == TCP,
        }
    }));
    Ok(())
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

#[cfg(test)]
mod tests {
    use lb_common::abi::flow_table::Direction;

    use super::*;
    use crate::maps::flow_table::{FlowTable, tests::key};

    #[test]
    fn a_reserved_port_is_a_flow_of_no_service_that_changes_nothing() {
        let table = FlowTable::<Address4>::anonymous(8).unwrap();
        let reply = key(443, TCP);
        let at = Moment::new(1_000_000, 250);
        assert_eq!(insert(&table, vec![reply.tuple, reply.tuple], &at), 1, "it is there once");
        let found = table.find(&reply, Direction::Reply).unwrap();
        let LiveFlow { word, entry, .. } = found;
        assert_eq!((entry.request, entry.translated), (reply.tuple.reversed(), entry.request));
        assert_eq!((entry.service, word.time()), (NO_SERVICE, 1_000_000 >> 4));
        assert_eq!(found.class().name(), "closed", "it makes room for connections");
        let others = (1000..1100).map(|port| key(port, TCP).tuple).collect();
        assert_eq!(insert(&table, others, &at), 3, "a twentieth of 64 places");
    }
}
