//! The tables for a run of the core: a [`Reader`]'s, with every write of the core kept aside,
//! and a record of the lookups.
//!
//! Nothing is ever written to the reader's maps.

use std::{
    cell::Cell,
    collections::{HashMap, VecDeque},
    rc::Rc,
};

use lb_common::{
    abi::{
        address::{Be16, Family},
        affinity::{Affinity, AffinityKey},
        backend::Backend,
        flow::FlowKey,
        flow_table::{Direction, RequestWord},
        fragment::{Fragment, FragmentKey},
        frontend::{Frontend, FrontendKey},
        service::Service,
        settings::Settings,
    },
    balance::{Entry, InsertError, Known, NewFlow, Note, Search, Tables},
    flow_table::{self, Found, Memory as _},
};

use super::aside::Aside;
use crate::maps::flow_table::{Flows, LiveFlow};

/// The maps of one family, for reading.
pub(super) trait Reader<F: Family> {
    /// The table of flows.
    type Flows: Flows<F::Address>;

    /// The settings in force.
    fn settings(&self) -> Settings;
    /// The low 32 bits of the kernel's jiffies.
    fn now(&self) -> u32;
    /// An entry of FRONTENDS.
    fn frontend(&self, key: &FrontendKey<F::Address>) -> Option<Frontend>;
    /// Whether RANGES holds the client for a service port.
    fn is_in_range(&self, service: u32, client: F::Address) -> bool;
    /// Whether NODES holds the address.
    fn is_node(&self, address: F::Address) -> bool;
    /// The source address for packets to `destination`, by SOURCES.
    fn route_source(&self, destination: F::Address) -> Option<F::Address>;
    /// An entry of SERVICES.
    fn service(&self, index: u32) -> Option<Service>;
    /// An entry of SLOTS.
    fn slot(&self, position: u32) -> Option<u32>;
    /// An entry of BACKENDS.
    fn backend(&self, id: u32) -> Option<Backend<F::Address>>;
    /// The index into DEVICES of a device.
    fn device(&self, ifindex: u32) -> Option<u32>;
    /// The table of flows.
    fn flows(&self) -> &Self::Flows;
    /// An entry of AFFINITY.
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity>;

    /// The name of a service port: `namespace/service:port`.
    fn name(&self, service: u32) -> String;
    /// The loadBalancerSourceRanges of a service port, as text.
    fn ranges(&self, service: u32) -> Vec<String>;
    /// Every backend of a service port that is in an EndpointSlice, by id.
    fn backends_of(&self, service: u32) -> Vec<(u32, Backend<F::Address>)>;
}

/// A flow that was found, by one of its directions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Seen<A> {
    /// The direction.
    pub(super) direction: Direction,
    /// The flow.
    pub(super) flow: LiveFlow<A>,
}

/// A lookup of the core, and its result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Look<F: Family> {
    /// FRONTENDS.
    Frontend(FrontendKey<F::Address>, Option<Frontend>),
    /// RANGES.
    Range(u32, bool),
    /// SLOTS: a backend is picked.
    Slot(Option<u32>),
    /// The table of flows.
    Flow(FlowKey<F::Address>, Option<Seen<F::Address>>),
    /// The number that stands for a client of a Service with session affinity.
    Spread,
    /// AFFINITY.
    Affinity(Option<Affinity>),
}

type Place<T> = Rc<Cell<T>>;

/// The tables of a run of the core.
pub(super) struct Overlay<'a, F: Family, R: Reader<F>> {
    reader: &'a R,
    flows: Aside<'a, F::Address, R::Flows>,
    affinity: HashMap<AffinityKey, Place<Affinity>>,
    /// The first results of [`Tables::random`].
    pub(super) draws: VecDeque<u32>,
    seed: u32,
    /// The lookups since this was cleared.
    pub(super) looks: Vec<Look<F>>,
}

impl<'a, F: Family, R: Reader<F>> Overlay<'a, F, R> {
    /// Over the tables of `reader`.
    pub(super) fn new(reader: &'a R) -> Self {
        Self {
            reader,
            flows: Aside::new(reader.flows()),
            affinity: HashMap::new(),
            draws: VecDeque::new(),
            seed: 0x2545_f491,
            looks: Vec::new(),
        }
    }

    /// An independent copy.
    pub(super) fn fork(&self) -> Self {
        fn copied<T: Copy>(place: &Place<T>) -> Place<T> {
            Rc::new(Cell::new(place.get()))
        }
        let affinity = self.affinity.iter().map(|(key, place)| (*key, copied(place)));
        Self {
            reader: self.reader,
            flows: self.flows.clone(),
            affinity: affinity.collect(),
            draws: VecDeque::new(),
            seed: self.seed,
            looks: Vec::new(),
        }
    }

    /// The tables below.
    pub(super) fn reader(&self) -> &'a R {
        self.reader
    }
}

/// An entry: its value at the lookup, and where stores go.
#[derive(Clone, Debug)]
pub(super) struct Held<T: Copy> {
    held: T,
    place: Place<T>,
}

impl<T: Copy> Held<T> {
    fn of(place: &Place<T>) -> Self {
        Self { held: place.get(), place: place.clone() }
    }
}

impl<T: Copy> Entry<T> for Held<T> {
    fn get(&self) -> &T {
        &self.held
    }

    fn store(&self, value: T) {
        self.place.set(value);
    }
}

impl<F: Family, R: Reader<F>> Tables<F> for Overlay<'_, F, R> {
    type AffinityEntry = Held<Affinity>;

    fn now(&self) -> u32 {
        self.reader.now()
    }

    fn random(&mut self) -> u32 {
        self.draws.pop_front().unwrap_or_else(|| {
            // xorshift32 (Marsaglia 2003).
            self.seed ^= self.seed << 13;
            self.seed ^= self.seed >> 17;
            self.seed ^= self.seed << 5;
            self.seed
        })
    }

    fn frontend(&mut self, key: &FrontendKey<F::Address>) -> Option<Frontend> {
        let found = self.reader.frontend(key);
        self.looks.push(Look::Frontend(*key, found));
        found
    }

    fn node_port(&mut self, port: Be16, protocol: u8) -> Option<Frontend> {
        self.frontend(&FrontendKey::of_any_node(port, protocol))
    }

    fn is_in_range(&mut self, service: u32, client: &F::Address) -> bool {
        let is_in = self.reader.is_in_range(service, *client);
        self.looks.push(Look::Range(service, is_in));
        is_in
    }

    fn is_node(&mut self, address: &F::Address) -> bool {
        self.reader.is_node(*address)
    }

    fn route_source(&mut self, destination: &F::Address, source: &mut F::Address) -> bool {
        let found = self.reader.route_source(*destination);
        if let Some(found) = found {
            *source = found;
        }
        found.is_some()
    }

    fn service(&mut self, index: u32) -> Option<Service> {
        self.reader.service(index)
    }

    fn slot(&mut self, position: u32) -> Option<u32> {
        let id = self.reader.slot(position);
        self.looks.push(Look::Slot(id));
        id
    }

    fn backend(&mut self, id: u32) -> Option<Backend<F::Address>> {
        self.reader.backend(id)
    }

    fn device(&mut self, ifindex: u32) -> Option<u32> {
        self.reader.device(ifindex)
    }

    fn spread(&mut self, key: &AffinityKey, period: u32) -> u32 {
        self.looks.push(Look::Spread);
        self.flows.seed().map_or(0, |seed| flow_table::spread(key, period, seed))
    }

    fn flow(
        &mut self,
        key: &FlowKey<F::Address>,
        search: Search,
        found: &mut Known<F::Address>,
    ) -> bool {
        let seen = directions(search).iter().find_map(|direction| {
            let flow = self.flows.find(key, *direction)?;
            Some(Seen { direction: *direction, flow })
        });
        self.looks.push(Look::Flow(*key, seen));
        if let Some(Seen { direction, flow: LiveFlow { place, word, entry } }) = seen {
            entry.read(direction, word, &mut found.flow);
            (found.place, found.word) = (place, word.0);
        }
        seen.is_some()
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
        self.flows.insert(key, new, &settings.flow_lifetimes)
    }

    fn note_flow(
        &mut self,
        _key: &FlowKey<F::Address>,
        found: &Known<F::Address>,
        Note { clear, set, time }: Note,
    ) {
        flow_table::note(&self.flows, &place(found), clear, set, time);
    }

    fn remove_flow(&mut self, _key: &FlowKey<F::Address>, found: &Known<F::Address>) {
        flow_table::remove(&self.flows, &place(found));
    }

    fn has_direct(&self) -> bool {
        // `explain` looks at the flows themselves.
        true
    }

    fn begin_direct(&mut self) {}

    fn fragment(&mut self, _key: &FragmentKey<F::Address>) -> Option<Fragment> {
        None
    }

    fn insert_fragment(&mut self, _key: &FragmentKey<F::Address>, _fragment: &Fragment) {}

    fn affinity(&mut self, key: &AffinityKey) -> Option<Self::AffinityEntry> {
        let place = match self.affinity.get(key) {
            Some(place) => Some(place.clone()),
            None => self.reader.affinity(key).map(|bound| Rc::new(Cell::new(bound))),
        };
        self.looks.push(Look::Affinity(place.as_ref().map(|place| place.get())));
        let place = place?;
        self.affinity.insert(*key, place.clone());
        Some(Held::of(&place))
    }

    fn bind(&mut self, key: &AffinityKey, affinity: &Affinity) {
        self.affinity.insert(*key, Rc::new(Cell::new(*affinity)));
    }
}

/// The directions in the order in which they are looked for.
pub(super) fn directions(search: Search) -> &'static [Direction] {
    match search {
        Search::Requests => &[Direction::Request],
        Search::Replies => &[Direction::Reply],
        Search::RequestsFirst => &[Direction::Request, Direction::Reply],
        Search::RepliesFirst => &[Direction::Reply, Direction::Request],
    }
}

fn place<A>(known: &Known<A>) -> Found<u32> {
    let Known { place, word, .. } = *known;
    Found { entry: place, place, word: RequestWord(word) }
}
