//! The difference between what the maps hold and what they should hold: a list of writes, as
//! data.
//!
//! # Order
//! 1. *reclaim*: wipe entries that earlier plans took out of use a grace period ago;
//! 2. *withdraw*: add addresses of nodes, store the settings, delete frontends that no longer
//!    lead to a service port;
//! 3. *stage*: write what no packet reaches yet: backends, slots in a free block, the
//!    entries of new service ports, last their names; and add new source ranges. Of backends
//!    that packets reach already, widen the sets and store the flags and the node;
//! 4. *publish*: for each set the slots that change in place, then one aligned word that
//!    makes them reachable; then the service entry, if a policy or the affinity changed;
//! 5. *open*: add new frontends and change old ones, after everything else that adds;
//! 6. *retire*: mark entries as gone that no packet finds any more. They are reused only
//!    after the grace period, by a later plan. Source ranges and addresses of nodes that are
//!    no longer wanted are deleted.
//!
//! Ops of different service ports do not depend on each other, except for a frontend
//! that moves from one to another ([`Write::UpsertFrontend::replaces`]).
//!
//! # Why a packet may pass at any moment
//! A packet reads frontend, service entry, slot, backend, in that order. It reads a backend
//! twice, when it is chosen and when the flow is made, and a second slot if the first one leads
//! to a backend that has gone. That mixes no more than what follows allows: an id keeps its
//! address for the grace period after the last slot that leads to it.
//! - **A set grows** within its block: the backend is stored, then its id behind the
//!   last slot, where no packet looks, then the length.
//! - **A set shrinks**: the id in the last slot is stored over the id that leaves, by
//!   one 4-byte store, then the shorter length. Between the two stores one backend is in two
//!   slots: it gets twice its share for an instant. A packet that read the old length
//!   finds in the last slot what was there before: a backend of the service. Until the
//!   first store the leaving backend may be chosen, as if the packet had come earlier.
//! - **One backend leaves while another joins**: the id of the one that joins is stored over
//!   the other's.
//! - **A set outgrows its block**, or most of it changes: the new block is filled, then
//!   start and length change in one word. The old block stays as it is for the grace
//!   period, for packets that read the old word.
//! - Slots hold only backends of their service port. So a packet that mixes old and new
//!   reads gets a backend of the service, from before or after.
//! - **A backend that leaves its slices** gets the next generation only when no slot
//!   leads to it. A packet that read the slot before may still note the new generation,
//!   and its flow would look alive. Therefore the id counts up once more when the grace
//!   period is over, before the id can be reused: then such a flow is recognised as stale,
//!   and a flow that holds an old generation never meets a new meaning.
//! - **Sets that a backend is a member of** are widened before slots lead to it and
//!   narrowed after they do not: a chosen backend is always eligible.
//! - **The node of a backend** gets another address in place. A packet may read a part of the
//!   old and a part of the new IPv6 address; a flow that begins in that instant is
//!   encapsulated to an address that no node has.
//! - **A service port** goes after its frontends. Its entry, slots and backends keep
//!   their content for the grace period.
//! - **`INTERNAL_LOCAL`** is set after the local set is there and before the cluster set
//!   changes, and cleared the other way round: no packet gets the old policy on new sets.

pub mod adopt;
mod frontends;
pub mod held;
mod nodes;
mod port;
mod ranges;
mod reserve;
mod usage;

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use lb_common::abi::{
    frontend::Frontend,
    service::{Name, Service, SlotRange},
    settings::Settings,
};

use crate::{
    desired::{DesiredFrontend, DesiredService, FrontendAddress, PortKey},
    model::IpFamily,
    plan::{frontends::Frontends, ranges::Ranges},
    work,
};

use held::{HeldPort, Ids};
use reserve::NoRoom;
pub use usage::Map;
use usage::{Share, Usage, Used};

/// The owner of ops that belong to no service port.
pub const NO_OWNER: u32 = u32::MAX;

/// One step of a plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Op {
    /// The index of the service port that it belongs to. If the op fails, later ops of the
    /// same owner must not be done.
    pub owner: u32,
    /// What to write.
    pub write: Write,
}

/// What an [`Op`] writes. Entries of SERVICES, NAMES, RANGES4 and RANGES6 are those of the
/// op's owner.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// Stores an entry of BACKENDS4 or BACKENDS6.
    StoreBackend {
        /// Its id.
        id: u32,
        /// The entry.
        entry: BackendEntry,
    },
    /// Stores backend ids into SLOTS.
    StoreSlots {
        /// The first slot.
        start: u32,
        /// The ids.
        backends: Vec<u32>,
    },
    /// Stores the whole entry of SERVICES.
    StoreService(Service),
    /// Wipes an entry of SERVICES that has no owner.
    WipeService(u32),
    /// Replaces the cluster set.
    PublishCluster(SlotRange),
    /// Replaces the local set.
    PublishLocal(SlotRange),
    /// Stores the entry of NAMES.
    StoreName(Box<Name>),
    /// Adds a frontend, lets it lead to another service port, or changes its kind or flags.
    UpsertFrontend {
        /// The frontend.
        frontend: DesiredFrontend,
        /// The service port that it led to before, which must not be retired if this op
        /// fails.
        replaces: Option<u32>,
    },
    /// Deletes a frontend.
    DeleteFrontend(FrontendAddress),
    /// Adds a source range.
    InsertRange(IpNet),
    /// Deletes a source range.
    DeleteRange(IpNet),
    /// Adds an address of a node.
    InsertNode(IpAddr),
    /// Deletes an address of a node.
    DeleteNode(IpAddr),
    /// Replaces the settings.
    StoreSettings(Box<Settings>),
}

/// An entry of BACKENDS4 or BACKENDS6, by the family of its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendEntry {
    /// The address.
    pub ip: IpAddr,
    /// The port.
    pub port: u16,
    /// The generation.
    pub generation: u16,
    /// The sets that it is a member of.
    pub sets: u8,
    /// The flags.
    pub flags: u8,
    /// The service port that owns it.
    pub service: u32,
    /// The address of the node that it runs on, if that is another node and known.
    pub node: Option<IpAddr>,
}

/// Ops in the order in which they must be done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// The ops.
    pub ops: Vec<Op>,
}

/// A Service that stays as it was, or is not programmed, because it does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// The Service, as `namespace/name`.
    pub service: Arc<str>,
    /// The map without room.
    pub map: Map,
    /// How many entries it has.
    pub limit: u32,
    /// How many entries more the Service wants; of SLOTS, how many in one block.
    pub needed: usize,
    /// If the map has room, but the Service's namespace has its share of it: how many percent of
    /// what is free to it that is.
    pub share: Option<u32>,
}

impl Shortage {
    /// What it means, and what to do.
    pub fn message(&self) -> String {
        let Self { map, limit, share, .. } = self;
        let flag = map.flag();
        match share {
            None => format!(
                "map {map} is full ({limit} entries): this Service is not programmed, or stays as \
                 it was; raise {flag}"
            ),
            Some(percent) => format!(
                "the Services of this namespace have their share of map {map} ({percent} % of what \
                 is free to them, of {limit} entries): this Service is not programmed, or stays as \
                 it was; delete Services of the namespace, or raise {flag} or --max-namespace-share"
            ),
        }
    }

    /// Whether both have the same [`Self::message`].
    pub fn has_same_message(&self, other: &Self) -> bool {
        (self.map, self.limit, self.share) == (other.map, other.limit, other.share)
    }
}

/// Knows what the maps hold and plans how they change.
///
/// It assumes that everything it has planned is done. Ops that fail must be done later,
/// before any later op of the same owner, and until then nothing may be reclaimed.
/// Otherwise the planner must be replaced by one that [adopts](Planner::adopt) what the maps
/// really hold.
#[derive(Debug)]
pub struct Planner {
    grace: u64,
    ids: Ids,
    held: HashMap<Arc<str>, Vec<HeldPort>>,
    frontends: Frontends,
    ranges: Ranges,
    nodes: nodes::HeldNodes,
    orphans: Orphans,
    settings: Settings,
    used: Used,
    /// How many percent of what is free to it the Services of a namespace may have.
    namespace_share: u32,
    /// Whether entries became free: Services that did not fit may fit now.
    has_more_room: bool,
}

/// Entries found at adoption whose service port is not held. The next plan deletes them.
#[derive(Debug, Default)]
struct Orphans {
    frontends: Vec<(u32, Vec<FrontendAddress>)>,
    ranges: Vec<(u32, Vec<IpNet>)>,
}

/// An unfinished plan.
#[derive(Debug, Default)]
pub struct Draft {
    reclaim: Vec<Op>,
    withdraw: Vec<Op>,
    stage: Vec<Op>,
    publish: Vec<Op>,
    open: Vec<Op>,
    retire: Vec<Op>,
}

impl Planner {
    /// Begins a plan.
    pub fn begin(&mut self) -> Draft {
        let mut draft = Draft::default();
        let orphans = std::mem::take(&mut self.orphans);
        for (owner, frontends) in orphans.frontends {
            self.frontends.remove_owned_by(&frontends, owner);
        }
        // Directly after the frontends are withdrawn, because this plan may reuse the index.
        for (owner, ranges) in orphans.ranges {
            self.ranges.delete(&mut draft.stage, owner, &ranges);
        }
        draft
    }

    /// Makes entries available that were taken out of use a grace period before `now`, in
    /// milliseconds. All ops of earlier plans must have been done.
    pub fn reclaim(&mut self, draft: &mut Draft, now: u64) {
        let mut reclaim = |write| draft.reclaim.push(Op { owner: NO_OWNER, write });
        for (family, numbers) in [IpFamily::V4, IpFamily::V6].iter().zip(&mut self.ids.backends) {
            for (id, generation) in numbers.reclaim(now, self.grace) {
                let entry = BackendEntry::free(*family, generation);
                reclaim(Write::StoreBackend { id, entry });
            }
        }
        for (index, _) in self.ids.services.reclaim(now, self.grace) {
            reclaim(Write::WipeService(index));
        }
        self.has_more_room |= !draft.reclaim.is_empty();
        self.has_more_room |= self.ids.blocks.reclaim(now, self.grace);
    }

    /// Whether entries became free since the last call: Services that did not fit may fit now.
    pub fn take_more_room(&mut self) -> bool {
        let of_frontends = std::mem::take(&mut self.frontends.has_more_room);
        let of_ranges = std::mem::take(&mut self.ranges.has_more_room);
        std::mem::take(&mut self.has_more_room) | of_frontends | of_ranges
    }

    /// Whether a Service that did not fit may fit now. It looks at the one map that lacked room.
    pub fn may_fit(&self, shortage: &Shortage) -> bool {
        let map = shortage.map;
        let free = reserve::free(&self.ids, (&self.frontends, &self.ranges), map);
        match shortage.share {
            Some(_) => self.share(&shortage.service).allows(map, shortage.needed, free),
            None if map == Map::Slots => shortage.needed <= self.ids.blocks.largest(),
            None => shortage.needed <= free,
        }
    }

    /// Sets how many percent of what is free to it the Services of a namespace may have; 100, the
    /// value at the beginning, means no limit.
    pub fn set_namespace_share(&mut self, percent: u32) {
        self.namespace_share = percent;
    }

    fn share(&self, service: &str) -> Share {
        Share { percent: self.namespace_share, used: self.used.near(service) }
    }

    /// The settings in force once everything planned is done.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Plans the settings.
    pub fn store_settings(&mut self, draft: &mut Draft, settings: Settings) {
        if self.settings != settings {
            self.settings = settings;
            let write = Write::StoreSettings(Box::new(settings));
            draft.withdraw.push(Op { owner: NO_OWNER, write });
        }
    }

    /// Plans that NODES4 and NODES6 hold these addresses, and returns how many do not fit.
    pub fn store_nodes(&mut self, draft: &mut Draft, wanted: &BTreeSet<IpAddr>) -> usize {
        self.nodes.plan(draft, wanted)
    }

    /// Plans one Service, or its removal if `desired` is none. A Service that does not fit
    /// stays as it is.
    pub fn plan(
        &mut self,
        draft: &mut Draft,
        name: &Arc<str>,
        desired: Option<&DesiredService>,
    ) -> Result<(), Shortage> {
        let ports = desired.map_or(&[][..], |desired| &desired.ports[..]);
        work::count(ports.len());
        let mut held = self.held.remove(name).unwrap_or_default();
        if held.is_empty() && ports.is_empty() {
            return Ok(());
        }
        let before = Usage::held(&held);
        let (maps, share) = ((&self.frontends, &self.ranges), self.share(name));
        let matched = match reserve::reserve(&mut self.ids, maps, &share, &held, ports) {
            Ok(matched) => matched,
            Err(no_room) => {
                self.held.insert(Arc::clone(name), held);
                return Err(self.shortage(name, no_room));
            }
        };
        let mut old: Vec<Option<HeldPort>> = held.drain(..).map(Some).collect();
        // To the port: there are many Services, and they seldom get another one.
        held.shrink_to(ports.len());
        held.reserve_exact(ports.len());
        for (desired, matched) in ports.iter().zip(matched) {
            let port = matched.held.and_then(|position| old[position].take());
            let mut port = port::plan(&mut self.ids, draft, name, port, desired, matched);
            self.ranges.plan(draft, &mut port, &desired.ranges);
            held.push(port);
        }
        for gone in old.into_iter().flatten() {
            self.frontends.remove_owned_by(&gone.frontends, gone.index);
            self.ranges.delete(&mut draft.retire, gone.index, &gone.ranges);
            port::retire(&mut self.ids, draft, gone);
        }
        for (port, desired) in held.iter_mut().zip(ports) {
            let wanted = || desired.frontends.iter().map(|frontend| &frontend.at);
            if !port.frontends.iter().eq(wanted()) {
                self.frontends.remove_owned_by(&port.frontends, port.index);
                port.frontends = wanted().copied().collect();
            }
            self.frontends.set_owner(&desired.frontends, port.index);
        }
        self.used.change(name, &before, &Usage::held(&held));
        if !held.is_empty() {
            self.held.insert(Arc::clone(name), held);
        }
        Ok(())
    }

    fn shortage(&self, service: &Arc<str>, no_room: NoRoom) -> Shortage {
        let NoRoom { map, needed, is_share } = no_room;
        let capacity = &self.ids.capacity;
        let limit = match map {
            Map::Services => capacity.services,
            Map::Backends4 => capacity.backends4,
            Map::Backends6 => capacity.backends6,
            Map::Frontends4 => capacity.frontends4,
            Map::Frontends6 => capacity.frontends6,
            Map::Ranges4 => capacity.ranges4,
            Map::Ranges6 => capacity.ranges6,
            Map::Slots => capacity.slots,
        };
        let share = is_share.then_some(self.namespace_share);
        Shortage { service: Arc::clone(service), map, limit, needed, share }
    }

    /// Ends a plan.
    pub fn finish(&mut self, mut draft: Draft) -> Plan {
        // Entries of ClusterIPs as a whole come after those of their ports, because such an
        // entry rejects ports that are not there.
        let mut addresses = Vec::new();
        for (at, before) in std::mem::take(&mut self.frontends.touched) {
            let now = self.frontends.entries.get(&at).copied();
            match (before, now) {
                (before, now) if before == now => {}
                (before, Some(Frontend { service: owner, kind, flags, .. })) => {
                    let replaces = before.map(|before| before.service);
                    let replaces = replaces.filter(|service| *service != owner);
                    let frontend = DesiredFrontend { at, kind, flags };
                    let write = Write::UpsertFrontend { frontend, replaces };
                    let phase = if at.protocol == 0 { &mut addresses } else { &mut draft.open };
                    phase.push(Op { owner, write });
                }
                (Some(Frontend { service: owner, .. }), None) => {
                    draft.withdraw.push(Op { owner, write: Write::DeleteFrontend(at) });
                    self.frontends.has_more_room = true;
                }
                (None, None) => {}
            }
        }
        draft.open.append(&mut addresses);
        self.ranges.commit();
        let mut ops = draft.reclaim;
        for phase in [draft.withdraw, draft.stage, draft.publish, draft.open, draft.retire] {
            ops.extend(phase);
        }
        Plan { ops }
    }

    /// When the next entry can be reclaimed, even if nothing changes.
    pub fn next_due(&self, now: u64) -> Option<u64> {
        let ids = &self.ids;
        let numbers = ids.backends.iter().chain([&ids.services]);
        let due = numbers.filter_map(|numbers| numbers.next_due(now, self.grace));
        due.chain(ids.blocks.next_due(now, self.grace)).min()
    }

    /// The Services that have entries in the maps, in no order.
    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.held.keys()
    }

    /// How many service ports, frontends and backends the maps hold.
    pub fn counts(&self) -> Counts {
        let used = self.used.total();
        Counts {
            services: used.of(Map::Services),
            frontends: self.frontends.entries.len(),
            backends: used.of(Map::Backends4) + used.of(Map::Backends6),
        }
    }
}

/// How many entries the maps hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Entries of SERVICES in use.
    pub services: usize,
    /// Entries of FRONTENDS4 and FRONTENDS6.
    pub frontends: usize,
    /// Entries of BACKENDS4 and BACKENDS6 in use.
    pub backends: usize,
}

impl BackendEntry {
    /// The entry of an id that is free.
    fn free(family: IpFamily, generation: u16) -> Self {
        Self {
            ip: family.unspecified(),
            port: 0,
            generation,
            sets: 0,
            flags: 0,
            service: 0,
            node: None,
        }
    }
}

/// The entry of NAMES for a port of a Service. The text fits, because the model refuses longer
/// names.
fn name_entry(service: &str, key: &PortKey) -> Name {
    let text = crate::desired::display_name(service, key);
    let length = text.len().min(Name::CAPACITY);
    let mut name = free_name();
    name.text[..length].copy_from_slice(&text.as_bytes()[..length]);
    Name { length: length as u8, family: key.family.number(), protocol: key.protocol, ..name }
}

/// The entry of NAMES for an index that is free.
fn free_name() -> Name {
    Name { text: [0; Name::CAPACITY], length: 0, family: 0, protocol: 0, zero: 0 }
}

/// The position of an address's family in a pair of maps: 0 for IPv4, 1 for IPv6.
fn family_index(ip: IpAddr) -> usize {
    usize::from(ip.is_ipv6())
}

#[cfg(test)]
mod tests;
