//! Which addresses lead to the ports of a Service.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use lb_common::abi::frontend::{Frontend, FrontendKind};

use super::{DesiredFrontend, FrontendAddress};
use crate::model::{
    IpFamily,
    service::{Port, Service},
};

/// The frontend that stands for a ClusterIP as a whole.
pub fn of_address(ip: IpAddr) -> DesiredFrontend {
    let at = FrontendAddress { ip, port: 0, protocol: 0 };
    DesiredFrontend { at, kind: FrontendKind::CLUSTER_IP_ADDRESS, flags: 0 }
}

/// The frontends of each port of a Service, in the family of its ClusterIP `ip`: those of
/// a port in the order of addresses, and none twice. Where two ports ask for the same, the
/// one that has it by its own number comes before the one that has it as a node port.
///
/// A node port has one more frontend, [of any node](super::FrontendAddress::is_of_any_node),
/// wherever it is served here: what clients ask another node for may be tunnelled to this one.
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
    let mut taken: BTreeSet<FrontendAddress> = found.iter().flatten().map(|it| it.at).collect();
    for (port, found) in service.ports.iter().zip(&mut found) {
        for (ip, flags) in external_ips(service, family) {
            let kind = FrontendKind::EXTERNAL;
            let new = DesiredFrontend { kind, flags, ..frontend(ip, port) };
            found.extend(taken.insert(new.at).then_some(new));
        }
    }
    for (port, found) in service.ports.iter().zip(&mut found) {
        let Some(number) = port.node_port else { continue };
        let here = node_port_addresses.iter().copied().filter(|ip| IpFamily::of(*ip) == family);
        for ip in [family.unspecified()].into_iter().chain(here) {
            let protocol = port.protocol.number();
            let at = FrontendAddress { ip, port: number.get(), protocol };
            let new = DesiredFrontend { at, kind: FrontendKind::NODE_PORT, flags: 0 };
            found.extend(taken.insert(at).then_some(new));
        }
    }
    found.iter_mut().for_each(|found| found.sort_unstable_by_key(|frontend| frontend.at));
    found
}

/// The addresses of the load balancer, then the external IPs, with their flags. One that is
/// both is restricted as the load balancer's.
fn external_ips(service: &Service, family: IpFamily) -> impl Iterator<Item = (IpAddr, u8)> {
    let is_restricted = ranges(service, family).next().is_some();
    let flags = if is_restricted { Frontend::RANGED } else { 0 };
    let load_balancer = service.load_balancer_ips.iter().map(move |ip| (*ip, flags));
    let external = service.external_ips.iter().map(|ip| (*ip, 0));
    load_balancer.chain(external).filter(move |(ip, _)| IpFamily::of(*ip) == family)
}

/// Who is let in where there are [`ranges`], in order. A process of a node that is let in may
/// have the load balancer's address as its own, where the node holds that address.
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

/// Who may reach the load balancer's addresses of a family; empty: everybody. As with
/// kube-proxy, ranges of the other family restrict nobody of this one.
pub fn ranges(service: &Service, family: IpFamily) -> impl Iterator<Item = IpNet> {
    let of_family =
        move || service.source_ranges.iter().filter(move |net| IpFamily::of(net.addr()) == family);
    let is_open = of_family().any(|net| net.prefix_len() == 0);
    of_family().filter(move |_| !is_open).copied()
}

#[cfg(test)]
mod tests;
