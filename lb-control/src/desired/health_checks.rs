//! Which health check servers Services need, and what they answer: pure functions of the
//! snapshot. `health::listeners` of the agent holds the sockets.
//!
//! As in kube-proxy the families are separate: a listener counts the endpoints of its own
//! family, and a Service has no listener in a family in which it has no ClusterIP.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use k8s_openapi::jiff::Timestamp;

use crate::{
    model::{IpFamily, service::Service, slice::Endpoint},
    options::NodePortAddresses,
    snapshot::Entry,
};

/// The health check of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// The Service's identity; empty if unknown.
    pub uid: Box<str>,
    /// When the Service was created, if known.
    pub created: Option<Timestamp>,
    /// The port to listen on.
    pub port: u16,
    /// How many addresses of ready endpoints are on this node, for each family of the
    /// Service.
    pub local_endpoints: BTreeMap<IpFamily, usize>,
}

/// The health checks of all Services that have one, by `namespace/name`.
pub type Checks = BTreeMap<Arc<str>, Check>;

/// Everything that the servers depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The Services.
    pub checks: Checks,
    /// The addresses that each of them listens on; an unspecified address means its whole
    /// family.
    pub addresses: BTreeSet<IpAddr>,
}

/// Which Service listens on which socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// The Service of each socket.
    pub listeners: BTreeMap<SocketAddr, Arc<str>>,
    /// Services whose port another Service has, with that other Service.
    pub conflicts: BTreeMap<Arc<str>, Arc<str>>,
}

impl Wanted {
    /// Decides which Service listens where. A port that several Services claim belongs to the
    /// oldest one, then to the one whose name comes first, as with frontends.
    pub fn layout(&self) -> Layout {
        let mut layout = Layout::default();
        let mut by_age: Vec<_> = self.checks.iter().collect();
        by_age.sort_by_key(|(name, check)| (check.created.is_none(), check.created, *name));
        for (name, check) in by_age {
            for ip in &self.addresses {
                if !check.local_endpoints.contains_key(&IpFamily::of(*ip)) {
                    continue;
                }
                let owner = layout
                    .listeners
                    .entry(SocketAddr::new(*ip, check.port))
                    .or_insert_with(|| Arc::clone(name));
                if owner != name {
                    layout.conflicts.insert(Arc::clone(name), Arc::clone(owner));
                }
            }
        }
        layout
    }

    /// The answer of a Service's listener of a family.
    pub fn answer(&self, service: &str, family: IpFamily, is_proxy_healthy: bool) -> Answer {
        let check = self.checks.get(service);
        let count = check.and_then(|check| check.local_endpoints.get(&family));
        Answer { local_endpoints: count.copied().unwrap_or(0), is_proxy_healthy }
    }
}

/// The answer of a health check server, whatever the path and the method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Addresses of ready endpoints on this node.
    pub local_endpoints: usize,
    /// Whether the agent keeps the maps up to date.
    pub is_proxy_healthy: bool,
}

impl Answer {
    /// Whether a load balancer may send packets to this node.
    pub fn is_good(self) -> bool {
        self.local_endpoints > 0 && self.is_proxy_healthy
    }

    /// The body, byte for byte as kube-proxy writes it; `service` is `namespace/name`.
    pub fn body(self, service: &str) -> String {
        let (namespace, name) = service.split_once('/').unwrap_or(("", service));
        let Self { local_endpoints, is_proxy_healthy } = self;
        format!(
            "{{\n\
             \t\"service\": {{\n\
             \t\t\"namespace\": \"{namespace}\",\n\
             \t\t\"name\": \"{name}\"\n\
             \t}},\n\
             \t\"localEndpoints\": {local_endpoints},\n\
             \t\"serviceProxyHealthy\": {is_proxy_healthy}\n\
             }}"
        )
    }
}

/// The health check of a Service, if it has one.
pub fn of_service(entry: &Entry) -> Option<Check> {
    let service = entry.service.as_ref()?;
    let port = service.health_check_node_port?;
    let local_endpoints =
        families(service).map(|family| (family, local_endpoints(entry, family))).collect();
    Some(Check { uid: service.uid.clone(), created: service.created, port, local_endpoints })
}

fn families(service: &Service) -> impl Iterator<Item = IpFamily> {
    service.cluster_ips.iter().map(|ip| IpFamily::of(*ip))
}

/// Counts the addresses of ready local endpoints: an address in several ports or slices counts
/// once, a terminating endpoint does not count even if it serves, and a slice without ports
/// has no endpoints.
fn local_endpoints(entry: &Entry, family: IpFamily) -> usize {
    let is_counted = |endpoint: &&Endpoint| endpoint.is_local && endpoint.is_ready;
    let slices = entry.slices().filter(|slice| slice.family == family && !slice.ports.is_empty());
    let endpoints = slices.flat_map(|slice| &slice.endpoints).filter(is_counted);
    endpoints.map(|endpoint| endpoint.address).collect::<HashSet<_>>().len()
}

/// The addresses that the servers listen on: those of node ports, or, as in kube-proxy, the
/// unspecified address of a family that is selected as a whole.
pub fn listen_addresses(
    selected: &NodePortAddresses,
    addresses: &BTreeSet<IpAddr>,
) -> BTreeSet<IpAddr> {
    let is_whole = |family: IpFamily| match selected {
        NodePortAddresses::Primary => false,
        NodePortAddresses::Ranges(ranges) => ranges
            .iter()
            .any(|range| range.prefix_len() == 0 && IpFamily::of(range.addr()) == family),
    };
    let listen = |ip: &IpAddr| match ip {
        IpAddr::V4(_) if is_whole(IpFamily::V4) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) if is_whole(IpFamily::V6) => Ipv6Addr::UNSPECIFIED.into(),
        _ => *ip,
    };
    addresses.iter().map(listen).collect()
}

#[cfg(test)]
mod tests;
