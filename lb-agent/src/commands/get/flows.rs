//! Rows of `get flows` and `get affinity`, from maps that the programs write.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
};

use lb_common::{
    abi::{
        address::{Address4, Address6, Be16},
        affinity::{Affinity, AffinityKey, BY_NETNS, BY_SOCKET},
        backend::Backend,
        flow::{ANSWERED, Action, CLIENT_FIN, RESET, SERVER_FIN, STREAM},
        flow_table::Direction,
        frontend::TCP,
        service::Name,
        settings::Settings,
        traffic::{DIRECT, NO_SERVICE},
    },
    flow_table::{Class, age},
};
use lb_sys::TypedMap;
use serde::Serialize;

use super::{
    GetError,
    services::{ServiceNames, protocol_name},
};
use crate::{
    maps::{
        flow_table::{self, FlowAddress, FlowTable, Flows as _, LiveFlow},
        pins::Pins,
        read::{opened, read_array, read_hash, read_settings, text_of},
    },
    options::values::ServicePattern,
};

/// A translated flow, as its requests are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FlowRow {
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// The source of a request before translation.
    pub source: String,
    /// The destination of a request before translation.
    pub destination: String,
    /// The source of a request after translation.
    pub new_source: String,
    /// The destination of a request after translation.
    pub new_destination: String,
    /// How requests are forwarded: `stack`, `route`, `loopback`, `hairpin`, `forward` or `tunnel`.
    pub action: &'static str,
    /// How replies are forwarded: `stack`, `hairpin`, `device`, `forward` or `direct`; null if none
    /// pass this node.
    pub reply_action: Option<&'static str>,
    /// The node that requests are encapsulated to; null if they are not encapsulated.
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
    /// `established`, `stream`, `answered`, `closed` or `unanswered`: flows of a later class are
    /// evicted first.
    pub class: &'static str,
}

/// Which flows to show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowFilter {
    /// Only flows of this Service, or of this port of it.
    pub service: Option<ServicePattern>,
    /// Only flows with this address at either end, before or after translation.
    pub address: Option<IpAddr>,
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
    settings: Settings,
}

impl Clock {
    fn open(pins: &Pins) -> Result<Self, GetError> {
        let now =
            || -> io::Result<u32> { lb_sys::ticks_now(lb_sys::obj_get(&pins.clock())?.as_fd()) };
        Ok(Self { now: now().ok(), settings: read_settings(pins)? })
    }

    /// The seconds since `last_seen`, in ticks.
    fn seconds_since(&self, last_seen: u32) -> Option<u32> {
        let ticks = self.now?.wrapping_sub(last_seen);
        // The entry was updated after the clock was read.
        let ticks = if ticks > u32::MAX / 2 { 0 } else { ticks };
        ticks.checked_div(self.settings.ticks_per_second)
    }

    /// The seconds since `time`, a flow's.
    fn seconds_idle(&self, time: u32) -> Option<u32> {
        let idle = age(time, self.settings.time(self.now?));
        flow_table::seconds(idle, &self.settings)
    }
}

/// The rows of `get flows`.
pub(super) fn flows(pins: &Pins, filter: &FlowFilter) -> Result<Vec<FlowRow>, GetError> {
    let clock = Clock::open(pins)?;
    let names = live_names(pins)?;
    let services = filter.service.as_ref().map(|pattern| {
        let of_it = names.iter().filter(|(_, name)| pattern.matches(&text_of(name)));
        of_it.map(|(index, _)| *index).collect::<HashSet<u32>>()
    });
    let names = ServiceNames::new(&names);
    let mut rows = Vec::new();
    let address4 = |ip: IpAddr| if let IpAddr::V4(ip) = ip { Some(ip.into()) } else { None };
    let address6 = |ip: IpAddr| if let IpAddr::V6(ip) = ip { Some(ip.into()) } else { None };
    let (services, address) = (services.as_ref(), filter.address);
    let wanted = Wanted::<Address4>::new(services, address, address4);
    add_rows(pins, wanted, Ipv4Addr::from, &names, &clock, &mut rows)?;
    let wanted = Wanted::<Address6>::new(services, address, address6);
    add_rows(pins, wanted, Ipv6Addr::from, &names, &clock, &mut rows)?;
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

/// A filter for the flows of a family, before anything is made text of.
struct Wanted<'a, A> {
    services: Option<&'a HashSet<u32>>,
    address: Option<A>,
}

impl<'a, A: Copy + PartialEq> Wanted<'a, A> {
    /// `None` if no flow of the family is wanted.
    fn new(
        services: Option<&'a HashSet<u32>>,
        address: Option<IpAddr>,
        of_family: impl Fn(IpAddr) -> Option<A>,
    ) -> Option<Self> {
        Some(match address {
            None => Self { services, address: None },
            Some(ip) => Self { services, address: Some(of_family(ip)?) },
        })
    }

    fn has(&self, LiveFlow { entry, .. }: &LiveFlow<A>) -> bool {
        let ends = [entry.request, entry.translated].map(|side| [side.source, side.destination]);
        self.services.is_none_or(|services| services.contains(&entry.service))
            && self.address.is_none_or(|address| ends.as_flattened().contains(&address))
    }
}

fn add_rows<A: FlowAddress, I: Into<IpAddr>>(
    pins: &Pins,
    wanted: Option<Wanted<'_, A>>,
    address: impl Fn(A) -> I,
    names: &ServiceNames<'_>,
    clock: &Clock,
    rows: &mut Vec<FlowRow>,
) -> Result<(), GetError> {
    let Some(wanted) = wanted else { return Ok(()) };
    let table = FlowTable::<A>::readable(pins)?;
    let flows = table.live().filter(|flow| wanted.has(flow));
    rows.extend(flows.map(|flow| row(&flow, &address, names, clock)));
    Ok(())
}

/// How many live flows each service port has, by its index.
pub(super) fn live(pins: &Pins) -> Result<HashMap<u32, u64>, GetError> {
    // Without the clock all flows count as live.
    let clock = Clock::open(pins)?;
    let mut counts = HashMap::new();
    count_live::<Address4>(pins, &clock, &mut counts)?;
    count_live::<Address6>(pins, &clock, &mut counts)?;
    Ok(counts)
}

fn count_live<A: FlowAddress>(
    pins: &Pins,
    Clock { now, settings }: &Clock,
    counts: &mut HashMap<u32, u64>,
) -> Result<(), GetError> {
    let time = now.map(|now| settings.time(now));
    for flow in FlowTable::<A>::readable(pins)?.live() {
        let is_over = |time| flow_table::is_expired(flow.word, time, &settings.flow_lifetimes);
        if !time.is_some_and(is_over) {
            *counts.entry(flow.entry.service).or_default() += 1;
        }
    }
    Ok(())
}

fn live_names(pins: &Pins) -> Result<Vec<(u32, Name)>, GetError> {
    let names = read_array::<Name>(pins, "NAMES")?;
    Ok((0..).zip(names).filter(|(_, name)| name.length > 0).collect())
}

fn row<A: Copy, I: Into<IpAddr>>(
    flow: &LiveFlow<A>,
    address: impl Fn(A) -> I,
    names: &ServiceNames<'_>,
    clock: &Clock,
) -> FlowRow {
    let LiveFlow { word, entry, .. } = flow;
    let text = |ip: A, port: Be16| SocketAddr::new(address(ip).into(), port.get()).to_string();
    let [action, reply_action] =
        [Direction::Request, Direction::Reply].map(|of| entry.actions[of as usize]);
    let is_tunnel = action == Action::REQUEST_TUNNEL;
    // An encapsulated packet is not translated.
    let next = if is_tunnel { &entry.request } else { &entry.translated };
    let via: IpAddr = address(entry.translated.destination).into();
    FlowRow {
        protocol: protocol_name(flow.protocol()),
        source: text(entry.request.source, entry.request.source_port),
        destination: text(entry.request.destination, entry.request.destination_port),
        new_source: text(next.source, next.source_port),
        new_destination: text(next.destination, next.destination_port),
        action: action_name(action),
        reply_action: (reply_action != Action::default()).then(|| action_name(reply_action)),
        via: is_tunnel.then(|| via.to_string()),
        state: state_names(flow.protocol(), word.state()),
        service: match entry.service {
            NO_SERVICE | DIRECT => OF_NO_SERVICE.to_owned(),
            service => names.text(service),
        },
        backend: entry.backend,
        idle_seconds: clock.seconds_idle(word.time()),
        half_open: flow.protocol() == TCP && flow.class() == Class::Unanswered,
        class: flow.class().name(),
    }
}

/// In place of the service port, of a flow that only reserves the source port of a connection of the
/// kernel, or of a client that talks to a backend itself.
const OF_NO_SERVICE: &str = "-";

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
    let clock = Clock::open(pins)?;
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
    use lb_common::{
        abi::{
            flow::{CONFIRMED, Tuple},
            flow_table::{FlowEntry, RequestWord},
        },
        flow_table::IS_UDP,
    };

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

    fn flow(action: Action, reply_action: Action, state: u8) -> LiveFlow<Address4> {
        let ip = |last: u8| Ipv4Addr::new(192, 0, 2, last).into();
        let [source_port, destination_port] = [40_000, 80].map(Be16::new);
        let request = Tuple { source: ip(9), destination: ip(1), source_port, destination_port };
        let translated = Tuple { destination: ip(2), ..request };
        let actions = [action, reply_action];
        let entry = FlowEntry { request, translated, actions, service: 3, ..FlowEntry::default() };
        LiveFlow { place: 0, word: RequestWord::default().claimed(1).live(state, 100), entry }
    }

    fn shown(flow: &LiveFlow<Address4>) -> FlowRow {
        let clock = Clock { now: None, settings: Settings::default() };
        row(flow, Ipv4Addr::from, &ServiceNames::new(&[]), &clock)
    }

    #[test]
    fn an_encapsulated_packet_is_unchanged_inside_and_goes_to_a_node() {
        let row = shown(&flow(Action::REQUEST_TUNNEL, Action::default(), 0));
        assert_eq!((row.action, row.reply_action), ("tunnel", None));
        assert_eq!(row.via.as_deref(), Some("192.0.2.2"));
        assert_eq!((row.new_source, row.new_destination), (row.source, row.destination));
        let row = shown(&flow(Action::REQUEST_FORWARD, Action::REPLY_FORWARD, 0));
        assert_eq!((row.action, row.reply_action, row.via), ("forward", Some("forward"), None));
        assert_eq!(row.new_destination, "192.0.2.2:80");
    }

    #[test]
    fn a_row_says_the_state_and_the_class_of_its_flow() {
        let row = |state| shown(&flow(Action::REQUEST, Action::REPLY, state));
        let new = row(0);
        assert_eq!((new.protocol, new.half_open, new.class), ("tcp", true, "unanswered"));
        let open = row(ANSWERED | CONFIRMED);
        assert_eq!(
            (open.state, open.half_open, open.class),
            (vec!["answered"], false, "established")
        );
        let udp = row(IS_UDP | ANSWERED | STREAM);
        assert_eq!((udp.protocol, udp.half_open, udp.class), ("udp", false, "stream"));
        assert_eq!(udp.service, "#3");
        let mut reserved = flow(Action::REQUEST, Action::REPLY, ANSWERED | CONFIRMED);
        reserved.entry.service = NO_SERVICE;
        assert_eq!(shown(&reserved).service, "-");
    }

    #[test]
    fn flows_are_chosen_by_service_and_by_the_address_of_either_end() {
        let flow = flow(Action::REQUEST, Action::REPLY, 0);
        let (is, other) = (HashSet::from([3]), HashSet::from([4]));
        let v4 = |ip: IpAddr| if let IpAddr::V4(ip) = ip { Some(ip.into()) } else { None };
        let has = |services: Option<&HashSet<u32>>, address: Option<&str>| {
            let address = address.map(|text| text.parse().unwrap());
            Wanted::new(services, address, v4).is_some_and(|wanted| wanted.has(&flow))
        };
        assert!(has(None, None) && has(Some(&is), None) && !has(Some(&other), None));
        for end in ["192.0.2.9", "192.0.2.1", "192.0.2.2"] {
            assert!(has(None, Some(end)) && !has(Some(&other), Some(end)), "{end}");
        }
        assert!(!has(None, Some("192.0.2.3")) && !has(None, Some("2001:db8::1")));
    }

    #[test]
    fn an_unknown_time_is_not_made_up() {
        let settings = Settings { ticks_per_second: 100, time_shift: 3, ..Settings::default() };
        let clock = Clock { now: Some(1000), settings };
        assert_eq!(clock.seconds_since(500), Some(5));
        assert_eq!(clock.seconds_since(1003), Some(0));
        assert_eq!(clock.seconds_idle(settings.time(480)), Some(5));
        assert_eq!(clock.seconds_idle(settings.time(1016)), Some(0));
        let unknown = Clock { now: None, settings };
        assert_eq!((unknown.seconds_since(500), unknown.seconds_idle(9)), (None, None));
        let unset = Clock { now: Some(1000), settings: Settings::default() };
        assert_eq!((unset.seconds_since(500), unset.seconds_idle(9)), (None, None));
    }
}
