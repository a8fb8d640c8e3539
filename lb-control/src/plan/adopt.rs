//! Adopts maps that an earlier agent, or an earlier planner, has written, at whatever point of
//! a plan it stopped.
//!
//! The entry of NAMES says which service port an index means; all other entries are checked.
//! Inconsistent entries are not repaired here, but held in a form that the next plan repairs.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use lb_common::abi::{
    address::{Address4, Address6},
    backend::{Backend, IN_CLUSTER_SET, IN_LOCAL_SET},
    frontend::FrontendKey,
    service::{Name, Service, SlotRange},
};

use super::{
    BackendEntry, Orphans, Planner, family_index,
    frontends::Frontends,
    held::{BackendNodes, FIRST_BACKEND, HeldBackend, HeldPort, HeldSets, Ids, index_of_family},
    nodes::HeldNodes,
    ranges::Ranges,
    usage::{Usage, Used},
};
use crate::{
    dataplane::{Capacity, PinnedState},
    desired::{FrontendAddress, PortKey},
    ids::{
        Known, Numbers,
        slots::{Block, Blocks, order_of},
    },
    model::IpFamily,
};

impl Planner {
    /// A planner for maps of this capacity that hold `state`. Entries that are taken out of
    /// use are reused `grace` milliseconds later at the earliest, which must be longer than a
    /// program works on a packet.
    pub fn adopt(state: &PinnedState, capacity: Capacity, grace: u64) -> Self {
        let entries = [entries4(&state.backends4), entries6(&state.backends6)];
        let mut held = named_ports(state, &capacity);
        let owners: HashMap<u32, IpFamily> =
            held.values().flatten().map(|port| (port.index, port.key.family)).collect();
        let mut backends = owned_backends(&entries, &owners);
        let mut blocks = Blocks::new(capacity.slots);
        let mut end = used(&state.slots).len() as u32;
        // In the order of indices, so that the same one of two owners always gets a slot.
        let mut ports: Vec<&mut HeldPort> = held.values_mut().flatten().collect();
        ports.sort_unstable_by_key(|port| port.index);
        for port in ports {
            port.backends = backends.remove(&port.index).unwrap_or_default();
            let of_family = &entries[index_of_family(port.key.family)];
            for HeldBackend { id, .. } in &port.backends {
                port.nodes.set(*id, of_family[*id as usize].1.node);
            }
            end = end.max(adopt_sets(port, &state.slots, &mut blocks));
            port.backends.sort_by_key(|backend| (backend.address(), backend.slotted == 0));
        }
        blocks.quarantine_below(end);
        let limits = [capacity.backends4, capacity.backends6];
        let families = [IpFamily::V4, IpFamily::V6];
        let known = |number: usize| {
            let known =
                entries[number].iter().map(|(_, entry)| classify(entry, families[number], &owners));
            Numbers::adopt(FIRST_BACKEND, limits[number], known)
        };
        let ids = Ids {
            services: adopt_services(state, &capacity, &owners),
            backends: [known(0), known(1)],
            blocks,
            capacity,
        };
        let (frontends, orphan_frontends) = adopt_frontends(state, &capacity, &mut held);
        let (ranges, orphan_ranges) = adopt_ranges(state, &capacity, &mut held);
        let orphans = Orphans { frontends: orphan_frontends, ranges: orphan_ranges };
        let nodes = HeldNodes::new(state.nodes(), [capacity.nodes4, capacity.nodes6]);
        let mut used = Used::default();
        for (name, ports) in &held {
            used.change(name, &Usage::default(), &Usage::held(ports));
        }
        Self {
            grace,
            ids,
            held,
            frontends,
            ranges,
            nodes,
            orphans,
            settings: state.settings,
            used,
            namespace_share: 100,
            has_more_room: false,
        }
    }
}

fn entries4(backends: &[Backend<Address4>]) -> Vec<(u32, BackendEntry)> {
    let ip = |address| IpAddr::V4(Ipv4Addr::from(address));
    (0..).zip(used(backends)).map(|(id, backend)| (id, entry(backend, ip))).collect()
}

fn entries6(backends: &[Backend<Address6>]) -> Vec<(u32, BackendEntry)> {
    let ip = |address| IpAddr::V6(Ipv6Addr::from(address));
    (0..).zip(used(backends)).map(|(id, backend)| (id, entry(backend, ip))).collect()
}

/// A table without the entries at its end that were never used.
fn used<T: Default + PartialEq>(entries: &[T]) -> &[T] {
    let last = entries.iter().rposition(|entry| *entry != T::default());
    &entries[..last.map_or(0, |last| last + 1)]
}

fn entry<A: Copy>(backend: &Backend<A>, ip: impl Fn(A) -> IpAddr) -> BackendEntry {
    BackendEntry {
        ip: ip(backend.address),
        port: backend.port.get(),
        generation: backend.generation,
        sets: backend.sets,
        flags: backend.flags,
        service: backend.service,
        node: Some(ip(backend.node)).filter(|node| !node.is_unspecified()),
    }
}

/// The service ports that have a name, by Service. A name that cannot be read, or that an
/// earlier index has, is held as a Service that does not exist: the next plan removes it.
fn named_ports(state: &PinnedState, capacity: &Capacity) -> HashMap<Arc<str>, Vec<HeldPort>> {
    let mut held: HashMap<Arc<str>, Vec<HeldPort>> = HashMap::new();
    let in_range = state.names.iter().filter(|(index, _)| *index < capacity.services);
    for (index, name) in in_range {
        let (service, key) = read_name(name);
        let is_same = |port: &HeldPort| port.key == key;
        let is_twice = held.get(service).is_some_and(|ports| ports.iter().any(is_same));
        let unwanted = format!("?{index}");
        let service = if is_twice || service.is_empty() { &unwanted } else { service };
        let entry = state.services.get(*index as usize).copied().unwrap_or_default();
        held.entry(Arc::from(service)).or_default().push(HeldPort {
            index: *index,
            key,
            entry,
            sets: HeldSets::default(),
            backends: Vec::new(),
            nodes: BackendNodes::default(),
            frontends: Vec::new(),
            ranges: Vec::new(),
        });
    }
    held.values_mut().for_each(|ports| ports.sort_unstable_by(|a, b| a.key.cmp(&b.key)));
    held
}

/// The Service and the port that a name means; the Service is empty if it cannot be read.
fn read_name(name: &Name) -> (&str, PortKey) {
    let text = name.text.get(..name.length.into()).unwrap_or_default();
    let text = std::str::from_utf8(text).unwrap_or_default();
    let family = if name.family == 6 { IpFamily::V6 } else { IpFamily::V4 };
    let (service, port) = text.split_once(':').unwrap_or((text, ""));
    (service, PortKey { family, protocol: name.protocol, port: port.into() })
}

/// The backends of every service port, by its index.
fn owned_backends(
    entries: &[Vec<(u32, BackendEntry)>; 2],
    owners: &HashMap<u32, IpFamily>,
) -> HashMap<u32, Vec<HeldBackend>> {
    let mut owned: HashMap<u32, Vec<HeldBackend>> = HashMap::with_capacity(owners.len());
    for (family, entries) in [IpFamily::V4, IpFamily::V6].into_iter().zip(entries) {
        for (id, entry) in entries {
            if *id < FIRST_BACKEND || classify(entry, family, owners) != Known::Used {
                continue;
            }
            owned.entry(entry.service).or_default().push(HeldBackend {
                ip: entry.ip,
                id: *id,
                port: entry.port,
                generation: entry.generation,
                sets: entry.sets,
                slotted: 0,
                flags: entry.flags,
            });
        }
    }
    owned
}

fn classify(entry: &BackendEntry, family: IpFamily, owners: &HashMap<u32, IpFamily>) -> Known {
    if entry.ip.is_unspecified() {
        Known::Free(entry.generation)
    } else if owners.get(&entry.service) == Some(&family) {
        Known::Used
    } else {
        Known::JustFreed(entry.generation.wrapping_add(1))
    }
}

fn adopt_services(
    state: &PinnedState,
    capacity: &Capacity,
    owners: &HashMap<u32, IpFamily>,
) -> Numbers {
    let last = owners.keys().max().map_or(0, |last| *last as usize + 1);
    // A service port without backends has an entry like one that was never used.
    let count = used(&state.services).len().max(last.min(state.services.len()));
    let known = state.services[..count].iter().zip(0..).map(|(entry, index)| {
        if owners.contains_key(&index) {
            Known::Used
        } else if *entry == Service::default() {
            Known::Free(0)
        } else {
            Known::JustFreed(0)
        }
    });
    Numbers::adopt(0, capacity.services, known)
}

/// Adopts both sets of a service port and returns the end of its slots.
///
/// An id is in a set at most once. A slot that repeats an id is therefore faulty, like one
/// with the id of another owner's backend, and the next plan overwrites it. Weights by
/// repeated ids would have to change this, [`HeldBackend::slotted`] (one bit for each set)
/// and the counts in [`reserve`](super::reserve).
fn adopt_sets(port: &mut HeldPort, slots: &[u32], blocks: &mut Blocks) -> u32 {
    if port.key.protocol == 0 {
        return 0;
    }
    let positions: HashMap<u32, usize> = port
        .backends
        .iter()
        .enumerate()
        .map(|(position, backend)| (backend.id, position))
        .collect();
    let words = [(IN_CLUSTER_SET, port.entry.cluster), (IN_LOCAL_SET, port.entry.local)];
    let mut end = 0;
    for (number, (bit, word)) in words.into_iter().enumerate() {
        let Some(block) = adopt_block(word, slots.len() as u32, blocks) else { continue };
        let set = port.sets.get_mut(number);
        end = end.max(block.start + block.capacity());
        set.block = Some(block);
        set.slots = slots[word.start() as usize..][..word.length() as usize].to_vec();
        for (at, id) in set.slots.iter().enumerate() {
            match positions.get(id).map(|position| &mut port.backends[*position]) {
                Some(backend) if backend.slotted & bit == 0 => backend.slotted |= bit,
                _ => set.faulty.push(at),
            }
        }
    }
    end
}

fn adopt_block(word: SlotRange, slots: u32, blocks: &mut Blocks) -> Option<Block> {
    let is_inside = word.start().checked_add(word.length()).is_some_and(|end| end <= slots);
    if word.length() == 0 || !is_inside {
        return None;
    }
    let block = Block { start: word.start(), order: order_of(word.length()) };
    blocks.reserve(block).then_some(block)
}

/// The frontends, and the orphans among them by the index they lead to.
fn adopt_frontends(
    state: &PinnedState,
    capacity: &Capacity,
    held: &mut HashMap<Arc<str>, Vec<HeldPort>>,
) -> (Frontends, Vec<(u32, Vec<FrontendAddress>)>) {
    let v4 = state
        .frontends4
        .iter()
        .map(|(key, frontend)| (address(key, IpAddr::V4(Ipv4Addr::from(key.address))), frontend));
    let v6 = state
        .frontends6
        .iter()
        .map(|(key, frontend)| (address(key, IpAddr::V6(Ipv6Addr::from(key.address))), frontend));
    let mut frontends =
        Frontends { limits: [capacity.frontends4, capacity.frontends6], ..Frontends::default() };
    let mut of_port: HashMap<u32, Vec<FrontendAddress>> = HashMap::new();
    for (at, frontend) in v4.chain(v6) {
        frontends.entries.insert(at, *frontend);
        frontends.counts[family_index(at.ip)] += 1;
        of_port.entry(frontend.service).or_default().push(at);
    }
    for port in held.values_mut().flatten() {
        port.frontends = of_port.remove(&port.index).unwrap_or_default();
        port.frontends.sort_unstable();
    }
    (frontends, of_port.into_iter().collect())
}

/// The source ranges, and the orphans among them by the index of their service port.
fn adopt_ranges(
    state: &PinnedState,
    capacity: &Capacity,
    held: &mut HashMap<Arc<str>, Vec<HeldPort>>,
) -> (Ranges, Vec<(u32, Vec<IpNet>)>) {
    let mut ranges = Ranges { limits: [capacity.ranges4, capacity.ranges6], ..Ranges::default() };
    let mut of_port: HashMap<u32, Vec<IpNet>> = HashMap::new();
    for (service, range) in state.ranges() {
        ranges.counts[family_index(range.addr())] += 1;
        of_port.entry(service).or_default().push(range);
    }
    for port in held.values_mut().flatten() {
        port.ranges = of_port.remove(&port.index).unwrap_or_default();
        port.ranges.sort_unstable();
    }
    (ranges, of_port.into_iter().collect())
}

fn address<A: Copy>(key: &FrontendKey<A>, ip: IpAddr) -> FrontendAddress {
    FrontendAddress { ip, port: key.port.get(), protocol: key.protocol }
}
