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
        flow::{Flow, FlowKey, NextHop},
        fragment::{Fragment, FragmentKey},
        frontend::{Frontend, FrontendKey},
        service::Service,
        settings::Settings,
    },
    balance::{Entry, FlowTable, InsertError, Tables, tables::FlowEntry},
};

/// The maps of one family, for reading.
pub(super) trait Reader<F: Family> {
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
    /// An entry of a flow table.
    fn flow(&self, table: FlowTable, key: &FlowKey<F::Address>) -> Option<Flow<F::Address>>;
    /// An entry of AFFINITY.
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity>;

    /// The name of a service port: `namespace/service:port`.
    fn name(&self, service: u32) -> String;
    /// The loadBalancerSourceRanges of a service port, as text.
    fn ranges(&self, service: u32) -> Vec<String>;
    /// Every backend of a service port that is in an EndpointSlice, by id.
    fn backends_of(&self, service: u32) -> Vec<(u32, Backend<F::Address>)>;
}

/// A lookup of the core, and its result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Look<F: Family> {
    /// FRONTENDS.
    Frontend(FrontendKey<F::Address>, Option<Frontend>),
    /// RANGES.
    Range(u32, bool),
    /// SLOTS: a backend is picked at random.
    Slot,
    /// FLOWS or EMBRYONIC.
    Flow(FlowTable, FlowKey<F::Address>, Option<Flow<F::Address>>),
    /// AFFINITY.
    Affinity(Option<Affinity>),
}

type Place<T> = Rc<Cell<T>>;
/// A flow that was inserted, or `None` for one that was removed.
type Aside<A> = HashMap<(FlowTable, FlowKey<A>), Option<Place<Flow<A>>>>;

/// The tables of a run of the core.
pub(super) struct Overlay<'a, F: Family, R> {
    reader: &'a R,
    flows: Aside<F::Address>,
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
            flows: HashMap::new(),
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
        let flows = self.flows.iter().map(|(key, place)| (*key, place.as_ref().map(copied)));
        let affinity = self.affinity.iter().map(|(key, place)| (*key, copied(place)));
        Self {
            reader: self.reader,
            flows: flows.collect(),
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

impl<A: Copy> FlowEntry<A> for Held<Flow<A>> {
    fn set_state(&self, state: u8) {
        self.place.set(Flow { state, ..self.place.get() });
    }

    fn set_last_seen(&self, now: u32) {
        let next_hop = NextHop::UNKNOWN;
        self.place.set(Flow { last_seen: now, next_hop, ..self.place.get() });
    }
}

impl<F: Family, R: Reader<F>> Tables<F> for Overlay<'_, F, R> {
    type FlowEntry = Held<Flow<F::Address>>;
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
        self.looks.push(Look::Slot);
        self.reader.slot(position)
    }

    fn backend(&mut self, id: u32) -> Option<Backend<F::Address>> {
        self.reader.backend(id)
    }

    fn device(&mut self, ifindex: u32) -> Option<u32> {
        self.reader.device(ifindex)
    }

    fn flow(&mut self, table: FlowTable, key: &FlowKey<F::Address>) -> Option<Self::FlowEntry> {
        let place = match self.flows.get(&(table, *key)) {
            Some(aside) => aside.clone(),
            None => {
                let found = self.reader.flow(table, key).map(|flow| Rc::new(Cell::new(flow)));
                if found.is_some() {
                    self.flows.insert((table, *key), found.clone());
                }
                found
            }
        };
        self.looks.push(Look::Flow(table, *key, place.as_ref().map(|place| place.get())));
        place.as_ref().map(Held::of)
    }

    fn insert_flow(
        &mut self,
        table: FlowTable,
        key: &FlowKey<F::Address>,
        flow: &Flow<F::Address>,
        replace: bool,
    ) -> Result<(), InsertError> {
        let exists = match self.flows.get(&(table, *key)) {
            Some(aside) => aside.is_some(),
            None => self.reader.flow(table, key).is_some(),
        };
        if exists && !replace {
            return Err(InsertError::Exists);
        }
        self.flows.insert((table, *key), Some(Rc::new(Cell::new(*flow))));
        Ok(())
    }

    fn remove_flow(&mut self, table: FlowTable, key: &FlowKey<F::Address>) {
        self.flows.insert((table, *key), None);
    }

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
