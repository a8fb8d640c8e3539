//! The tables without a kernel: plain maps, with a clock and random numbers that tests
//! set, and a count of look-ups.

use std::{
    cell::Cell,
    collections::{BTreeMap, VecDeque},
    rc::Rc,
};

use lb_common::{
    abi::{
        address::{Address, Be16, Family, Prefix},
        affinity::{Affinity, AffinityKey},
        backend::Backend,
        flow::FlowKey,
        flow_table::{Direction, FlowEntry, RequestWord},
        fragment::{Fragment, FragmentKey},
        frontend::{Frontend, FrontendKey},
        service::Service,
        settings::{Device, Settings},
    },
    balance::{Entry, InsertError, Known, Note, Search, Tables},
    flow_table::{self, Found, NewFlow},
};

use super::flow_table::HostTable;
use super::world::World;

/// Flows: their entries and their words.
pub type FlowEntries<A> = Vec<(FlowEntry<A>, RequestWord)>;

/// How often each kind of table was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lookups {
    /// FRONTENDS, a hash.
    pub frontends: u32,
    /// The table of flows, once for each direction that is looked for.
    pub flows: u32,
    /// FRAGMENTS, a hash.
    pub fragments: u32,
    /// NODES, a hash.
    pub nodes: u32,
    /// AFFINITY, a hash.
    pub affinity: u32,
    /// SOURCES, a trie.
    pub sources: u32,
    /// SERVICES, SLOTS, BACKENDS and DEVICES, arrays.
    pub arrays: u32,
}

impl Lookups {
    /// The look-ups that cost: those in hashes.
    pub fn hashes(self) -> u32 {
        self.frontends + self.flows + self.fragments + self.nodes + self.affinity
    }
}

/// An entry: what it held when it was looked up, and the place it is stored in.
#[derive(Clone, Debug)]
pub struct FakeEntry<T: Copy> {
    held: T,
    place: Rc<Cell<T>>,
}

impl<T: Copy> FakeEntry<T> {
    fn of(place: &Rc<Cell<T>>) -> Self {
        Self { held: place.get(), place: place.clone() }
    }
}

impl<T: Copy> Entry<T> for FakeEntry<T> {
    fn get(&self) -> &T {
        &self.held
    }

    fn store(&self, value: T) {
        self.place.set(value);
    }
}

/// Buckets of the table of flows: room for every case.
const BUCKETS: u32 = 1 << 12;

/// The tables of one family.
#[derive(Debug)]
pub struct FakeTables<F: Family> {
    /// What [`Tables::now`] says, in ticks.
    pub clock: u32,
    /// What [`Tables::random`] says first; then it makes up its own, the same every time.
    pub random: VecDeque<u32>,
    /// The flow tables take no further entry.
    pub full: bool,
    /// Look-ups since the test set this to zero.
    pub lookups: Lookups,
    seed: u32,
    frontends: BTreeMap<FrontendKey<F::Address>, Frontend>,
    services: Vec<Service>,
    slots: Vec<u32>,
    backends: Vec<Backend<F::Address>>,
    devices: Vec<Device>,
    ranges: Vec<(u32, Prefix<F::Address>)>,
    sources: Vec<(Prefix<F::Address>, F::Address)>,
    nodes: Vec<F::Address>,
    flows: HostTable,
    has_direct: bool,
    fragments: BTreeMap<FragmentKey<F::Address>, Fragment>,
    affinity: Vec<(AffinityKey, Rc<Cell<Affinity>>)>,
}

impl<F: Family> Default for FakeTables<F> {
    fn default() -> Self {
        Self {
            clock: 1_000_000,
            random: VecDeque::new(),
            full: false,
            lookups: Lookups::default(),
            seed: 0x2545_f491,
            frontends: BTreeMap::new(),
            services: Vec::new(),
            slots: Vec::new(),
            backends: Vec::new(),
            devices: Vec::new(),
            ranges: Vec::new(),
            sources: Vec::new(),
            nodes: Vec::new(),
            flows: HostTable::new(BUCKETS),
            has_direct: false,
            fragments: BTreeMap::new(),
            affinity: Vec::new(),
        }
    }
}

impl<F: Family> FakeTables<F> {
    /// Empty tables with a clock that starts at `clock`.
    pub fn new(clock: u32) -> Self {
        Self { clock, ..Self::default() }
    }

    /// Replaces what the agent writes; flows and affinity stay.
    pub fn load(&mut self, world: &World<F>) {
        self.frontends = world.frontends.iter().copied().collect();
        self.services = world.services.clone();
        self.slots = world.slots.iter().map(|slot| slot.backend).collect();
        self.backends = world.backends.clone();
        self.devices = world.devices.clone();
        self.ranges = world.ranges.clone();
        self.sources = world.sources.clone();
        self.nodes = world.nodes.clone();
    }

    /// Every flow.
    pub fn flows(&self) -> FlowEntries<F::Address> {
        self.flows.live().into_iter().map(|(_, word, entry)| (entry, word)).collect()
    }

    /// Removes the flow whose requests arrive as `key` says.
    pub fn lose(&mut self, key: &FlowKey<F::Address>) {
        let found = flow_table::find_request(&self.flows, key).expect("the flow is there");
        assert!(flow_table::remove::<F::Address, _>(&self.flows, &found), "nobody else removes it");
    }

    /// Every entry of AFFINITY.
    pub fn affinities(&self) -> Vec<(AffinityKey, Affinity)> {
        self.affinity.iter().map(|(key, place)| (*key, place.get())).collect()
    }
}

impl<F: Family> Tables<F> for FakeTables<F> {
    type AffinityEntry = FakeEntry<Affinity>;

    fn now(&self) -> u32 {
        self.clock
    }

    fn random(&mut self) -> u32 {
        self.random.pop_front().unwrap_or_else(|| {
            // xorshift32 (Marsaglia 2003).
            self.seed ^= self.seed << 13;
            self.seed ^= self.seed >> 17;
            self.seed ^= self.seed << 5;
            self.seed
        })
    }

    fn frontend(&mut self, key: &FrontendKey<F::Address>) -> Option<Frontend> {
        self.lookups.frontends += 1;
        self.frontends.get(key).copied()
    }

    fn node_port(&mut self, port: Be16, protocol: u8) -> Option<Frontend> {
        self.frontend(&FrontendKey::of_any_node(port, protocol))
    }

    fn is_node(&mut self, address: &F::Address) -> bool {
        self.lookups.nodes += 1;
        self.nodes.contains(address)
    }

    fn route_source(&mut self, destination: &F::Address, source: &mut F::Address) -> bool {
        self.lookups.sources += 1;
        let matching = self.sources.iter().filter(|(prefix, _)| prefix.contains(*destination));
        let longest = matching.max_by_key(|(prefix, _)| {
            prefix.mask.words().iter().map(|word| word.count_ones()).sum::<u32>()
        });
        if let Some((_, found)) = longest {
            source.set(found);
        }
        longest.is_some()
    }

    fn is_in_range(&mut self, service: u32, client: &F::Address) -> bool {
        self.ranges.iter().any(|(of, range)| *of == service && range.contains(*client))
    }

    fn service(&mut self, index: u32) -> Option<Service> {
        self.lookups.arrays += 1;
        self.services.get(index as usize).copied()
    }

    fn slot(&mut self, position: u32) -> Option<u32> {
        self.lookups.arrays += 1;
        self.slots.get(position as usize).copied()
    }

    fn backend(&mut self, id: u32) -> Option<Backend<F::Address>> {
        self.lookups.arrays += 1;
        self.backends.get(id as usize).copied()
    }

    fn device(&mut self, ifindex: u32) -> Option<u32> {
        self.lookups.arrays += 1;
        let position = self.devices.iter().position(|device| device.ifindex == ifindex);
        position.map(|index| index as u32)
    }

    fn spread(&mut self, key: &AffinityKey, period: u32) -> u32 {
        // FNV-1a (RFC 9923), and a last step that spreads it to the upper bits.
        let fnv = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
        let bytes = bytemuck::bytes_of(key).iter().chain(bytemuck::bytes_of(&period));
        bytes.fold(0x811c_9dc5, fnv).wrapping_mul(0x9e37_79b9)
    }

    fn flow(
        &mut self,
        key: &FlowKey<F::Address>,
        search: Search,
        found: &mut Known<F::Address>,
    ) -> bool {
        let order = match search {
            Search::Requests => &[Direction::Request][..],
            Search::Replies => &[Direction::Reply],
            Search::RequestsFirst => &[Direction::Request, Direction::Reply],
            Search::RepliesFirst => &[Direction::Reply, Direction::Request],
        };
        for direction in order {
            self.lookups.flows += 1;
            let place = match direction {
                Direction::Request => flow_table::find_request(&self.flows, key),
                Direction::Reply => flow_table::find_reply(&self.flows, key),
            };
            if let Some(Found { place, word, .. }) = place {
                let entry = self.flows.entry_at::<F::Address>(place);
                entry.read(*direction, word, &mut found.flow);
                (found.place, found.word) = (place, word.0);
                return true;
            }
        }
        false
    }

    fn may_have_reply(&mut self, key: &FlowKey<F::Address>) -> bool {
        flow_table::may_have_reply(&self.flows, key)
    }

    fn may_have_client(&mut self, key: &FlowKey<F::Address>) -> bool {
        flow_table::may_have_client(&self.flows, key)
    }

    fn insert_flow(
        &mut self,
        key: &FlowKey<F::Address>,
        new: &mut NewFlow<F::Address>,
        settings: &Settings,
    ) -> Result<(), InsertError> {
        if self.full {
            return Err(InsertError::Full);
        }
        let write = |place, new: &NewFlow<F::Address>| {
            let mut entry = FlowEntry::default();
            entry.write(&key.tuple, &new.flow, new.reply_action);
            self.flows.store(place, entry);
        };
        flow_table::insert(&self.flows, key, new, &settings.flow_lifetimes, write)
    }

    fn note_flow(
        &mut self,
        _key: &FlowKey<F::Address>,
        found: &Known<F::Address>,
        Note { clear, set, time }: Note,
    ) {
        let Known { place, word, .. } = *found;
        let found = Found { entry: place, place, word: RequestWord(word) };
        flow_table::note::<F::Address, _>(&self.flows, &found, clear, set, time);
    }

    fn remove_flow(&mut self, _key: &FlowKey<F::Address>, found: &Known<F::Address>) {
        let Known { place, word, .. } = *found;
        let found = Found { entry: place, place, word: RequestWord(word) };
        flow_table::remove::<F::Address, _>(&self.flows, &found);
    }

    fn has_direct(&self) -> bool {
        self.has_direct
    }

    fn begin_direct(&mut self) {
        self.has_direct = true;
    }

    fn fragment(&mut self, key: &FragmentKey<F::Address>) -> Option<Fragment> {
        self.lookups.fragments += 1;
        self.fragments.get(key).copied()
    }

    fn insert_fragment(&mut self, key: &FragmentKey<F::Address>, fragment: &Fragment) {
        self.fragments.insert(*key, *fragment);
    }

    fn affinity(&mut self, key: &AffinityKey) -> Option<Self::AffinityEntry> {
        self.lookups.affinity += 1;
        self.affinity.iter().find(|(known, _)| known == key).map(|(_, place)| FakeEntry::of(place))
    }

    fn bind(&mut self, key: &AffinityKey, affinity: &Affinity) {
        self.affinity.retain(|(known, _)| known != key);
        self.affinity.push((*key, Rc::new(Cell::new(*affinity))));
    }
}
