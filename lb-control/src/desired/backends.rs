//! The backends of a Service's ports: the endpoints of its slices, each with the sets that it is a
//! member of.

use std::{collections::HashMap, net::IpAddr};

use lb_common::abi::backend::{IN_SLICE, NOT_SERVING, ON_THIS_NODE, READY, TERMINATING, THIS_HOST};

use super::{DesiredBackend, Locality, endpoints, is_direct};
use crate::{
    model::{
        IpFamily, Protocol,
        service::Service,
        slice::{Endpoint, Slice},
    },
    snapshot::Entry,
    work,
};

/// The positions of a Service's ports, by the name and protocol that slices know them by.
struct Positions<'a>(HashMap<(&'a str, Protocol), usize>);

impl<'a> Positions<'a> {
    fn new(service: &'a Service) -> Self {
        let key = |(at, port): (usize, &'a crate::model::service::Port)| {
            ((&*port.name, port.protocol), at)
        };
        Self(service.ports.iter().enumerate().map(key).collect())
    }

    /// Each port of the slice that is a port of the Service: its position there, and its number.
    fn matches(&self, slice: &Slice) -> impl Iterator<Item = (usize, u16)> {
        work::count(slice.ports.len());
        let ports = slice.ports.iter();
        ports.filter_map(|port| Some((*self.0.get(&(&*port.name, port.protocol))?, port.number)))
    }
}

/// How many backends a Service has, if no two of its endpoints are the same: counted without
/// looking at an endpoint.
pub fn count(entry: &Entry) -> usize {
    let Some(service) = &entry.service else { return 0 };
    let has = |family| service.cluster_ips.iter().any(|ip| IpFamily::of(*ip) == family);
    let positions = Positions::new(service);
    let slices = entry.slices().filter(|slice| has(slice.family));
    slices.map(|slice| positions.matches(slice).count() * slice.endpoints.len()).sum()
}

/// The backends of each port of a Service in a family, in the order of their addresses.
///
/// It takes one pass over the slices, whatever the number of ports.
pub fn of_ports(
    service: &Service,
    entry: &Entry,
    family: IpFamily,
    locality: Locality<'_>,
) -> Vec<Vec<DesiredBackend>> {
    let mut found: Vec<Vec<(u16, &Endpoint)>> = vec![Vec::new(); service.ports.len()];
    let positions = Positions::new(service);
    for slice in entry.slices().filter(|slice| slice.family == family) {
        for (at, number) in positions.matches(slice) {
            work::count(slice.endpoints.len());
            found[at].extend(slice.endpoints.iter().map(|endpoint| (number, endpoint)));
        }
    }
    found.into_iter().map(|found| of_port(service, found, family, locality)).collect()
}

fn of_port(
    service: &Service,
    mut found: Vec<(u16, &Endpoint)>,
    family: IpFamily,
    locality: Locality<'_>,
) -> Vec<DesiredBackend> {
    // An address may be in slices twice: the pod that had it before may still be there. The endpoint
    // that can serve wins. The sort is stable: among equals the first by name of the slice does.
    found.sort_by_key(|(number, endpoint)| {
        (endpoint.address, *number, rank(endpoint), !endpoint.is_local)
    });
    found.dedup_by_key(|(number, endpoint)| (endpoint.address, *number));
    let endpoints: Vec<&Endpoint> = found.iter().map(|(_, endpoint)| *endpoint).collect();
    let sets = endpoints::choose(&endpoints, service.policy, locality);
    // Nodes that come and go rewrite no backend of the other Services.
    let needs_node = is_direct(service, locality.external_mode);
    let backend = |((number, endpoint), sets): (&(u16, &Endpoint), u8)| {
        let is_host = locality.addresses.contains(&endpoint.address);
        let on_node = if endpoint.is_local || is_host { ON_THIS_NODE } else { 0 };
        DesiredBackend {
            ip: endpoint.address,
            port: *number,
            sets,
            flags: flags(endpoint, on_node, is_host),
            node: if needs_node { node(endpoint, on_node, family, locality) } else { None },
        }
    };
    found.iter().zip(sets).map(backend).collect()
}

fn flags(endpoint: &Endpoint, on_node: u8, is_host: bool) -> u8 {
    let conditions = [
        (is_host, THIS_HOST),
        (endpoint.is_ready, READY),
        (endpoint.is_terminating, TERMINATING),
        (!endpoint.is_ready && !endpoint.is_serving, NOT_SERVING),
    ];
    let conditions = conditions.iter().filter(|(is_met, _)| *is_met);
    conditions.fold(on_node | IN_SLICE, |flags, (_, flag)| flags | flag)
}

/// The address of the node that the endpoint runs on, if that is another node and known.
fn node(
    endpoint: &Endpoint,
    on_node: u8,
    family: IpFamily,
    locality: Locality<'_>,
) -> Option<IpAddr> {
    let node = endpoint.node.as_deref().filter(|_| on_node == 0)?;
    locality.nodes.internal_ip(node, family)
}

/// Orders endpoints: those that are ready, those that serve while they terminate, the others.
fn rank(endpoint: &Endpoint) -> u8 {
    if endpoint.is_ready {
        0
    } else if endpoint.is_serving && endpoint.is_terminating {
        1
    } else {
        2
    }
}
