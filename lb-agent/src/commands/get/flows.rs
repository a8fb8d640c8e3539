//! Rows of `get flows`, from maps that the programs write.
//!
//! There may be a million: they are read from mapped memory, and what is kept of each until it is printed
//! is a key of a few words. A flow that ends meanwhile is left out.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use lb_common::{
    abi::{
        address::{Address4, Address6, Be16},
        flow::{ANSWERED, Action, CLIENT_FIN, RESET, SERVER_FIN, STREAM},
        flow_table::Direction,
        frontend::TCP,
        service::Name,
        traffic::{DIRECT, NO_SERVICE},
    },
    flow_table::Class,
};
use serde::{Serialize, Serializer};

use super::{
    GetError,
    clock::Clock,
    services::{live_names, protocol_name},
    text::AddressText,
};
use crate::{
    maps::{
        flow_table::{self, FlowAddress, FlowTable, Flows as _, LiveFlow},
        pins::Pins,
        read::text_of,
    },
    options::values::ServicePattern,
};

/// A translated flow, as its requests are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FlowRow<'a> {
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// The source of a request before translation.
    pub source: AddressText,
    /// The destination of a request before translation.
    pub destination: AddressText,
    /// The source of a request after translation.
    pub new_source: AddressText,
    /// The destination of a request after translation.
    pub new_destination: AddressText,
    /// How requests are forwarded: `stack`, `route`, `loopback`, `hairpin`, `forward` or `tunnel`.
    pub action: &'static str,
    /// How replies are forwarded: `stack`, `hairpin`, `device`, `forward` or `direct`; null if none
    /// pass this node.
    pub reply_action: Option<&'static str>,
    /// The node that requests are encapsulated to; null if they are not encapsulated.
    pub via: Option<AddressText>,
    /// The events of the connection so far: `answered`, `client_fin`, `server_fin`, `reset`.
    pub state: States,
    /// The service port.
    pub service: Cow<'a, str>,
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

/// The events of a flow so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States {
    is_tcp: bool,
    state: u8,
}

impl States {
    fn names(self) -> impl Iterator<Item = &'static str> {
        let tcp = [
            (ANSWERED, "answered"),
            (CLIENT_FIN, "client_fin"),
            (SERVER_FIN, "server_fin"),
            (RESET, "reset"),
        ];
        let udp = [(ANSWERED, "answered"), (STREAM, "stream"), (0, ""), (0, "")];
        let names = if self.is_tcp { tcp } else { udp };
        names.into_iter().filter(move |(bit, _)| self.state & bit != 0).map(|(_, name)| name)
    }
}

impl Serialize for States {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.names())
    }
}

/// Which flows to show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowFilter {
    /// Only flows of this Service, or of this port of it.
    pub service: Option<ServicePattern>,
    /// Only flows with this address at either end, before or after translation.
    pub address: Option<IpAddr>,
}

/// The flows that are to be shown.
pub(super) struct Shown {
    table4: Option<FlowTable<Address4>>,
    table6: Option<FlowTable<Address6>>,
    keys: Vec<Key>,
    names: Names,
    clock: Clock,
}

/// What orders flows, and where to find one: by service port, protocol and client.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    /// The rank of the service port among its kind, and in the lowest bit whether it is not TCP.
    service: u32,
    is_ipv6: bool,
    source: u128,
    ports: [u16; 2],
    place: u32,
}

impl Shown {
    /// Reads which flows there are.
    pub(super) fn read(pins: &Pins, filter: &FlowFilter) -> Result<Self, GetError> {
        let clock = Clock::open(pins)?;
        let names = live_names(pins)?;
        let services = filter.service.as_ref().map(|pattern| {
            let of_it = names.iter().filter(|(_, name)| pattern.matches(&text_of(name)));
            of_it.map(|(index, _)| *index).collect::<HashSet<u32>>()
        });
        let names = Names::new(&names);
        let address4 = |ip: IpAddr| if let IpAddr::V4(ip) = ip { Some(ip.into()) } else { None };
        let address6 = |ip: IpAddr| if let IpAddr::V6(ip) = ip { Some(ip.into()) } else { None };
        let (services, address) = (services.as_ref(), filter.address);
        let mut keys = Vec::new();
        let wanted = Wanted::<Address4>::new(services, address, address4);
        let table4 = wanted.map(|wanted| -> Result<_, GetError> {
            let table = FlowTable::readable(pins)?;
            add_keys(
                &table,
                &wanted,
                false,
                |ip| u32::from(Ipv4Addr::from(ip)).into(),
                &names,
                &mut keys,
            );
            Ok(table)
        });
        let table4 = table4.transpose()?;
        let wanted = Wanted::<Address6>::new(services, address, address6);
        let table6 = wanted.map(|wanted| -> Result<_, GetError> {
            let table = FlowTable::readable(pins)?;
            add_keys(&table, &wanted, true, |ip| Ipv6Addr::from(ip).into(), &names, &mut keys);
            Ok(table)
        });
        let table6 = table6.transpose()?;
        Ok(Self { table4, table6, keys, names, clock })
    }

    /// Orders them. Before, they are as they are in memory, where they are read fastest.
    pub(super) fn sort(&mut self) {
        self.keys.sort_unstable();
    }

    /// Reads each of them once more.
    pub(super) fn rows(&self) -> impl Iterator<Item = FlowRow<'_>> {
        self.keys.iter().filter_map(|key| {
            if key.is_ipv6 {
                let flow = self.table6.as_ref()?.flow(key.place)?;
                return Some(row(&flow, Ipv6Addr::from, &self.names, &self.clock));
            }
            let flow = self.table4.as_ref()?.flow(key.place)?;
            Some(row(&flow, Ipv4Addr::from, &self.names, &self.clock))
        })
    }
}

fn add_keys<A: FlowAddress>(
    table: &FlowTable<A>,
    wanted: &Wanted<'_, A>,
    is_ipv6: bool,
    number: impl Fn(A) -> u128,
    names: &Names,
    keys: &mut Vec<Key>,
) {
    keys.extend(table.live().filter(|flow| wanted.has(flow)).map(|flow| {
        let request = &flow.entry.request;
        Key {
            service: names.rank(flow.entry.service) << 1 | u32::from(flow.protocol() != TCP),
            is_ipv6,
            source: number(request.source),
            ports: [request.source_port, request.destination_port].map(Be16::get),
            place: flow.place,
        }
    }));
}

/// The names of service ports, and their order, by the index of the service port.
struct Names(Vec<Option<(u32, String)>>);

impl Names {
    /// In place of the service port, of a flow that only reserves the source port of a connection of the
    /// kernel, or of a client that talks to a backend itself.
    const OF_NO_SERVICE: &str = "-";

    fn new(names: &[(u32, Name)]) -> Self {
        let mut texts: Vec<_> = names.iter().map(|(index, name)| (text_of(name), *index)).collect();
        texts.sort_unstable();
        let length = texts.iter().map(|(_, index)| *index as usize + 1).max().unwrap_or_default();
        let mut by_index = vec![None; length];
        let mut rank = 0;
        for (number, (text, index)) in texts.iter().enumerate() {
            // A Service has the same name in both families.
            if number.checked_sub(1).is_none_or(|before| texts[before].0 != *text) {
                rank += 1;
            }
            by_index[*index as usize] = Some((rank, text.clone()));
        }
        Self(by_index)
    }

    fn of(&self, service: u32) -> Option<&(u32, String)> {
        self.0.get(service as usize)?.as_ref()
    }

    /// The rank of a service port in the order: flows of no Service come first, flows of deleted service
    /// ports last.
    fn rank(&self, service: u32) -> u32 {
        match service {
            NO_SERVICE | DIRECT => 0,
            service => self.of(service).map_or(u32::MAX >> 1, |(rank, _)| *rank),
        }
    }

    /// The name; the index if the service port is gone.
    fn text(&self, service: u32) -> Cow<'_, str> {
        match service {
            NO_SERVICE | DIRECT => Self::OF_NO_SERVICE.into(),
            service => self
                .of(service)
                .map_or_else(|| format!("#{service}").into(), |(_, text)| text.as_str().into()),
        }
    }
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

fn row<'a, A: Copy, I: Into<IpAddr>>(
    flow: &LiveFlow<A>,
    address: impl Fn(A) -> I,
    names: &'a Names,
    clock: &Clock,
) -> FlowRow<'a> {
    let LiveFlow { word, entry, .. } = flow;
    let text = |ip: A, port: Be16| AddressText::with_port(address(ip).into(), port.get());
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
        via: is_tunnel.then(|| AddressText::of(via)),
        state: States { is_tcp: flow.protocol() == TCP, state: word.state() },
        service: names.text(entry.service),
        backend: entry.backend,
        idle_seconds: clock.seconds_idle(word.time()),
        half_open: flow.protocol() == TCP && flow.class() == Class::Unanswered,
        class: flow.class().name(),
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

#[cfg(test)]
mod tests {
    use lb_common::{
        abi::{
            flow::{CONFIRMED, Tuple},
            flow_table::{FlowEntry, RequestWord},
            settings::Settings,
        },
        flow_table::IS_UDP,
    };

    use super::*;

    fn flow(action: Action, reply_action: Action, state: u8) -> LiveFlow<Address4> {
        let ip = |last: u8| Ipv4Addr::new(192, 0, 2, last).into();
        let [source_port, destination_port] = [40_000, 80].map(Be16::new);
        let request = Tuple { source: ip(9), destination: ip(1), source_port, destination_port };
        let translated = Tuple { destination: ip(2), ..request };
        let actions = [action, reply_action];
        let entry = FlowEntry { request, translated, actions, service: 3, ..FlowEntry::default() };
        LiveFlow { place: 0, word: RequestWord::default().claimed(1).live(state, 100), entry }
    }

    fn shown(flow: &LiveFlow<Address4>) -> FlowRow<'static> {
        static NONE: Names = Names(Vec::new());
        let clock = Clock { now: None, settings: Settings::default() };
        row(flow, Ipv4Addr::from, &NONE, &clock)
    }

    #[test]
    fn an_encapsulated_packet_is_unchanged_inside_and_goes_to_a_node() {
        let row = shown(&flow(Action::REQUEST_TUNNEL, Action::default(), 0));
        assert_eq!((row.action, row.reply_action), ("tunnel", None));
        assert_eq!(row.via.as_deref(), Some("192.0.2.2"));
        assert_eq!((row.new_source, row.new_destination), (row.source, row.destination));
        let row = shown(&flow(Action::REQUEST_FORWARD, Action::REPLY_FORWARD, 0));
        assert_eq!((row.action, row.reply_action, row.via), ("forward", Some("forward"), None));
        assert_eq!(&*row.new_destination, "192.0.2.2:80");
    }

    #[test]
    fn a_row_says_the_state_and_the_class_of_its_flow() {
        let row = |state| shown(&flow(Action::REQUEST, Action::REPLY, state));
        let new = row(0);
        assert_eq!((new.protocol, new.half_open, new.class), ("tcp", true, "unanswered"));
        let open = row(ANSWERED | CONFIRMED);
        assert_eq!(
            (open.state.names().collect(), open.half_open, open.class),
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
    fn flows_are_ordered_by_the_name_of_their_service_port() {
        let name = |text: &str| {
            let mut name: Name = bytemuck::Zeroable::zeroed();
            name.length = text.len() as u8;
            name.text[..text.len()].copy_from_slice(text.as_bytes());
            name
        };
        let names = Names::new(&[(0, name("b/web")), (1, name("a/dns")), (4, name("b/web"))]);
        assert_eq!([1, 0, 4].map(|index| names.rank(index)), [1, 2, 2]);
        assert_eq!([1, 4, 3].map(|index| names.text(index).into_owned()), ["a/dns", "b/web", "#3"]);
        let others = [NO_SERVICE, DIRECT, 3, 9].map(|index| names.rank(index));
        assert_eq!(others, [0, 0, u32::MAX >> 1, u32::MAX >> 1]);
    }
}
