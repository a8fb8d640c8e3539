//! What the maps should hold, as functions of the snapshot.
//!
//! Nothing here knows which index or slot anything has, or what the maps hold now.
//! The same objects give the same result, in the same order.

pub mod claims;
pub mod endpoints;
pub mod frontends;
pub mod health_checks;
pub mod no_local_endpoints;
pub mod node_ports;
pub mod service_prefixes;
pub mod settings;

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use lb_common::abi::{
    backend::{IN_CLUSTER_SET, IN_SLICE, ON_THIS_NODE, READY, TERMINATING, THIS_HOST},
    frontend::{Frontend as FrontendEntry, FrontendKind},
    service::Service as ServiceEntry,
    settings::Timeouts,
};

use crate::{
    model::{
        IpFamily, Refusal, RefusalReason,
        event::ObjectKind,
        service::{Port, Service},
        slice::Endpoint,
    },
    options::ExternalMode,
    snapshot::{Entry, nodes::NodeIndex},
};

/// What must be known of this node from elsewhere than the objects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// The addresses of this node.
    pub addresses: BTreeSet<IpAddr>,
    /// Those on which node ports are served, loopback addresses among them.
    pub node_port_addresses: BTreeSet<IpAddr>,
    /// What a pod sees when it reaches itself over IPv4.
    pub node_source4: Option<Ipv4Addr>,
    /// What a pod sees when it reaches itself over IPv6.
    pub node_source6: Option<Ipv6Addr>,
    /// The prefixes that the addresses of pods lie in, as far as they are known.
    pub pod_prefixes: Vec<IpNet>,
    /// Whether every client of a ClusterIP gets an address of this node.
    pub masquerade_all: bool,
    /// The first and the last port that the kernel gives to sockets of this node.
    pub local_ports: (u16, u16),
    /// How long flows live.
    pub timeouts: Timeouts,
    /// The kernel's CONFIG_HZ.
    pub ticks_per_second: u32,
    /// Whether connect() is translated for the node's own sockets alone.
    pub only_node_sockets: bool,
}

/// Where this node is: what the choice of endpoints depends on beside the Service.
#[derive(Clone, Copy, Debug)]
pub struct Locality<'a> {
    /// The node's name.
    pub node: &'a str,
    /// The node's zone.
    pub zone: Option<&'a str>,
    /// The node's addresses.
    pub addresses: &'a BTreeSet<IpAddr>,
    /// Those on which node ports are served.
    pub node_port_addresses: &'a BTreeSet<IpAddr>,
    /// All nodes.
    pub nodes: &'a NodeIndex,
    /// How clients outside reach backends on other nodes, where the Service does not say.
    pub external_mode: ExternalMode,
}

/// An address that clients connect to; port 0 and protocol 0 stand for all of it, and the
/// unspecified address for those of all nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendAddress {
    /// The address.
    pub ip: IpAddr,
    /// The port.
    pub port: u16,
    /// The protocol's number.
    pub protocol: u8,
}

impl FrontendAddress {
    /// Whether it stands for a node port on any node.
    pub fn is_of_any_node(&self) -> bool {
        self.ip.is_unspecified()
    }
}

/// A frontend, and what is said of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DesiredFrontend {
    /// The address.
    pub at: FrontendAddress,
    /// What kind of address it is.
    pub kind: FrontendKind,
    /// The flags of the entry.
    pub flags: u8,
}

impl DesiredFrontend {
    /// Whether it is only for clients that the service port's ranges hold.
    pub fn is_ranged(&self) -> bool {
        self.flags & FrontendEntry::RANGED != 0
    }
}

/// What a service port is called within its Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortKey {
    /// The family.
    pub family: IpFamily,
    /// The protocol's number; 0 for a ClusterIP as a whole.
    pub protocol: u8,
    /// The port's name; empty for an unnamed one.
    pub port: Box<str>,
}

/// A Service as it should be in the maps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DesiredService {
    /// One for each port, and one for the ClusterIP as a whole, in each family; in the
    /// order of their keys.
    pub ports: Vec<DesiredPort>,
}

/// An entry of SERVICES with all that belongs to it.
#[derive(Clone, Debug, PartialEq)]
pub struct DesiredPort {
    /// Its name.
    pub key: PortKey,
    /// What leads here, in the order of addresses.
    pub frontends: Vec<DesiredFrontend>,
    /// Who is let in where a frontend is [ranged](DesiredFrontend::is_ranged), in order.
    pub ranges: Vec<IpNet>,
    /// Seconds of session affinity; 0 = none.
    pub affinity_seconds: u32,
    /// The flags of the entry.
    pub flags: u32,
    /// For a ClusterIP as a whole: any port of the Service has a backend.
    pub has_backend: bool,
    /// Every endpoint that is in a slice, serving or not, in the order of addresses.
    pub backends: Vec<DesiredBackend>,
}

/// An entry of BACKENDS4 or BACKENDS6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DesiredBackend {
    /// The address.
    pub ip: IpAddr,
    /// The port.
    pub port: u16,
    /// The sets that it is a member of.
    pub sets: u8,
    /// What is known of it.
    pub flags: u8,
    /// The address of the node that it runs on, if that is another one and known.
    pub node: Option<IpAddr>,
}

impl DesiredBackend {
    /// What tells it from other backends of the service port.
    pub fn address(&self) -> (IpAddr, u16) {
        (self.ip, self.port)
    }
}

/// What the maps should hold for a Service with its slices.
pub fn service(entry: &Entry, locality: Locality<'_>) -> Option<DesiredService> {
    let service = entry.service.as_ref()?;
    let mut ports = Vec::with_capacity(service.cluster_ips.len() * (service.ports.len() + 1));
    for ip in &service.cluster_ips {
        let first = ports.len();
        let frontends = frontends::of_ports(service, *ip, locality.node_port_addresses);
        for (port, frontends) in service.ports.iter().zip(frontends) {
            ports.push(service_port(service, port, frontends, IpFamily::of(*ip), entry, locality));
        }
        let has_backend = ports[first..]
            .iter()
            .any(|port| port.backends.iter().any(|backend| backend.sets & IN_CLUSTER_SET != 0));
        ports.push(address(*ip, has_backend));
    }
    ports.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    Some(DesiredService { ports })
}

/// The frontends that a Service asks for; others may be older.
pub fn claims(service: &Service, node_port_addresses: &BTreeSet<IpAddr>) -> Vec<DesiredFrontend> {
    let mut claims = Vec::with_capacity(service.cluster_ips.len() * (service.ports.len() + 1));
    for ip in &service.cluster_ips {
        claims.push(frontends::of_address(*ip));
        claims.extend(frontends::of_ports(service, *ip, node_port_addresses).into_iter().flatten());
    }
    claims
}

fn service_port(
    service: &Service,
    port: &Port,
    frontends: Vec<DesiredFrontend>,
    family: IpFamily,
    entry: &Entry,
    locality: Locality<'_>,
) -> DesiredPort {
    let is_ranged = frontends.iter().any(DesiredFrontend::is_ranged);
    DesiredPort {
        key: PortKey { family, protocol: port.protocol.number(), port: port.name.clone() },
        frontends,
        ranges: if is_ranged {
            frontends::allowed_clients(service, family, locality.addresses)
        } else {
            Vec::new()
        },
        affinity_seconds: service.affinity_seconds,
        flags: flags(service, locality.external_mode),
        has_backend: false,
        backends: backends(service, port, family, entry, locality),
    }
}

fn flags(service: &Service, external_mode: ExternalMode) -> u32 {
    let policy = service.policy;
    let is_dsr = service.external_mode.unwrap_or(external_mode) == ExternalMode::Dsr;
    let flags = [
        (policy.internal_local, ServiceEntry::INTERNAL_LOCAL),
        (policy.externally_reachable && policy.external_local, ServiceEntry::EXTERNAL_LOCAL),
        (policy.externally_reachable && is_dsr, ServiceEntry::DSR),
    ];
    flags.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).sum()
}

/// The entry of a ClusterIP as a whole.
fn address(ip: IpAddr, has_backend: bool) -> DesiredPort {
    DesiredPort {
        key: PortKey { family: IpFamily::of(ip), protocol: 0, port: "".into() },
        frontends: vec![frontends::of_address(ip)],
        ranges: Vec::new(),
        affinity_seconds: 0,
        flags: ServiceEntry::ADDRESS,
        has_backend,
        backends: Vec::new(),
    }
}

fn backends(
    service: &Service,
    port: &Port,
    family: IpFamily,
    entry: &Entry,
    locality: Locality<'_>,
) -> Vec<DesiredBackend> {
    let mut found: Vec<(u16, &Endpoint)> = Vec::new();
    for slice in entry.slices().filter(|slice| slice.family == family) {
        let is_meant = |name: &str, protocol| *name == *port.name && protocol == port.protocol;
        for slice_port in slice.ports.iter().filter(|port| is_meant(&port.name, port.protocol)) {
            found.extend(slice.endpoints.iter().map(|endpoint| (slice_port.number, endpoint)));
        }
    }
    // Stable: of two that say different things, the slice that is first by name wins.
    found.sort_by_key(|(number, endpoint)| (endpoint.address, *number, !endpoint.is_local));
    found.dedup_by_key(|(number, endpoint)| (endpoint.address, *number));
    let endpoints: Vec<&Endpoint> = found.iter().map(|(_, endpoint)| *endpoint).collect();
    let sets = endpoints::choose(&endpoints, service.policy, locality);
    let backend = |((number, endpoint), sets): (&(u16, &Endpoint), u8)| {
        let is_host = locality.addresses.contains(&endpoint.address);
        let on_node = if endpoint.is_local || is_host { ON_THIS_NODE } else { 0 };
        let conditions = [
            (is_host, THIS_HOST),
            (endpoint.is_ready, READY),
            (endpoint.is_terminating, TERMINATING),
        ];
        let conditions = conditions.iter().filter(|(is_met, _)| *is_met);
        let flags = conditions.fold(on_node | IN_SLICE, |flags, (_, flag)| flags | flag);
        let node = endpoint.node.as_deref().filter(|_| on_node == 0);
        let node = node.and_then(|node| locality.nodes.internal_ip(node, family));
        DesiredBackend { ip: endpoint.address, port: *number, sets, flags, node }
    };
    found.iter().zip(sets).map(backend).collect()
}

/// `namespace/service:port`, as NAMES holds it; without `:port` for an unnamed port.
pub fn display_name(service: &str, key: &PortKey) -> String {
    if key.port.is_empty() { service.to_owned() } else { format!("{service}:{}", key.port) }
}

/// A Service that lost an address to an older one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conflict {
    /// The one that lost, as `namespace/name`.
    pub service: Arc<str>,
    /// The one that has the address.
    pub owner: Arc<str>,
    /// The address.
    pub frontend: FrontendAddress,
}

impl Conflict {
    /// The refusal of the Service that lost the address.
    pub fn refusal(&self) -> Refusal {
        let FrontendAddress { ip, port, .. } = self.frontend;
        let lost = if self.frontend.is_of_any_node() {
            format!("node port {port}")
        } else {
            format!("{ip} port {port}")
        };
        Refusal {
            kind: ObjectKind::Service,
            object: (&*self.service).into(),
            uid: String::new(),
            field: "spec.ports".to_owned(),
            reason: RefusalReason::AddressInUse,
            message: format!("{lost} belongs to the older Service {}", self.owner),
        }
    }
}
