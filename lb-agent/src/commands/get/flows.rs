//! Rows of `get flows` and `get affinity`, from maps that the programs write.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
};

use lb_common::{
    abi::{
        address::{Address, Address4, Address6, Be16},
        affinity::{Affinity, AffinityKey, BY_NETNS, BY_SOCKET},
        backend::Backend,
        flow::{ANSWERED, Action, CLIENT_FIN, Flow, FlowKey, RESET, SERVER_FIN, STREAM, Tuple},
        frontend::TCP,
        service::Name,
        settings::{Settings, SettingsPair},
    },
    balance::track,
    packet::PacketKind,
};
use lb_sys::TypedMap;
use serde::Serialize;

use super::{
    GetError,
    services::{ServiceNames, protocol_name},
};
use crate::maps::{
    pins::Pins,
    read::{opened, read_array, read_hash, settings_in_force},
};

/// One direction of a translated flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FlowRow {
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// `request` (from the client) or `reply` (from the backend).
    pub direction: &'static str,
    /// The source of a packet before translation.
    pub source: String,
    /// The destination of a packet before translation.
    pub destination: String,
    /// The source of a packet after translation.
    pub new_source: String,
    /// The destination of a packet after translation.
    pub new_destination: String,
    /// How it is forwarded: `stack`, `route`, `loopback`, `hairpin`, `device`, `forward`, `tunnel`
    /// or `direct`.
    pub action: &'static str,
    /// The node that packets are encapsulated to; null if they are not encapsulated.
    pub via: Option<String>,
    /// The events of the connection so far: `answered`, `client_fin`, `server_fin`, `reset`.
    pub state: Vec<&'static str>,
    /// The service port.
    pub service: String,
    /// Index into BACKENDS4 or BACKENDS6.
    pub backend: u32,
    /// Seconds since the last recorded packet; null if the clock cannot be read.
    pub idle_seconds: Option<u32>,
    /// Whether the handshake is not complete yet.
    pub half_open: bool,
}

/// A client bound to a backend of a service port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AffinityRow {
    /// The service port.
    pub service: String,
    /// The client's address, `netns:<cookie>` of its network namespace, or
    /// `socket:<cookie>` of a datagram socket, which keeps to one backend without
    /// session affinity too.
    pub client: String,
    /// `address:port` of the backend; null if its id means another backend now.
    pub backend: Option<String>,
    /// Index into BACKENDS4 or BACKENDS6.
    pub backend_id: u32,
    /// Seconds since the client last opened a flow; null if the clock cannot be read.
    pub idle_seconds: Option<u32>,
}

/// Computes how long ago something was.
struct Clock {
    now: Option<u32>,
    ticks_per_second: u32,
}

impl Clock {
    fn open(pins: &Pins, settings: &[SettingsPair]) -> Self {
        let now =
            || -> io::Result<u32> { lb_sys::ticks_now(lb_sys::obj_get(&pins.clock())?.as_fd()) };
        let ticks_per_second = settings
            .first()
            .map_or(0, |pair| pair.copies[usize::from(pair.active == 1)].ticks_per_second);
        Self { now: now().ok(), ticks_per_second }
    }

    fn seconds_since(&self, last_seen: u32) -> Option<u32> {
        let ticks = self.now?.wrapping_sub(last_seen);
        // The entry was updated after the clock was read.
        let ticks = if ticks > u32::MAX / 2 { 0 } else { ticks };
        ticks.checked_div(self.ticks_per_second)
    }
}

/// The rows of `get flows`.
pub(super) fn flows(pins: &Pins) -> Result<Vec<FlowRow>, GetError> {
    let clock = Clock::open(pins, &read_array::<SettingsPair>(pins, "SETTINGS")?);
    let names = live_names(pins)?;
    let names = ServiceNames::new(&names);
    let mut rows = Vec::new();
    for (map, half_open) in [("FLOWS4", false), ("EMBRYONIC4", true)] {
        for (key, flow) in read_flows::<Address4>(pins, map)? {
            rows.push(row(&key, &flow, half_open, Ipv4Addr::from, &names, &clock));
        }
    }
    for (map, half_open) in [("FLOWS6", false), ("EMBRYONIC6", true)] {
        for (key, flow) in read_flows::<Address6>(pins, map)? {
            rows.push(row(&key, &flow, half_open, Ipv6Addr::from, &names, &clock));
        }
    }
    rows.sort_by(|a, b| {
        (&a.service, a.protocol, &a.source, &a.destination).cmp(&(
            &b.service,
            b.protocol,
            &b.source,
            &b.destination,
        ))
    });
    Ok(rows)
}

/// How many live flows each service port has, by its index.
pub(super) fn live(pins: &Pins) -> Result<HashMap<u32, u64>, GetError> {
    let settings = read_array::<SettingsPair>(pins, "SETTINGS")?;
    let settings = settings.first().map(settings_in_force).unwrap_or_default();
    // Without the clock all flows count as live.
    let now =
        lb_sys::obj_get(&pins.clock()).and_then(|clock| lb_sys::ticks_now(clock.as_fd())).ok();
    let mut counts = HashMap::new();
    for map in ["FLOWS4", "EMBRYONIC4"] {
        count_live::<Address4>(pins, map, &settings, now, &mut counts)?;
    }
    for map in ["FLOWS6", "EMBRYONIC6"] {
        count_live::<Address6>(pins, map, &settings, now, &mut counts)?;
    }
    Ok(counts)
}

/// Counts the entries of requests, because every flow has exactly one.
fn count_live<A: Address>(
    pins: &Pins,
    map: &'static str,
    settings: &Settings,
    now: Option<u32>,
    counts: &mut HashMap<u32, u64>,
) -> Result<(), GetError> {
    for (key, flow) in read_flows::<A>(pins, map)? {
        let kind = if key.protocol == u32::from(TCP) { PacketKind::Tcp } else { PacketKind::Udp };
        let is_over = now.is_some_and(|now| track::is_expired(&flow, kind, now, settings));
        if !flow.action.is_reply() && !is_over {
            *counts.entry(flow.service).or_default() += 1;
        }
    }
    Ok(())
}

fn live_names(pins: &Pins) -> Result<Vec<(u32, Name)>, GetError> {
    let names = read_array::<Name>(pins, "NAMES")?;
    Ok((0..).zip(names).filter(|(_, name)| name.length > 0).collect())
}

type Entry<A> = (FlowKey<A>, Flow<A>);

fn read_flows<A: Address>(pins: &Pins, map: &'static str) -> Result<Vec<Entry<A>>, GetError> {
    Ok(read_hash(&opened(pins, map, TypedMap::new)?, map)?)
}

fn row<A: Copy, I: Into<IpAddr>>(
    key: &FlowKey<A>,
    flow: &Flow<A>,
    half_open: bool,
    address: impl Fn(A) -> I,
    names: &ServiceNames<'_>,
    clock: &Clock,
) -> FlowRow {
    let text = |ip: A, port: Be16| SocketAddr::new(address(ip).into(), port.get()).to_string();
    let source = |tuple: &Tuple<A>| text(tuple.source, tuple.source_port);
    let destination = |tuple: &Tuple<A>| text(tuple.destination, tuple.destination_port);
    let is_tunnel = flow.action == Action::REQUEST_TUNNEL;
    // An encapsulated packet is not translated.
    let next = if is_tunnel { &key.tuple } else { &flow.rewrite };
    let via: IpAddr = address(flow.rewrite.destination).into();
    FlowRow {
        protocol: protocol_name(key.protocol as u8),
        direction: if flow.action.is_reply() { "reply" } else { "request" },
        source: source(&key.tuple),
        destination: destination(&key.tuple),
        new_source: source(next),
        new_destination: destination(next),
        action: action_name(flow.action),
        via: is_tunnel.then(|| via.to_string()),
        state: state_names(key.protocol as u8, flow.state),
        service: names.text(flow.service),
        backend: flow.backend,
        idle_seconds: clock.seconds_since(flow.last_seen),
        half_open,
    }
}

fn action_name(action: Action) -> &'static str {
    match action {
        Action::REQUEST | Action::REPLY => "stack",
        Action::REQUEST_ROUTE => "route",
        Action::REQUEST_LOOPBACK => "loopback",
        Action::REQUEST_HAIRPIN | Action::REPLY_HAIRPIN => "hairpin",
        Action::REPLY_INTO_DEVICE => "device",
        Action::REQUEST_FORWARD | Action::REPLY_FORWARD => "forward",
        Action::REQUEST_TUNNEL => "tunnel",
        Action::REPLY_DIRECT => "direct",
        _ => "unknown",
    }
}

fn state_names(protocol: u8, state: u8) -> Vec<&'static str> {
    let tcp = [
        (ANSWERED, "answered"),
        (CLIENT_FIN, "client_fin"),
        (SERVER_FIN, "server_fin"),
        (RESET, "reset"),
    ];
    let udp = [(ANSWERED, "answered"), (STREAM, "stream")];
    let names = if protocol == TCP { &tcp[..] } else { &udp };
    names.iter().filter(|(bit, _)| state & bit != 0).map(|(_, name)| *name).collect()
}

/// The rows of `get affinity`.
pub(super) fn affinity(pins: &Pins) -> Result<Vec<AffinityRow>, GetError> {
    let clock = Clock::open(pins, &read_array::<SettingsPair>(pins, "SETTINGS")?);
    let names = live_names(pins)?;
    let is_ipv6 =
        |service: u32| names.iter().any(|(index, name)| *index == service && name.family == 6);
    let backends4 = read_array::<Backend<Address4>>(pins, "BACKENDS4")?;
    let backends6 = read_array::<Backend<Address6>>(pins, "BACKENDS6")?;
    let map = opened(pins, "AFFINITY", TypedMap::<AffinityKey, Affinity>::new)?;
    let texts = ServiceNames::new(&names);
    let mut rows: Vec<AffinityRow> = read_hash(&map, "AFFINITY")?
        .iter()
        .map(|(key, entry)| {
            let is_ipv6 = is_ipv6(key.service);
            let id = entry.backend as usize;
            let backend = if is_ipv6 {
                backends6.get(id).and_then(|backend| held(backend, entry, Ipv6Addr::from))
            } else {
                backends4.get(id).and_then(|backend| held(backend, entry, Ipv4Addr::from))
            };
            AffinityRow {
                service: texts.text(key.service),
                client: client_of(key, is_ipv6),
                backend,
                backend_id: entry.backend,
                idle_seconds: clock.seconds_since(entry.last_seen),
            }
        })
        .collect();
    rows.sort_by(|a, b| (&a.service, &a.client).cmp(&(&b.service, &b.client)));
    Ok(rows)
}

fn client_of(key: &AffinityKey, is_ipv6: bool) -> String {
    let [low, high, ..] = key.client;
    let cookie = u64::from(low) | u64::from(high) << 32;
    match key.kind {
        BY_NETNS => format!("netns:{cookie}"),
        BY_SOCKET => format!("socket:{cookie}"),
        _ if is_ipv6 => Ipv6Addr::from(Address6 { be32: key.client }).to_string(),
        _ => Ipv4Addr::from(Address4 { be32: low }).to_string(),
    }
}

/// The backend's address, if its id still means the backend that was chosen.
fn held<A: Copy, I: Into<IpAddr>>(
    backend: &Backend<A>,
    entry: &Affinity,
    address: impl Fn(A) -> I,
) -> Option<String> {
    (u32::from(backend.generation) == entry.generation)
        .then(|| SocketAddr::new(address(backend.address).into(), backend.port.get()).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_an_address_or_a_namespace() {
        let v4 = AffinityKey {
            client: [u32::from_ne_bytes([10, 0, 0, 9]), 0, 0, 0],
            ..AffinityKey::default()
        };
        assert_eq!(client_of(&v4, false), "10.0.0.9");
        let netns = AffinityKey { kind: BY_NETNS, client: [7, 1, 0, 0], ..v4 };
        assert_eq!(client_of(&netns, true), format!("netns:{}", (1u64 << 32) + 7));
    }

    #[test]
    fn an_encapsulated_packet_is_unchanged_inside_and_goes_to_a_node() {
        let ip = |last: u8| Ipv4Addr::new(192, 0, 2, last).into();
        let [source_port, destination_port] = [40_000, 80].map(Be16::new);
        let tuple = Tuple { source: ip(9), destination: ip(1), source_port, destination_port };
        let mut flow = Flow { action: Action::REQUEST_TUNNEL, ..Flow::default() };
        (flow.rewrite.source, flow.rewrite.destination) = (ip(1), ip(2));
        let key = FlowKey { tuple, protocol: 6 };
        let (names, clock) = (ServiceNames::new(&[]), Clock { now: None, ticks_per_second: 0 });
        let row = |flow: &Flow<Address4>| row(&key, flow, false, Ipv4Addr::from, &names, &clock);
        let shown = row(&flow);
        assert_eq!((shown.direction, shown.action), ("request", "tunnel"));
        assert_eq!(shown.via.as_deref(), Some("192.0.2.2"));
        assert_eq!((shown.new_source, shown.new_destination), (shown.source, shown.destination));
        flow.action = Action::REQUEST_FORWARD;
        let shown = row(&flow);
        assert_eq!((shown.action, shown.via), ("forward", None));
        assert_eq!(shown.new_destination, "192.0.2.2:0");
    }

    #[test]
    fn an_unknown_time_is_not_made_up() {
        let clock = Clock { now: Some(1000), ticks_per_second: 100 };
        assert_eq!(clock.seconds_since(500), Some(5));
        assert_eq!(clock.seconds_since(1003), Some(0));
        assert_eq!(Clock { now: None, ..clock }.seconds_since(500), None);
        let unset = Clock { now: Some(1000), ticks_per_second: 0 };
        assert_eq!(unset.seconds_since(500), None);
    }
}
