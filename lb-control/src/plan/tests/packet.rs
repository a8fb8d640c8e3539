//! A packet, as far as it reads the maps, and what it may find.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use lb_common::abi::{
    address::Be16,
    backend::{IN_CLUSTER_SET, IN_LOCAL_SET},
    frontend::{Frontend, FrontendKey, FrontendKind},
    service::{Service, SlotRange},
};
use proptest::prelude::*;

use super::{State, ip};
use crate::{
    dataplane::{PinnedState, fake::Fake},
    desired::{DesiredBackend, DesiredFrontend, DesiredPort, FrontendAddress, PortKey},
    model::IpFamily,
    plan::BackendEntry,
};

/// Identifies a service port.
pub(super) type PortName = (Arc<str>, PortKey);

/// What a client finds: no frontend, or a service port.
pub(super) type Answer = Option<PortName>;

/// Backends that serve.
type Serving = BTreeSet<(IpAddr, u16)>;

/// The flags that keep clients on the node.
const POLICIES: u32 = Service::INTERNAL_LOCAL | Service::EXTERNAL_LOCAL;

/// Stands for packets that came in a tunnel: no flag of a service port, they are always kept
/// on the node.
const ENCAPSULATED: u32 = 0;

/// Whether clients whom this flag keeps on the node are kept there.
fn is_kept(flags: u32, local: u32) -> bool {
    local == ENCAPSULATED || flags & local != 0
}

/// The backends that clients get whom this flag keeps on the node.
fn answers(port: &DesiredPort, local: u32) -> Serving {
    let bit = if is_kept(port.flags, local) { IN_LOCAL_SET } else { IN_CLUSTER_SET };
    let serving = port.backends.iter().filter(|backend| backend.sets & bit != 0);
    serving.map(DesiredBackend::address).collect()
}

/// The flags of a service port that keep clients of a kind of frontends on the node.
fn local_flags(kind: FrontendKind) -> &'static [u32] {
    if kind.is_internal() {
        &[Service::INTERNAL_LOCAL]
    } else {
        &[Service::EXTERNAL_LOCAL, ENCAPSULATED]
    }
}

/// The answers that each frontend may give while states follow each other: it leads to
/// a service port as it was, or as it will be.
#[derive(Default)]
pub(super) struct Allowed {
    answers: HashMap<FrontendAddress, Vec<Answer>>,
    /// The kind of each frontend, and whether it is for certain clients only.
    doors: HashMap<FrontendAddress, Vec<(FrontendKind, bool)>>,
    /// Those clients.
    ranges: HashMap<PortName, Vec<Vec<IpNet>>>,
    /// By the flag that counts.
    backends: HashMap<(PortName, u32), Vec<Serving>>,
    flags: HashMap<PortName, BTreeSet<u32>>,
    /// All backends that are in a set.
    serving: HashMap<PortName, Serving>,
    states: usize,
}

impl Allowed {
    pub(super) fn add(&mut self, state: &State) {
        for (name, service) in state {
            for port in &service.ports {
                let name = (Arc::clone(name), port.key.clone());
                for flag in [Service::INTERNAL_LOCAL, Service::EXTERNAL_LOCAL, ENCAPSULATED] {
                    let backends = self.backends.entry((name.clone(), flag)).or_default();
                    backends.push(answers(port, flag));
                }
                self.flags.entry(name.clone()).or_default().insert(port.flags & POLICIES);
                let serving = port.backends.iter().filter(|backend| backend.sets != 0);
                let known = self.serving.entry(name.clone()).or_default();
                known.extend(serving.map(DesiredBackend::address));
                for frontend in &port.frontends {
                    let new = || vec![None; self.states];
                    self.answers.entry(frontend.at).or_insert_with(new).push(Some(name.clone()));
                    let door = (frontend.kind, frontend.is_ranged());
                    self.doors.entry(frontend.at).or_default().push(door);
                }
                if !port.ranges.is_empty() {
                    self.ranges.entry(name.clone()).or_default().push(port.ranges.to_vec());
                }
            }
        }
        self.states += 1;
        for list in self.answers.values_mut().filter(|list| list.len() < self.states) {
            list.push(None);
        }
    }

    fn names(&self, frontend: &FrontendAddress) -> impl Iterator<Item = &PortName> {
        self.answers[frontend].iter().flatten()
    }

    /// The sets of backends that a frontend may lead clients to whom this flag keeps on the
    /// node.
    fn sets(&self, frontend: &FrontendAddress, flag: u32) -> Vec<&Serving> {
        self.names(frontend).flat_map(|name| &self.backends[&(name.clone(), flag)]).collect()
    }

    /// Whether clients inside and outside change places: some go to the local set while
    /// others leave it. Then the old policy may be met on a new set.
    fn swaps_policies(&self, frontend: &FrontendAddress) -> bool {
        self.names(frontend).any(|name| {
            [Service::INTERNAL_LOCAL, Service::EXTERNAL_LOCAL]
                .iter()
                .all(|flag| self.flags[name].contains(flag))
        })
    }
}

/// The maps at the four moments when one packet reads them.
pub(super) struct Reads<'a> {
    pub(super) frontends: &'a Fake,
    pub(super) services: &'a Fake,
    pub(super) slots: &'a Fake,
    pub(super) backends: &'a Fake,
}

impl<'a> Reads<'a> {
    pub(super) fn at_once(fake: &'a Fake) -> Self {
        Self { frontends: fake, services: fake, slots: fake, backends: fake }
    }

    pub(super) fn frontend(&self, frontend: &FrontendAddress) -> Option<Frontend> {
        let port = Be16::new(frontend.port);
        match frontend.ip {
            IpAddr::V4(ip) => {
                let key = FrontendKey::new(ip.into(), port, frontend.protocol);
                self.frontends.frontends4.get(&key).copied()
            }
            IpAddr::V6(ip) => {
                let key = FrontendKey::new(ip.into(), port, frontend.protocol);
                self.frontends.frontends6.get(&key).copied()
            }
        }
    }

    /// The ranges of clients that a frontend is for; none: it is for everybody.
    fn ranges(&self, frontend: &Frontend) -> Option<Vec<IpNet>> {
        let is_ranged = frontend.flags & Frontend::RANGED != 0;
        is_ranged.then(|| ranges_of(self.frontends, frontend.service))
    }

    /// The backends that a packet may be given, with ids and generations.
    fn choices(
        &self,
        at: &FrontendAddress,
        frontend: Frontend,
        flag: u32,
    ) -> Vec<(u32, BackendEntry)> {
        let entry = self.services.services[frontend.service as usize];
        if entry.flags & Service::ADDRESS != 0 {
            return Vec::new();
        }
        let range = if is_kept(entry.flags, flag) { entry.local } else { entry.cluster };
        let slots = (range.start()..).take(range.length() as usize);
        let choice = |slot: u32| {
            let id = self.slots.slots[slot as usize];
            (id, backend(self.backends, at.ip, id))
        };
        slots.map(choice).collect()
    }
}

/// The ranges that a service port has, of both families.
fn ranges_of(fake: &Fake, service: u32) -> Vec<IpNet> {
    let state = PinnedState {
        ranges4: fake.ranges4.iter().copied().collect(),
        ranges6: fake.ranges6.iter().copied().collect(),
        ..PinnedState::default()
    };
    let own = state.ranges().filter(|(index, _)| *index == service);
    own.map(|(_, range)| range).collect()
}

pub(super) fn backend(fake: &Fake, family: IpAddr, id: u32) -> BackendEntry {
    let (ip, node, port, generation, sets, flags, service) = match family {
        IpAddr::V4(_) => {
            let it = fake.backends4[id as usize];
            let [ip, node] = [it.address, it.node].map(|ip| IpAddr::V4(Ipv4Addr::from(ip)));
            (ip, node, it.port, it.generation, it.sets, it.flags, it.service)
        }
        IpAddr::V6(_) => {
            let it = fake.backends6[id as usize];
            let [ip, node] = [it.address, it.node].map(|ip| IpAddr::V6(Ipv6Addr::from(ip)));
            (ip, node, it.port, it.generation, it.sets, it.flags, it.service)
        }
    };
    let node = Some(node).filter(|node| !node.is_unspecified());
    BackendEntry { ip, port: port.get(), generation, sets, flags, service, node }
}

/// The generations that flows noted, so that a generation never stands for two backends.
pub(super) type Noted = HashMap<(bool, u32, u16), (IpAddr, u16)>;

pub(super) fn check(
    reads: &Reads<'_>,
    allowed: &Allowed,
    noted: &mut Noted,
    is_at_once: bool,
) -> Result<(), TestCaseError> {
    for at in allowed.answers.keys() {
        let Some(frontend) = reads.frontend(at) else {
            prop_assert!(allowed.answers[at].contains(&None), "{at:?} is gone");
            continue;
        };
        check_door(reads, allowed, at, &frontend)?;
        for flag in local_flags(frontend.kind) {
            let choices = reads.choices(at, frontend, *flag);
            check_choices(&choices, allowed, (at, *flag), is_at_once)?;
            for (id, entry) in choices {
                let (address, generation) = ((entry.ip, entry.port), entry.generation);
                let first = *noted.entry((entry.ip.is_ipv4(), id, generation)).or_insert(address);
                prop_assert_eq!(first, address, "generation {} of {}", generation, id);
                prop_assert_eq!(entry.service, frontend.service, "backend {} of {:?}", id, at);
                prop_assert!(
                    !is_at_once || entry.sets != 0,
                    "backend {id} is in a slot and in no set"
                );
            }
        }
    }
    Ok(())
}

/// Clients whom `flag` keeps on the node get backends that they got before or will get.
fn check_choices(
    choices: &[(u32, BackendEntry)],
    allowed: &Allowed,
    (at, flag): (&FrontendAddress, u32),
    is_at_once: bool,
) -> Result<(), TestCaseError> {
    let sets = allowed.sets(at, flag);
    prop_assert!(!sets.is_empty(), "{at:?} should not be there");
    let is_exact = flag == ENCAPSULATED || !allowed.swaps_policies(at);
    let may_be_empty = !is_exact || sets.iter().any(|set| set.is_empty());
    prop_assert!(may_be_empty || !choices.is_empty(), "{at:?} has no backend");
    // A packet that saw the old policy may find a set as it is now.
    let backends: BTreeSet<_> = if is_at_once && is_exact {
        sets.into_iter().flatten().collect()
    } else {
        allowed.names(at).flat_map(|name| &allowed.serving[name]).collect()
    };
    for (_, entry) in choices {
        let address = (entry.ip, entry.port);
        prop_assert!(backends.contains(&address), "{at:?} leads to {address:?}");
    }
    Ok(())
}

/// What is said of the frontend was or will be true, and every client is admitted or rejected
/// as the service port did before or will do.
fn check_door(
    reads: &Reads<'_>,
    allowed: &Allowed,
    at: &FrontendAddress,
    frontend: &Frontend,
) -> Result<(), TestCaseError> {
    let ranges = reads.ranges(frontend);
    let door = (frontend.kind, ranges.is_some());
    prop_assert!(allowed.doors[at].contains(&door), "{frontend:?} of {at:?}");
    let Some(ranges) = ranges else { return Ok(()) };
    let known: Vec<_> =
        allowed.names(at).filter_map(|name| allowed.ranges.get(name)).flatten().collect();
    for high in [100, 101, 102] {
        let client = ip(IpFamily::of(at.ip), high, 7);
        let lets_in = |ranges: &[IpNet]| ranges.iter().any(|range| range.contains(&client));
        let is_expected = known.iter().any(|known| lets_in(known) == lets_in(&ranges));
        prop_assert!(is_expected, "{client} at {at:?} with {ranges:?}");
    }
    Ok(())
}

/// Everything that the maps mean, without the numbers that were chosen for it.
pub(super) fn meaning(fake: &Fake, state: &State) -> BTreeMap<FrontendAddress, String> {
    let mut meaning = BTreeMap::new();
    let frontends =
        state.values().flat_map(|service| &service.ports).flat_map(|port| &port.frontends);
    for DesiredFrontend { at, .. } in frontends {
        let Some(Frontend { service, kind, flags, .. }) = Reads::at_once(fake).frontend(at) else {
            continue;
        };
        let (entry, name) = (fake.services[service as usize], fake.names[service as usize]);
        let door = (kind.kind, flags, ranges_of(fake, service));
        let members = |range: SlotRange| -> BTreeSet<_> {
            let slots = (range.start()..).take(range.length() as usize);
            slots
                .map(|slot| fake.slots[slot as usize])
                .map(|id| {
                    let it = backend(fake, at.ip, id);
                    (it.ip, it.port, it.sets, it.flags, it.node)
                })
                .collect()
        };
        let sets = if entry.flags & Service::ADDRESS != 0 {
            (BTreeSet::new(), BTreeSet::new())
        } else {
            (members(entry.cluster), members(entry.local))
        };
        let lengths = (entry.cluster.length(), entry.local.length());
        let text = String::from_utf8_lossy(&name.text[..name.length.into()]).into_owned();
        let rest = (name.family, name.protocol, entry.affinity_seconds, entry.flags);
        meaning.insert(*at, format!("{text} {door:?} {rest:?} {lengths:?} {sets:?}"));
    }
    meaning
}
