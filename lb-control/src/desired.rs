//! What the maps should hold, as functions of the snapshot.
//!
//! These functions do not know indices, slots, or what the maps hold now.
//! The same objects give the same result, in the same order.

pub mod backends;
pub mod claims;
pub mod endpoints;
pub mod frontends;
pub mod health_checks;
pub mod no_local_endpoints;
pub mod node_ports;
pub mod service_prefixes;
pub mod settings;
pub mod taken;

use std::{
    collections::{BTreeSet, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use lb_common::abi::{
    backend::IN_CLUSTER_SET,
    frontend::{Frontend as FrontendEntry, FrontendKind},
    service::Service as ServiceEntry,
    settings::Timeouts,
};

use claims::{Claim, ClaimKind};

use crate::{
    model::{
        IpFamily, Refusal, RefusalReason,
        event::ObjectKind,
        service::{Port, Service},
    },
    options::ExternalMode,
    snapshot::{Entry, nodes::NodeIndex},
};

/// Facts about this node that the objects do not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// The addresses of this node.
    pub addresses: BTreeSet<IpAddr>,
    /// Every address that an interface holds for a process of this node: a ClusterIP among them is
    /// that process's.
    pub held_addresses: BTreeSet<IpAddr>,
    /// The addresses on which node ports are served, loopback addresses among them.
    pub node_port_addresses: BTreeSet<IpAddr>,
    /// The source address that a pod sees when it reaches itself over IPv4.
    pub node_source4: Option<Ipv4Addr>,
    /// The source address that a pod sees when it reaches itself over IPv6.
    pub node_source6: Option<Ipv6Addr>,
    /// Whether the source address of packets to backends elsewhere depends on the route to them.
    pub is_source_by_route: bool,
    /// The prefixes of the pods' addresses, as far as they are known.
    pub pod_prefixes: Vec<IpNet>,
    /// Whether packets of every client of a ClusterIP get an address of this node as their
    /// source.
    pub masquerade_all: bool,
    /// The first and the last port that the kernel gives to sockets of this node.
    pub local_ports: (u16, u16),
    /// How long flows live.
    pub timeouts: Timeouts,
    /// The kernel's CONFIG_HZ.
    pub ticks_per_second: u32,
    /// Whether connect() is translated only for sockets of the node itself.
    pub only_node_sockets: bool,
}

/// Where this node is, and which options it has: the choice of endpoints depends on it.
#[derive(Clone, Copy, Debug)]
pub struct Locality<'a> {
    /// The node's name.
    pub node: &'a str,
    /// The node's zone.
    pub zone: Option<&'a str>,
    /// The node's addresses.
    pub addresses: &'a BTreeSet<IpAddr>,
    /// The addresses on which node ports are served.
    pub node_port_addresses: &'a BTreeSet<IpAddr>,
    /// All nodes.
    pub nodes: &'a NodeIndex,
    /// How clients outside reach backends on other nodes, unless the Service says it.
    pub external_mode: ExternalMode,
}

/// An address that clients connect to. Port 0 with protocol 0 means the address as a whole, the
/// unspecified address means the addresses of all nodes.
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
    /// Whether it means a node port on any node.
    pub fn is_of_any_node(&self) -> bool {
        self.ip.is_unspecified()
    }
}

/// A frontend as it should be in the maps.
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
    /// Whether it is a load balancer's address or an external IP, with a port or as a whole.
    pub fn is_external(&self) -> bool {
        matches!(self.kind, FrontendKind::EXTERNAL | FrontendKind::EXTERNAL_ADDRESS)
    }

    /// Whether it admits only clients in the service port's source ranges.
    pub fn is_ranged(&self) -> bool {
        self.flags & FrontendEntry::RANGED != 0
    }
}

/// Identifies a service port within its Service.
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
    /// In each family one for each port and one for the ClusterIP as a whole, in the order of
    /// their keys.
    pub ports: Vec<DesiredPort>,
}

/// An entry of SERVICES with all entries of other maps that belong to it.
#[derive(Clone, Debug, PartialEq)]
pub struct DesiredPort {
    /// Its key.
    pub key: PortKey,
    /// The frontends that lead here, in the order of addresses.
    pub frontends: Vec<DesiredFrontend>,
    /// The clients that [restricted](DesiredFrontend::is_ranged) frontends admit, in order; shared
    /// by the ports of a Service.
    pub ranges: Arc<[IpNet]>,
    /// Seconds of session affinity; 0 = none.
    pub affinity_seconds: u32,
    /// The flags of the entry.
    pub flags: u32,
    /// For a ClusterIP as a whole: whether any port of the Service has a backend.
    pub has_backend: bool,
    /// Every endpoint in a slice, serving or not, in the order of addresses.
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
    /// Its flags.
    pub flags: u8,
    /// If the Service uses direct server return: the address of the node that it runs on, if that
    /// is another node and known.
    pub node: Option<IpAddr>,
}

impl DesiredBackend {
    /// Identifies it among the backends of the service port.
    pub fn address(&self) -> (IpAddr, u16) {
        (self.ip, self.port)
    }
}

/// What the maps should hold for a Service with its slices.
pub fn service(entry: &Entry, locality: Locality<'_>) -> Option<DesiredService> {
    let service = entry.service.as_ref()?;
    let mut ports = Vec::with_capacity(service.cluster_ips.len() * (service.ports.len() + 1));
    for ip in &service.cluster_ips {
        let of_family = ports_of_family(service, *ip, entry, locality);
        let has_backend = of_family
            .iter()
            .any(|port| port.backends.iter().any(|backend| backend.sets & IN_CLUSTER_SET != 0));
        ports.extend(of_family);
        ports.push(address(service, *ip, has_backend));
    }
    ports.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    Some(DesiredService { ports })
}

/// The ports of a Service in the family of its ClusterIP `ip`.
fn ports_of_family(
    service: &Service,
    ip: IpAddr,
    entry: &Entry,
    locality: Locality<'_>,
) -> Vec<DesiredPort> {
    let family = IpFamily::of(ip);
    let frontends = frontends::of_ports(service, ip, locality.node_port_addresses);
    let backends = backends::of_ports(service, entry, family, locality);
    let ranges: Arc<[IpNet]> =
        frontends::allowed_clients(service, family, locality.addresses).into();
    let flags = flags(service, locality.external_mode);
    let ports = service.ports.iter().zip(frontends).zip(backends);
    let port = |((port, frontends), backends): ((&Port, Vec<DesiredFrontend>), _)| {
        let is_ranged = frontends.iter().any(DesiredFrontend::is_ranged);
        DesiredPort {
            key: PortKey { family, protocol: port.protocol.number(), port: port.name.clone() },
            frontends,
            ranges: if is_ranged { Arc::clone(&ranges) } else { Arc::default() },
            affinity_seconds: service.affinity_seconds,
            flags,
            has_backend: false,
            backends,
        }
    };
    ports.map(port).collect()
}

/// The frontends that a Service wants, and by what; another Service may own some of them.
pub fn claims(service: &Service, node_port_addresses: &BTreeSet<IpAddr>) -> Vec<Claim> {
    let balanced: HashSet<&IpAddr> = service.load_balancer_ips.iter().collect();
    let kind = |frontend: &DesiredFrontend| match frontend.kind {
        FrontendKind::CLUSTER_IP | FrontendKind::CLUSTER_IP_ADDRESS => ClaimKind::ClusterIp,
        FrontendKind::NODE_PORT => ClaimKind::NodePort,
        _ if balanced.contains(&frontend.at.ip) => ClaimKind::LoadBalancer,
        _ => ClaimKind::ExternalIp,
    };
    let mut wanted = Vec::with_capacity(service.cluster_ips.len() * (service.ports.len() + 1));
    for ip in &service.cluster_ips {
        wanted.push(frontends::of_address(*ip));
        wanted.extend(frontends::of_external_addresses(service, IpFamily::of(*ip)));
        wanted.extend(frontends::of_ports(service, *ip, node_port_addresses).into_iter().flatten());
    }
    wanted.into_iter().map(|frontend| Claim { kind: kind(&frontend), frontend }).collect()
}

fn flags(service: &Service, external_mode: ExternalMode) -> u32 {
    let policy = service.policy;
    let flags = [
        (policy.internal_local, ServiceEntry::INTERNAL_LOCAL),
        (policy.externally_reachable && policy.external_local, ServiceEntry::EXTERNAL_LOCAL),
        (is_direct(service, external_mode), ServiceEntry::DSR),
    ];
    flags.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).sum()
}

/// Whether packets of clients outside are encapsulated for the backend's node, which answers them
/// itself. `external_mode` holds unless the Service says otherwise.
pub fn is_direct(service: &Service, external_mode: ExternalMode) -> bool {
    service.policy.externally_reachable
        && service.external_mode.unwrap_or(external_mode) == ExternalMode::Dsr
}

/// The entry of a ClusterIP as a whole, and of the Service's other addresses of its family.
fn address(service: &Service, ip: IpAddr, has_backend: bool) -> DesiredPort {
    let family = IpFamily::of(ip);
    let mut frontends = frontends::of_external_addresses(service, family);
    frontends.push(frontends::of_address(ip));
    frontends.sort_unstable_by_key(|frontend| frontend.at);
    DesiredPort {
        key: PortKey { family, protocol: 0, port: "".into() },
        frontends,
        ranges: Arc::default(),
        affinity_seconds: 0,
        flags: ServiceEntry::ADDRESS,
        has_backend,
        backends: Vec::new(),
    }
}

/// `namespace/service:port`, as NAMES holds it; without `:port` for an unnamed port.
pub fn display_name(service: &str, key: &PortKey) -> String {
    if key.port.is_empty() { service.to_owned() } else { format!("{service}:{}", key.port) }
}

/// A Service that claims an address which another Service owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The Service without the address, as `namespace/name`.
    pub service: Arc<str>,
    /// The Service that owns the address.
    pub owner: Arc<str>,
    /// The address.
    pub frontend: FrontendAddress,
    /// The owner's kind of claim, if that decided; else the owner is the older Service.
    pub stronger: Option<ClaimKind>,
}

impl Conflict {
    /// The refusal of the Service without the address.
    pub fn refusal(&self) -> Refusal {
        let FrontendAddress { ip, port, .. } = self.frontend;
        let lost = if self.frontend.is_of_any_node() {
            format!("node port {port}")
        } else {
            format!("{ip} port {port}")
        };
        let message = match self.stronger {
            Some(kind) => format!("{lost} is a {} of Service {}", kind.name(), self.owner),
            None => format!("{lost} belongs to the older Service {}", self.owner),
        };
        Refusal {
            kind: ObjectKind::Service,
            object: (&*self.service).into(),
            uid: String::new(),
            field: "spec.ports".to_owned(),
            reason: RefusalReason::AddressInUse,
            message,
        }
    }
}
