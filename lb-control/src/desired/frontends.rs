//! The addresses that lead to the ports of a Service.

use std::{
    collections::{BTreeSet, HashSet},
    net::IpAddr,
};

use ipnet::IpNet;
use lb_common::abi::frontend::{Frontend, FrontendKind};

use super::{DesiredFrontend, FrontendAddress};
use crate::{
    model::{
        IpFamily,
        service::{Port, Service},
    },
    work,
};

/// The frontend of a ClusterIP as a whole.
pub fn of_address(ip: IpAddr) -> DesiredFrontend {
    let at = FrontendAddress { ip, port: 0, protocol: 0 };
    DesiredFrontend { at, kind: FrontendKind::CLUSTER_IP_ADDRESS, flags: 0 }
}

/// The frontends of a Service's load balancer addresses and external IPs as a whole, in a family and
/// in the order of addresses. They show that packets to other ports there have nowhere to go.
pub fn of_external_addresses(service: &Service, family: IpFamily) -> Vec<DesiredFrontend> {
    if !service.policy.externally_reachable {
        return Vec::new();
    }
    let ips: BTreeSet<IpAddr> = external_ips(service, family).map(|(ip, _)| ip).collect();
    let others = ips.into_iter().filter(|ip| !service.cluster_ips.contains(ip));
    let kind = FrontendKind::EXTERNAL_ADDRESS;
    others.map(|ip| DesiredFrontend { kind, ..of_address(ip) }).collect()
}

/// The frontends of each port of a Service, in the family of its ClusterIP `ip`: those of
/// a port in the order of addresses, and each only once. If two ports claim the same one, the
/// port that has it as its own number gets it, not the port that has it as a node port.
///
/// A node port has one more frontend, [of any node](super::FrontendAddress::is_of_any_node),
/// because packets that clients send to another node may be encapsulated to this node.
pub fn of_ports(
    service: &Service,
    ip: IpAddr,
    node_port_addresses: &BTreeSet<IpAddr>,
) -> Vec<Vec<DesiredFrontend>> {
    let frontend = |ip, port: &Port| {
        let at = FrontendAddress { ip, port: port.number, protocol: port.protocol.number() };
        DesiredFrontend { at, kind: FrontendKind::CLUSTER_IP, flags: 0 }
    };
    let mut found: Vec<_> = service.ports.iter().map(|port| vec![frontend(ip, port)]).collect();
    if !service.policy.externally_reachable {
        return found;
    }
    let family = IpFamily::of(ip);
    let here: Vec<IpAddr> =
        node_port_addresses.iter().copied().filter(|ip| IpFamily::of(*ip) == family).collect();
    let mut taken: HashSet<FrontendAddress> = found.iter().flatten().map(|it| it.at).collect();
    let external: Vec<(IpAddr, u8)> = external_ips(service, family).collect();
    for (port, found) in service.ports.iter().zip(&mut found) {
        for (ip, flags) in external.iter().copied() {
            let kind = FrontendKind::EXTERNAL;
            let new = DesiredFrontend { kind, flags, ..frontend(ip, port) };
            found.extend(taken.insert(new.at).then_some(new));
        }
        work::count(external.len());
    }
    for (port, found) in service.ports.iter().zip(&mut found) {
        let Some(number) = port.node_port else { continue };
        work::count(1 + here.len());
        for ip in [family.unspecified()].into_iter().chain(here.iter().copied()) {
            let protocol = port.protocol.number();
            let at = FrontendAddress { ip, port: number.get(), protocol };
            let new = DesiredFrontend { at, kind: FrontendKind::NODE_PORT, flags: 0 };
            found.extend(taken.insert(at).then_some(new));
        }
    }
    found.iter_mut().for_each(|found| found.sort_unstable_by_key(|frontend| frontend.at));
    found
}

/// The addresses of the load balancer, then the external IPs, with their flags. An address
/// that is both is restricted like the load balancer's.
fn external_ips(service: &Service, family: IpFamily) -> impl Iterator<Item = (IpAddr, u8)> {
    let is_restricted = ranges(service, family).next().is_some();
    let flags = if is_restricted { Frontend::RANGED } else { 0 };
    let load_balancer = service.load_balancer_ips.iter().map(move |ip| (*ip, flags));
    let external = service.external_ips.iter().map(|ip| (*ip, 0));
    load_balancer.chain(external).filter(move |(ip, _)| IpFamily::of(*ip) == family)
}

/// The clients that restricted frontends admit: the [`ranges`], in order. If they contain an
/// address of this node, the load balancer's own addresses are admitted too, because a process
/// of the node may have such an address as its source if the node holds it.
pub fn allowed_clients(service: &Service, family: IpFamily, node: &BTreeSet<IpAddr>) -> Vec<IpNet> {
    let mut found: Vec<IpNet> = ranges(service, family).collect();
    if node.iter().any(|ip| found.iter().any(|range| range.contains(ip))) {
        let own = service.load_balancer_ips.iter().copied();
        found.extend(own.filter(|ip| IpFamily::of(*ip) == family).map(IpNet::from));
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// The source ranges of the load balancer's addresses of a family; empty if every client is
/// admitted. As with kube-proxy, ranges of the other family do not restrict this one.
pub fn ranges(service: &Service, family: IpFamily) -> impl Iterator<Item = IpNet> {
    let of_family =
        move || service.source_ranges.iter().filter(move |net| IpFamily::of(net.addr()) == family);
    let is_open = of_family().any(|net| net.prefix_len() == 0);
    of_family().filter(move |_| !is_open).copied()
}

#[cfg(test)]
mod tests;
