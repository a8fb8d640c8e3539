//! The settings of the programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use lb_common::abi::{
    address::{Address, Address4, Address6, Prefix},
    frontend::FrontendKind,
    settings::{FamilySettings, MAX_PREFIXES, PortRange, Settings},
};
use lb_common::balance::track;

use super::{
    DesiredFrontend, NodeFacts,
    service_prefixes::{self, ServicePrefixes},
};
use crate::{
    model::{
        IpFamily,
        source_ports::{FIRST_SOURCE_PORT, MIN_SOURCE_PORTS, NODE_PORTS},
    },
    work,
};

/// The addresses and node ports that Services claim, counted by their frontends.
#[derive(Clone, Debug, Default)]
pub struct InUse {
    /// ClusterIPs, load balancers' addresses and external IPs.
    addresses: BTreeMap<IpAddr, usize>,
    /// Node ports.
    node_ports: BTreeMap<u16, usize>,
    /// How many frontends there are.
    frontends: usize,
    /// The Services that use direct server return.
    direct: BTreeSet<Arc<str>>,
    /// The service prefixes of the settings: an address inside one of them does not change them.
    covered: Vec<IpNet>,
}

impl InUse {
    /// Notes whether a Service uses direct server return, and returns whether that may change the
    /// settings.
    pub fn set_direct(&mut self, service: &Arc<str>, is_direct: bool) -> bool {
        let was_used = !self.direct.is_empty();
        if is_direct {
            self.direct.insert(Arc::clone(service));
        } else {
            self.direct.remove(service);
        }
        was_used == self.direct.is_empty()
    }

    /// Whether any Service uses direct server return.
    pub fn has_direct(&self) -> bool {
        !self.direct.is_empty()
    }

    /// Notes the settings in force.
    pub fn set_covered(&mut self, settings: &Settings) {
        self.covered = service_prefixes::covered(settings);
    }

    /// Counts a frontend, and returns whether that may change the settings.
    pub fn add(&mut self, frontend: &DesiredFrontend) -> bool {
        let is_first = self.frontends == 0;
        self.frontends += 1;
        let is_new = match frontend.kind {
            FrontendKind::CLUSTER_IP => false,
            FrontendKind::NODE_PORT => add(&mut self.node_ports, frontend.at.port),
            _ => {
                let is_covered = || self.covered.iter().any(|net| net.contains(&frontend.at.ip));
                add(&mut self.addresses, frontend.at.ip) && !is_covered()
            }
        };
        is_new || is_first
    }

    /// Reverts [`Self::add`], and returns whether that may change the settings.
    pub fn remove(&mut self, frontend: &DesiredFrontend) -> bool {
        self.frontends -= 1;
        match frontend.kind {
            FrontendKind::CLUSTER_IP => false,
            FrontendKind::NODE_PORT => remove(&mut self.node_ports, frontend.at.port),
            // Service prefixes never shrink.
            _ => {
                remove(&mut self.addresses, frontend.at.ip);
                false
            }
        }
    }
}

fn add<T: Ord>(counts: &mut BTreeMap<T, usize>, thing: T) -> bool {
    let count = counts.entry(thing).or_default();
    *count += 1;
    *count == 1
}

fn remove<T: Ord>(counts: &mut BTreeMap<T, usize>, thing: T) -> bool {
    let Some(count) = counts.get_mut(&thing) else { return false };
    *count -= 1;
    let is_last = *count == 0;
    if is_last {
        counts.remove(&thing);
    }
    is_last
}

/// The settings for a node, given the prefixes of the ServiceCIDRs, the addresses in use, and
/// the settings so far. Service prefixes and node ports never shrink, and direct server return
/// stays in use, because flows of a deleted Service continue.
pub fn settings(
    facts: &NodeFacts,
    service_cidrs: &[IpNet],
    in_use: &InUse,
    before: &Settings,
) -> Settings {
    work::count(in_use.addresses.len());
    let addresses: Vec<IpAddr> = in_use.addresses.keys().copied().collect();
    let covered = service_prefixes::covered(before);
    let service_prefixes =
        |family| service_prefixes::choose(service_cidrs, &addresses, &covered, family);
    let ipv4_addresses = facts.addresses.iter().filter_map(|ip| match ip {
        IpAddr::V4(ip) => Some(Address4::from(*ip)),
        IpAddr::V6(_) => None,
    });
    let ipv6_addresses = facts.addresses.iter().filter_map(|ip| match ip {
        IpAddr::V4(_) => None,
        IpAddr::V6(ip) => Some(Address6::from(*ip)),
    });
    let was_external = before.flags & Settings::EXTERNAL;
    // Clients outside may ask a ClusterIP, too.
    let external = if in_use.frontends > 0 { Settings::EXTERNAL } else { was_external };
    let masquerade = if facts.masquerade_all { Settings::MASQUERADE_ALL } else { 0 };
    let was_direct = before.flags & Settings::DSR;
    let tunnels = if in_use.direct.is_empty() { was_direct } else { Settings::DSR };
    let source = if facts.is_source_by_route { Settings::SOURCE_BY_ROUTE } else { 0 };
    let sockets = if facts.only_node_sockets { Settings::ONLY_NODE_SOCKETS } else { 0 };
    let flow_lifetimes = track::lifetimes(&facts.timeouts);
    let time_shift = Settings::time_shift_of(facts.ticks_per_second);
    Settings {
        ipv4: FamilySettings {
            node_source: facts.node_source4.unwrap_or(Ipv4Addr::UNSPECIFIED).into(),
            ..family_settings(
                &service_prefixes(IpFamily::V4),
                &facts.pod_prefixes,
                ipv4_addresses,
                prefix4,
            )
        },
        ipv6: FamilySettings {
            node_source: facts.node_source6.unwrap_or(Ipv6Addr::UNSPECIFIED).into(),
            ..family_settings(
                &service_prefixes(IpFamily::V6),
                &facts.pod_prefixes,
                ipv6_addresses,
                prefix6,
            )
        },
        lifetimes: track::former_lifetimes(&flow_lifetimes, time_shift),
        ticks_per_second: facts.ticks_per_second,
        // The flag DRAINING is cleared, because an agent runs again.
        flags: external | masquerade | tunnels | source | sockets,
        node_ports: node_ports(in_use, before.node_ports),
        source_ports: source_ports(facts.local_ports, in_use.node_ports.keys().copied()),
        flow_lifetimes,
        time_shift,
        zero: 0,
    }
}

fn prefix4(net: &IpNet) -> Option<Prefix<Address4>> {
    let IpNet::V4(net) = net else { return None };
    Some(Prefix { address: net.network().into(), mask: net.netmask().into() })
}

fn prefix6(net: &IpNet) -> Option<Prefix<Address6>> {
    let IpNet::V6(net) = net else { return None };
    Some(Prefix { address: net.network().into(), mask: net.netmask().into() })
}

fn family_settings<A: Address>(
    chosen: &ServicePrefixes,
    pod_prefixes: &[IpNet],
    addresses: impl Iterator<Item = A>,
    prefix: impl Fn(&IpNet) -> Option<Prefix<A>>,
) -> FamilySettings<A> {
    let mut settings = FamilySettings {
        service_prefix_count: chosen.prefixes.len() as u32,
        service_cidr_count: chosen.service_cidrs as u32,
        ..FamilySettings::default()
    };
    for (slot, prefix) in
        settings.service_prefixes.iter_mut().zip(chosen.prefixes.iter().filter_map(&prefix))
    {
        *slot = prefix;
    }
    let pods = pod_prefixes.iter().filter_map(&prefix).take(MAX_PREFIXES);
    for (slot, prefix) in settings.pod_prefixes.iter_mut().zip(pods) {
        *slot = prefix;
        settings.pod_prefix_count += 1;
    }
    for address in addresses {
        if let Some(slot) = settings.node_addresses.get_mut(settings.node_address_count as usize) {
            *slot = address;
        }
        settings.node_address_count += 1;
    }
    settings
}

/// The smallest range that includes all node ports and the range before.
fn node_ports(in_use: &InUse, before: PortRange) -> PortRange {
    let ports = || in_use.node_ports.keys().copied();
    let mut bounds = ports().next().zip(ports().next_back());
    if let Some(last) = before.count.checked_sub(1) {
        let last = before.first.saturating_add(last);
        let (first, end) = bounds.unwrap_or((before.first, last));
        bounds = Some((first.min(before.first), end.max(last)));
    }
    bounds
        .map_or(PortRange::default(), |(first, last)| PortRange { first, count: last - first + 1 })
}

/// The longest range of free ports: not reserved for servers, not among the ports that the
/// kernel gives to sockets of this node (`local`), and not node ports, in use or possible.
/// Empty if the longest range is shorter than [`MIN_SOURCE_PORTS`].
fn source_ports(local: (u16, u16), node_ports: impl Iterator<Item = u16>) -> PortRange {
    let mut taken: Vec<(u16, u16)> = node_ports.map(|port| (port, port)).collect();
    taken.extend([local, NODE_PORTS]);
    taken.sort_unstable();
    let mut best = PortRange::default();
    let mut next = u32::from(FIRST_SOURCE_PORT);
    let taken = taken.into_iter().map(|(first, last)| (u32::from(first), u32::from(last)));
    for (first, last) in taken.chain([(1 << 16, 1 << 16)]) {
        let count = first.saturating_sub(next);
        if count > best.count.into() {
            best = PortRange { first: next as u16, count: count as u16 };
        }
        next = next.max(last + 1);
    }
    if best.count < MIN_SOURCE_PORTS { PortRange::default() } else { best }
}

#[cfg(test)]
mod tests;
