//! A packet, as far as it reads the maps, and what it may find.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use lb_common::abi::{
    address::Be16,
    backend::{IN_CLUSTER_SET, IN_LOCAL_SET},
    frontend::FrontendKey,
    service::{Service, SlotRange},
};
use proptest::prelude::*;

use super::State;
use crate::{
    dataplane::fake::Fake,
    desired::{DesiredBackend, DesiredPort, FrontendAddress, PortKey},
    plan::BackendEntry,
};

/// What tells service ports apart.
pub(super) type PortName = (Arc<str>, PortKey);

/// What a client finds: no front end, or a service port.
pub(super) type Answer = Option<PortName>;

pub(super) fn answers(port: &DesiredPort) -> BTreeSet<(IpAddr, u16)> {
    let bit = if port.flags & Service::INTERNAL_LOCAL != 0 { IN_LOCAL_SET } else { IN_CLUSTER_SET };
    let serving = port.backends.iter().filter(|backend| backend.sets & bit != 0);
    serving.map(DesiredBackend::address).collect()
}

/// The answers that each front end may give while states follow each other: it leads to
/// a service port as it was, or as it will be.
#[derive(Default)]
pub(super) struct Allowed {
    answers: HashMap<FrontendAddress, Vec<Answer>>,
    backends: HashMap<PortName, Vec<BTreeSet<(IpAddr, u16)>>>,
    /// All backends that serve anybody.
    serving: HashMap<PortName, BTreeSet<(IpAddr, u16)>>,
    states: usize,
}

impl Allowed {
    pub(super) fn add(&mut self, state: &State) {
        for (name, service) in state {
            for port in &service.ports {
                let name = (Arc::clone(name), port.key.clone());
                self.backends.entry(name.clone()).or_default().push(answers(port));
                let serving = port.backends.iter().filter(|backend| backend.sets != 0);
                let known = self.serving.entry(name.clone()).or_default();
                known.extend(serving.map(DesiredBackend::address));
                for frontend in &port.frontends {
                    let new = || vec![None; self.states];
                    self.answers.entry(*frontend).or_insert_with(new).push(Some(name.clone()));
                }
            }
        }
        self.states += 1;
        for list in self.answers.values_mut().filter(|list| list.len() < self.states) {
            list.push(None);
        }
    }

    /// The sets of backends that a front end may lead to.
    fn sets(&self, frontend: &FrontendAddress) -> Vec<&BTreeSet<(IpAddr, u16)>> {
        self.answers[frontend].iter().flatten().flat_map(|name| &self.backends[name]).collect()
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

    pub(super) fn frontend(&self, frontend: &FrontendAddress) -> Option<u32> {
        let port = Be16::new(frontend.port);
        let key4 = |ip| FrontendKey::new(ip, port, frontend.protocol);
        match frontend.ip {
            IpAddr::V4(ip) => self.frontends.frontends4.get(&key4(ip.into())).map(|it| it.service),
            IpAddr::V6(ip) => {
                let key = FrontendKey::new(ip.into(), port, frontend.protocol);
                self.frontends.frontends6.get(&key).map(|it| it.service)
            }
        }
    }

    /// The backends that a packet may be given, with ids and generations.
    fn choices(&self, frontend: &FrontendAddress) -> Option<Vec<(u32, BackendEntry)>> {
        let index = self.frontend(frontend)? as usize;
        let entry = self.services.services[index];
        if entry.flags & Service::ADDRESS != 0 {
            return Some(Vec::new());
        }
        let is_local = entry.flags & Service::INTERNAL_LOCAL != 0;
        let range = if is_local { entry.local } else { entry.cluster };
        let slots = (range.start()..).take(range.length() as usize);
        let choice = |slot: u32| {
            let id = self.slots.slots[slot as usize];
            (id, backend(self.backends, frontend.ip, id))
        };
        Some(slots.map(choice).collect())
    }
}

pub(super) fn backend(fake: &Fake, family: IpAddr, id: u32) -> BackendEntry {
    let (ip, port, generation, sets, flags, service) = match family {
        IpAddr::V4(_) => {
            let it = fake.backends4[id as usize];
            let ip = Ipv4Addr::from(it.address);
            (ip.into(), it.port, it.generation, it.sets, it.flags, it.service)
        }
        IpAddr::V6(_) => {
            let it = fake.backends6[id as usize];
            let ip = Ipv6Addr::from(it.address);
            (ip.into(), it.port, it.generation, it.sets, it.flags, it.service)
        }
    };
    BackendEntry { ip, port: port.get(), generation, sets, flags, service }
}

/// What flows noted, so that a generation never stands for two backends.
pub(super) type Noted = HashMap<(bool, u32, u16), (IpAddr, u16)>;

pub(super) fn check(
    reads: &Reads<'_>,
    allowed: &Allowed,
    noted: &mut Noted,
    is_at_once: bool,
) -> Result<(), TestCaseError> {
    for frontend in allowed.answers.keys() {
        let Some(choices) = reads.choices(frontend) else {
            prop_assert!(allowed.answers[frontend].contains(&None), "{frontend:?} is gone");
            continue;
        };
        let sets = allowed.sets(frontend);
        prop_assert!(!sets.is_empty(), "{frontend:?} should not be there");
        let may_be_empty = sets.iter().any(|set| set.is_empty());
        prop_assert!(may_be_empty || !choices.is_empty(), "{frontend:?} has no backend");
        // A packet that saw the old policy may find a set as it is now.
        let backends: BTreeSet<_> = if is_at_once {
            sets.into_iter().flatten().collect()
        } else {
            let names = allowed.answers[frontend].iter().flatten();
            names.flat_map(|name| &allowed.serving[name]).collect()
        };
        let index = reads.frontend(frontend);
        for (id, entry) in choices {
            let address = (entry.ip, entry.port);
            prop_assert!(backends.contains(&address), "{frontend:?} leads to {address:?}");
            let first = *noted.entry((entry.ip.is_ipv4(), id, entry.generation)).or_insert(address);
            prop_assert_eq!(first, address, "generation {} of {}", entry.generation, id);
            prop_assert_eq!(Some(entry.service), index, "backend {} of {:?}", id, frontend);
            prop_assert!(!is_at_once || entry.sets != 0, "backend {id} is eligible for nobody");
        }
    }
    Ok(())
}

/// Everything that the maps mean, without the numbers that were chosen for it.
pub(super) fn meaning(fake: &Fake, state: &State) -> BTreeMap<FrontendAddress, String> {
    let mut meaning = BTreeMap::new();
    let frontends =
        state.values().flat_map(|service| &service.ports).flat_map(|port| &port.frontends);
    for frontend in frontends {
        let Some(index) = Reads::at_once(fake).frontend(frontend) else { continue };
        let (entry, name) = (fake.services[index as usize], fake.names[index as usize]);
        let members = |range: SlotRange| -> BTreeSet<_> {
            let slots = (range.start()..).take(range.length() as usize);
            slots
                .map(|slot| fake.slots[slot as usize])
                .map(|id| {
                    let it = backend(fake, frontend.ip, id);
                    (it.ip, it.port, it.sets, it.flags)
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
        meaning.insert(*frontend, format!("{text} {rest:?} {lengths:?} {sets:?}"));
    }
    meaning
}
