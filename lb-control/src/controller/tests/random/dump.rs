//! What maps mean, without the numbers that differ from one agent to the next: ids, indices and
//! places of slots.

use std::{collections::BTreeMap, net::Ipv6Addr};

use lb_common::abi::{frontend::FrontendKind, service::SlotRange, settings::Settings};

use super::*;
use crate::desired::service_prefixes;

/// The meaning of maps.
#[derive(Debug, PartialEq)]
pub(super) struct Dump {
    frontends: BTreeMap<String, String>,
    ports: BTreeMap<String, String>,
    nodes: Vec<String>,
}

pub(super) fn dump(fake: &Fake) -> Dump {
    let frontends4 = fake.frontends4.iter().map(|(key, to)| (format!("{key:?}"), to));
    let frontends6 = fake.frontends6.iter().map(|(key, to)| (format!("{key:?}"), to));
    let frontends = frontends4.chain(frontends6).map(|(key, to)| {
        (key, format!("{} {:?} {}", name_of(fake, to.service), to.kind, to.flags))
    });
    let state = fake.read_state().expect("a fake can be read");
    let ranges: Vec<_> = state.ranges().collect();
    let named = (0..).zip(&fake.names).filter(|(_, name)| name.length > 0);
    let ports = named.map(|(index, _)| (name_of(fake, index), port(fake, index, &ranges)));
    let nodes4 = fake.nodes4.iter().map(|node| format!("{node:?}"));
    let nodes = nodes4.chain(fake.nodes6.iter().map(|node| format!("{node:?}")));
    Dump { frontends: frontends.collect(), ports: ports.collect(), nodes: nodes.collect() }
}

/// How many entries of BACKENDS4 and BACKENDS6 are not wiped.
pub(super) fn backends(fake: &Fake) -> [usize; 2] {
    [
        fake.backends4.iter().filter(|backend| backend.port.get() != 0).count(),
        fake.backends6.iter().filter(|backend| backend.port.get() != 0).count(),
    ]
}

/// What the settings must be: those of a controller that saw the last state alone, or more than
/// they need, because flows of what is gone continue.
pub(super) fn check_settings(fake: &Fake, afresh: &Fake) {
    let (held, wanted) = (&fake.settings, &afresh.settings);
    let growing = Settings::EXTERNAL | Settings::DSR;
    assert_eq!(held.flags & wanted.flags & growing, wanted.flags & growing, "flags that grow");
    assert_eq!(held.flags & !growing, wanted.flags & !growing, "flags");
    assert_eq!(held.flow_lifetimes, wanted.flow_lifetimes);
    let covered = service_prefixes::covered(held);
    let is_node_port = |to: &Frontend| to.kind == FrontendKind::NODE_PORT;
    let keys4 = fake.frontends4.iter().filter(|(_, to)| !is_node_port(to));
    let keys6 = fake.frontends6.iter().filter(|(_, to)| !is_node_port(to));
    let ips = keys4.map(|(key, _)| IpAddr::from(Ipv4Addr::from(key.address)));
    for ip in ips.chain(keys6.map(|(key, _)| Ipv6Addr::from(key.address).into())) {
        assert!(covered.iter().any(|net| net.contains(&ip)), "{ip} is not in {covered:?}");
    }
}

fn name_of(fake: &Fake, index: u32) -> String {
    let name = fake.names[index as usize];
    let text = String::from_utf8_lossy(&name.text[..name.length.into()]).into_owned();
    format!("{text} IPv{} {}", name.family, name.protocol)
}

fn port(fake: &Fake, index: u32, ranges: &[(u32, IpNet)]) -> String {
    let (name, entry) = (fake.names[index as usize], fake.services[index as usize]);
    let set = |range: SlotRange| {
        let slots = (range.start()..).take(range.length() as usize);
        let mut members: Vec<_> = slots.map(|slot| backend(fake, name.family, slot)).collect();
        members.sort_unstable();
        members
    };
    let sets = if name.protocol == 0 {
        vec![vec![format!("{} backends", entry.cluster.length())]]
    } else {
        vec![set(entry.cluster), set(entry.local)]
    };
    let mut ranges: Vec<_> =
        ranges.iter().filter(|(of, _)| *of == index).map(|(_, range)| range.to_string()).collect();
    ranges.sort_unstable();
    format!("{} {} {sets:?} {ranges:?}", entry.flags, entry.affinity_seconds)
}

/// A backend, without its generation.
fn backend(fake: &Fake, family: u8, slot: u32) -> String {
    let id = fake.slots[slot as usize] as usize;
    if family == 4 {
        let it = fake.backends4[id];
        format!("{:?}:{} {} {} {:?}", it.address, it.port.get(), it.sets, it.flags, it.node)
    } else {
        let it = fake.backends6[id];
        format!("{:?}:{} {} {} {:?}", it.address, it.port.get(), it.sets, it.flags, it.node)
    }
}
