//! Rows of `get services` and `get frontends`.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use ipnet::IpNet;
use lb_common::abi::{
    backend::{Backend, IN_SLICE, ON_THIS_NODE, READY, TERMINATING},
    frontend::{Frontend, FrontendKey, FrontendKind, TCP, UDP},
    service::{Name, Service},
};
use lb_control::dataplane::PinnedState;
use serde::Serialize;

use super::GetError;
use crate::maps::{
    pins::Pins,
    read::{read_array, text_of},
    traffic::Carried,
};

/// A service port in one family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServiceRow {
    /// `namespace/service:port`, without `:port` for an unnamed port.
    pub name: String,
    /// 4 or 6.
    pub family: u8,
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// `address:port` of its frontends, without node ports of any node.
    pub frontends: Vec<String>,
    /// How many of its endpoints are ready.
    pub ready: u32,
    /// How many of its endpoints are terminating.
    pub terminating: u32,
    /// How many of its endpoints are ready and on this node.
    pub local: u32,
    /// How many backends serve it, cluster wide.
    pub cluster_backends: u32,
    /// How many backends of this node serve it.
    pub local_backends: u32,
    /// `Cluster` or `Local`.
    pub internal_traffic_policy: &'static str,
    /// `Cluster` or `Local`; `Cluster` if clients outside cannot reach it.
    pub external_traffic_policy: &'static str,
    /// `snat` or `dsr`: how clients outside reach backends on other nodes; null if clients
    /// outside cannot reach it.
    pub external_mode: Option<&'static str>,
    /// The clients that the load balancer's addresses admit; empty if they admit all.
    pub source_ranges: Vec<String>,
    /// Session affinity by client for so many seconds; null without.
    pub affinity_seconds: Option<u32>,
    /// Live flows that are translated packet by packet.
    pub flows: u64,
    /// Translated packets of both directions; null if they are not counted.
    pub packets: Option<u64>,
    /// Their bytes.
    pub bytes: Option<u64>,
    /// Packets and calls that were rejected or dropped, by reason.
    pub drops: BTreeMap<&'static str, u64>,
    /// Index into SERVICES.
    pub index: u32,
}

/// An address that clients connect to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FrontendRow {
    /// `address:port`; the address alone for a ClusterIP as a whole.
    pub address: String,
    /// `tcp`, `udp`, or `any` for a ClusterIP as a whole.
    pub protocol: &'static str,
    /// `cluster_ip`, `cluster_ip_address` (a ClusterIP as a whole), `external_address` (likewise),
    /// `node_port`, `any_node`
    /// (a node port at another node's address) or `external` (a load balancer's address or an
    /// external IP).
    pub kind: &'static str,
    /// Whether only clients in the service port's source ranges are admitted.
    pub restricted: bool,
    /// The service port it leads to.
    pub service: String,
    /// Index into SERVICES.
    pub index: u32,
}

/// `tcp`, `udp`, or `any`.
pub(super) fn protocol_name(protocol: u8) -> &'static str {
    match protocol {
        TCP => "tcp",
        UDP => "udp",
        _ => "any",
    }
}

/// The names that service ports have, with their indices.
pub(super) fn live_names(pins: &Pins) -> Result<Vec<(u32, Name)>, GetError> {
    let names = read_array::<Name>(pins, "NAMES")?;
    Ok((0..).zip(names).filter(|(_, name)| name.length > 0).collect())
}

/// The names of service ports by their index.
pub(super) struct ServiceNames<'a>(HashMap<u32, &'a Name>);

impl<'a> ServiceNames<'a> {
    pub(super) fn new(names: &'a [(u32, Name)]) -> Self {
        Self(names.iter().map(|(index, name)| (*index, name)).collect())
    }

    /// The name of a service port; its index if the service port is gone.
    pub(super) fn text(&self, index: u32) -> String {
        self.0.get(&index).map_or_else(|| format!("#{index}"), |name| text_of(name))
    }

    pub(super) fn protocol(&self, index: u32) -> &'static str {
        self.0.get(&index).map_or("any", |name| protocol_name(name.protocol))
    }
}

struct AnyFrontend {
    address: IpAddr,
    port: u16,
    protocol: u8,
    value: Frontend,
}

impl AnyFrontend {
    fn new<A: Copy>(entry: &(FrontendKey<A>, Frontend), address: impl Into<IpAddr>) -> Self {
        let (key, value) = *entry;
        Self { address: address.into(), port: key.port.get(), protocol: key.protocol, value }
    }

    fn is_of_any_node(&self) -> bool {
        self.address.is_unspecified()
    }

    fn text(&self) -> String {
        if self.protocol == 0 {
            return self.address.to_string();
        }
        SocketAddr::new(self.address, self.port).to_string()
    }
}

/// The frontends of both families, in the order of their addresses.
fn all_frontends(state: &PinnedState) -> Vec<AnyFrontend> {
    let v4 = state
        .frontends4
        .iter()
        .map(|entry| AnyFrontend::new(entry, Ipv4Addr::from(entry.0.address)));
    let v6 = state
        .frontends6
        .iter()
        .map(|entry| AnyFrontend::new(entry, Ipv6Addr::from(entry.0.address)));
    let mut frontends: Vec<_> = v4.chain(v6).collect();
    frontends.sort_by_key(|frontend| (frontend.address, frontend.port, frontend.protocol));
    frontends
}

/// The flows and the traffic of service ports, by their index.
#[derive(Debug, Default)]
pub(super) struct Load {
    /// Live flows.
    pub(super) flows: HashMap<u32, u64>,
    /// Packets that were translated, rejected and dropped.
    pub(super) carried: Carried,
}

/// The rows of `get services`, by name, family and protocol.
pub(super) fn services(state: &PinnedState, load: &Load) -> Vec<ServiceRow> {
    let parts = Parts::new(state);
    let mut rows: Vec<ServiceRow> = state
        .names
        .iter()
        .filter_map(|(index, name)| {
            let service = state.services.get(*index as usize)?;
            let is_port = service.flags & Service::ADDRESS == 0;
            is_port.then(|| service_row(*index, name, service, &parts, load))
        })
        .collect();
    rows.sort_by(|a, b| (&a.name, a.family, a.protocol).cmp(&(&b.name, b.family, b.protocol)));
    rows
}

/// Entries of other maps that belong to service ports, by the index of the service port.
struct Parts {
    endpoints: HashMap<u32, EndpointCounts>,
    frontends: HashMap<u32, Vec<AnyFrontend>>,
    ranges: HashMap<u32, Vec<IpNet>>,
}

impl Parts {
    fn new(state: &PinnedState) -> Self {
        let mut endpoints = HashMap::new();
        count_endpoints(&state.backends4, &mut endpoints);
        count_endpoints(&state.backends6, &mut endpoints);
        let mut frontends: HashMap<u32, Vec<AnyFrontend>> = HashMap::new();
        for frontend in all_frontends(state) {
            frontends.entry(frontend.value.service).or_default().push(frontend);
        }
        let mut ranges: HashMap<u32, Vec<IpNet>> = HashMap::new();
        for (index, range) in state.ranges() {
            ranges.entry(index).or_default().push(range);
        }
        ranges.values_mut().for_each(|ranges| ranges.sort_unstable());
        Self { endpoints, frontends, ranges }
    }
}

/// The endpoints of a service port.
#[derive(Clone, Copy, Default)]
struct EndpointCounts {
    ready: u32,
    terminating: u32,
    local: u32,
}

/// Counts the endpoints that are in a slice, by service port. A Service has an index for each
/// family.
fn count_endpoints<A>(backends: &[Backend<A>], counts: &mut HashMap<u32, EndpointCounts>) {
    for backend in backends.iter().filter(|backend| backend.flags & IN_SLICE != 0) {
        let is = |flags| u32::from(backend.flags & flags == flags);
        let count = counts.entry(backend.service).or_default();
        count.ready += is(READY);
        count.terminating += is(TERMINATING);
        count.local += is(READY | ON_THIS_NODE);
    }
}

fn service_row(
    index: u32,
    name: &Name,
    service: &Service,
    parts: &Parts,
    load: &Load,
) -> ServiceRow {
    let endpoints = parts.endpoints.get(&index).copied().unwrap_or_default();
    let frontends = parts.frontends.get(&index).map_or(&[][..], Vec::as_slice);
    let ranges = parts.ranges.get(&index).map_or(&[][..], Vec::as_slice);
    let Load { flows, carried } = load;
    let traffic = carried.traffic.get(&index).copied().unwrap_or_default();
    let is_counted = index < carried.counted;
    let is_outside = frontends
        .iter()
        .any(|frontend| frontend.protocol != 0 && !frontend.value.kind.is_internal());
    let mode = if service.flags & Service::DSR != 0 { "dsr" } else { "snat" };
    let shown = frontends.iter().filter(|frontend| !frontend.is_of_any_node());
    let policy = |flag| if service.flags & flag != 0 { "Local" } else { "Cluster" };
    ServiceRow {
        name: text_of(name),
        family: name.family,
        protocol: protocol_name(name.protocol),
        frontends: shown.map(AnyFrontend::text).collect(),
        ready: endpoints.ready,
        terminating: endpoints.terminating,
        local: endpoints.local,
        cluster_backends: service.cluster.length(),
        local_backends: service.local.length(),
        internal_traffic_policy: policy(Service::INTERNAL_LOCAL),
        external_traffic_policy: policy(Service::EXTERNAL_LOCAL),
        external_mode: is_outside.then_some(mode),
        source_ranges: ranges.iter().map(ToString::to_string).collect(),
        affinity_seconds: (service.affinity_seconds > 0).then_some(service.affinity_seconds),
        flows: flows.get(&index).copied().unwrap_or_default(),
        packets: is_counted.then_some(traffic.packets),
        bytes: is_counted.then_some(traffic.bytes),
        drops: carried.drops.get(&index).cloned().unwrap_or_default(),
        index,
    }
}

/// The rows of `get frontends`, by address and port.
pub(super) fn frontends(state: &PinnedState) -> Vec<FrontendRow> {
    let names = ServiceNames::new(&state.names);
    all_frontends(state)
        .iter()
        .map(|frontend| FrontendRow {
            address: frontend.text(),
            protocol: protocol_name(frontend.protocol),
            kind: match frontend.value.kind {
                FrontendKind::CLUSTER_IP => "cluster_ip",
                FrontendKind::CLUSTER_IP_ADDRESS => "cluster_ip_address",
                FrontendKind::NODE_PORT if frontend.is_of_any_node() => "any_node",
                FrontendKind::NODE_PORT => "node_port",
                FrontendKind::EXTERNAL => "external",
                FrontendKind::EXTERNAL_ADDRESS => "external_address",
                _ => "unknown",
            },
            restricted: frontend.value.flags & Frontend::RANGED != 0,
            service: names.text(frontend.value.service),
            index: frontend.value.service,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use lb_common::abi::{address::Be16, range::RangeKey, service::SlotRange, traffic::Traffic};

    use lb_common::abi::{
        backend::{IN_CLUSTER_SET, IN_LOCAL_SET, THIS_HOST},
        counter::{Hook, Reason},
    };

    use super::{
        super::{
            backends::backends,
            counters::{CounterRow, counters},
        },
        *,
    };

    fn name(text: &str, protocol: u8) -> Name {
        let mut name = Name {
            text: [0; Name::CAPACITY],
            length: text.len() as u8,
            family: 4,
            protocol,
            zero: 0,
        };
        name.text[..text.len()].copy_from_slice(text.as_bytes());
        name
    }

    fn state() -> PinnedState {
        let address = Ipv4Addr::new(10, 96, 0, 1).into();
        let port = FrontendKey::new(address, Be16::new(443), TCP);
        let frontend =
            Frontend { service: 0, kind: FrontendKind::CLUSTER_IP, ..Frontend::default() };
        let whole = Frontend { service: 1, kind: FrontendKind::CLUSTER_IP_ADDRESS, ..frontend };
        let (node, load_balancer) = ([192, 0, 2, 10], [203, 0, 113, 9]);
        let [node, load_balancer] = [node, load_balancer].map(|ip| Ipv4Addr::from(ip).into());
        let node_port = Frontend { kind: FrontendKind::NODE_PORT, ..frontend };
        let external =
            Frontend { kind: FrontendKind::EXTERNAL, flags: Frontend::RANGED, ..frontend };
        let backend = Backend {
            address: Ipv4Addr::new(10, 0, 0, 7).into(),
            port: Be16::new(6443),
            sets: IN_CLUSTER_SET | IN_LOCAL_SET,
            flags: ON_THIS_NODE | THIS_HOST | IN_SLICE | READY,
            ..Backend::default()
        };
        PinnedState {
            frontends4: vec![
                (FrontendKey::of_address(address), whole),
                (port, frontend),
                (FrontendKey::new(node, Be16::new(30443), TCP), node_port),
                (FrontendKey::new(load_balancer, Be16::new(443), TCP), external),
                (FrontendKey::of_any_node(Be16::new(30443), TCP), node_port),
            ],
            ranges4: vec![
                RangeKey::new(0, Ipv4Addr::new(192, 0, 2, 0).into(), 24),
                RangeKey::new(0, Ipv4Addr::new(10, 0, 0, 0).into(), 8),
                RangeKey::new(7, Ipv4Addr::new(11, 0, 0, 0).into(), 8),
            ],
            names: vec![
                (0, name("default/kubernetes:https", TCP)),
                (1, name("default/kubernetes", 0)),
            ],
            services: vec![
                Service {
                    cluster: SlotRange::new(0, 1),
                    affinity_seconds: 9,
                    flags: Service::EXTERNAL_LOCAL | Service::DSR,
                    ..Service::default()
                },
                Service { flags: Service::ADDRESS, ..Service::default() },
            ],
            backends4: vec![Backend { sets: 0, ..backend }, backend],
            ..PinnedState::default()
        }
    }

    #[test]
    fn a_cluster_ip_as_a_whole_is_a_frontend_but_no_service() {
        let rows = services(&state(), &Load::default());
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].name, "default/kubernetes:https");
        assert_eq!(rows[0].frontends, ["10.96.0.1:443", "192.0.2.10:30443", "203.0.113.9:443"]);
        assert_eq!((rows[0].cluster_backends, rows[0].affinity_seconds), (1, Some(9)));
        let addresses: Vec<_> = frontends(&state())
            .into_iter()
            .map(|row| (row.address, row.kind, row.restricted))
            .collect();
        let expected = [
            ("0.0.0.0:30443", "any_node", false),
            ("10.96.0.1", "cluster_ip_address", false),
            ("10.96.0.1:443", "cluster_ip", false),
            ("192.0.2.10:30443", "node_port", false),
            ("203.0.113.9:443", "external", true),
        ];
        let expected = expected.map(|(address, kind, is)| (address.to_owned(), kind, is));
        assert_eq!(addresses, expected);
    }

    #[test]
    fn a_service_shows_both_policies_and_its_source_ranges() {
        let row = services(&state(), &Load::default()).remove(0);
        assert_eq!(row.internal_traffic_policy, "Cluster");
        assert_eq!(row.external_traffic_policy, "Local");
        assert_eq!(row.external_mode, Some("dsr"));
        assert_eq!(row.source_ranges, ["10.0.0.0/8", "192.0.2.0/24"]);
    }

    #[test]
    fn a_service_shows_its_endpoints_and_its_traffic() {
        let mut state = state();
        let backend = state.backends4[1];
        let flags = IN_SLICE | TERMINATING;
        state.backends4.push(Backend { sets: 0, flags, ..backend });
        state.backends4.push(Backend { flags: IN_SLICE | READY, ..backend });
        state.backends4.push(Backend { sets: 0, flags: IN_SLICE, ..backend });
        state.backends4.push(Backend { sets: 0, flags: 0, ..backend });
        let mut load = Load::default();
        let row = services(&state, &load).remove(0);
        assert_eq!((row.ready, row.terminating, row.local), (3, 1, 2));
        assert_eq!((row.packets, row.bytes, row.flows), (None, None, 0));
        load.flows.insert(0, 3);
        load.carried.counted = 1;
        load.carried.traffic.insert(0, Traffic { packets: 5, bytes: 700 });
        load.carried.drops.insert(0, BTreeMap::from([("no_endpoint", 2)]));
        let row = services(&state, &load).remove(0);
        assert_eq!((row.packets, row.bytes, row.flows), (Some(5), Some(700), 3));
        assert_eq!(row.drops, BTreeMap::from([("no_endpoint", 2)]));
    }

    #[test]
    fn a_service_without_frontends_for_clients_outside_has_no_external_mode() {
        let mode = |service: &dyn Fn(&mut PinnedState)| {
            let mut state = state();
            service(&mut state);
            services(&state, &Load::default()).remove(0).external_mode
        };
        assert_eq!(mode(&|state| state.services[0].flags = 0), Some("snat"));
        let inside = |state: &mut PinnedState| state.frontends4.truncate(2);
        assert_eq!(mode(&inside), None);
    }

    #[test]
    fn a_backend_on_another_node_shows_its_address() {
        let mut state = state();
        state.backends4[1].flags = 0;
        assert_eq!(backends(&state)[0].node, None);
        state.backends4[1].node = Ipv4Addr::new(192, 0, 2, 11).into();
        let row = backends(&state).remove(0);
        assert_eq!((row.place, row.node.as_deref()), ("other_node", Some("192.0.2.11")));
    }

    #[test]
    fn a_backend_in_no_set_is_not_shown() {
        let rows = backends(&state());
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].node, None);
        assert_eq!((rows[0].id, rows[0].place), (1, "this_host"));
        assert_eq!(rows[0].sets, ["cluster", "local"]);
        assert_eq!(rows[0].address, "10.0.0.7:6443");
    }

    #[test]
    fn counters_that_never_counted_are_left_out() {
        let mut sums = vec![0; 4096];
        sums[Hook::ToPod.counter(Reason::Reply) as usize] = 3;
        let expected = CounterRow { hook: "to_pod", reason: "reply", count: 3 };
        assert_eq!(counters(&sums), [expected]);
    }
}
