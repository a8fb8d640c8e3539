//! The interface of the tables: kernel maps in the programs, ordinary maps in tests.

use crate::abi::{
    address::{Be16, Family},
    affinity::{Affinity, AffinityKey},
    backend::Backend,
    flow::{Flow, FlowKey},
    fragment::{Fragment, FragmentKey},
    frontend::{Frontend, FrontendKey},
    service::Service,
    settings::Settings,
};

pub use crate::flow_table::{InsertError, NewFlow};

/// An entry of a table that is changed in place.
pub trait Entry<T> {
    /// The value of the entry, now or when it was looked up.
    fn get(&self) -> &T;

    /// Replaces the value without a lock. A field that a packet on another CPU changes at the same
    /// moment may keep either value.
    fn store(&self, value: T);
}

/// Which directions of flows a key is looked for in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Search {
    /// Requests alone.
    Requests,
    /// Replies alone.
    Replies,
    /// Requests, then replies.
    RequestsFirst,
    /// Replies, then requests.
    RepliesFirst,
}

impl Search {
    /// Whether requests are looked for.
    #[inline(always)]
    pub const fn has_requests(self) -> bool {
        !matches!(self, Self::Replies)
    }

    /// Whether replies are looked for.
    #[inline(always)]
    pub const fn has_replies(self) -> bool {
        !matches!(self, Self::Requests)
    }
}

/// A flow that was found: one of its directions, and where it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Known<A> {
    /// The direction that the key belongs to.
    pub flow: Flow<A>,
    /// The flow's word when it was found.
    pub word: u64,
    /// Its place in the table.
    pub place: u32,
    /// 0: it is in the table of this agent. Programs that take over the flows of another agent have
    /// other numbers.
    pub origin: u32,
}

/// What a packet changes in its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note {
    /// The bits of the state to clear.
    pub clear: u8,
    /// The bits of the state to set.
    pub set: u8,
    /// Now, in the unit of the times of flows.
    pub time: u32,
}

/// The tables of one family, a clock and a source of random numbers.
pub trait Tables<F: Family> {
    /// An entry of AFFINITY.
    type AffinityEntry: Entry<Affinity>;

    /// The low 32 bits of the kernel's jiffies.
    fn now(&self) -> u32;
    /// A random number.
    fn random(&mut self) -> u32;

    /// Looks up a frontend.
    fn frontend(&mut self, key: &FrontendKey<F::Address>) -> Option<Frontend>;
    /// Looks up the frontend [of any node](FrontendKey::of_any_node).
    fn node_port(&mut self, port: Be16, protocol: u8) -> Option<Frontend>;
    /// Whether a client is in the source ranges of a service port.
    fn is_in_range(&mut self, service: u32, client: &F::Address) -> bool;
    /// Looks up the source address for packets of this node to `destination` in SOURCES, and stores
    /// it in `source`. Returns whether there is one.
    fn route_source(&mut self, destination: &F::Address, source: &mut F::Address) -> bool;
    /// Whether a node of the cluster has this address.
    fn is_node(&mut self, address: &F::Address) -> bool;
    /// Looks up a service port.
    fn service(&mut self, index: u32) -> Option<Service>;
    /// The backend in a slot.
    fn slot(&mut self, position: u32) -> Option<u32>;
    /// Looks up a backend.
    fn backend(&mut self, id: u32) -> Option<Backend<F::Address>>;

    /// The index into DEVICES of the device with the kernel's index `ifindex`.
    fn device(&mut self, ifindex: u32) -> Option<u32>;

    /// A number that looks random, and is always the same for this client and service port in this
    /// period.
    fn spread(&mut self, key: &AffinityKey, period: u32) -> u32;

    /// Looks up a flow and stores it in `found`. Returns whether there is one.
    fn flow(
        &mut self,
        key: &FlowKey<F::Address>,
        search: Search,
        found: &mut Known<F::Address>,
    ) -> bool;
    /// Whether a flow may have these replies. Where the answer is no, none has.
    fn may_have_reply(&mut self, key: &FlowKey<F::Address>) -> bool;
    /// Whether a flow may have the client of `key`, a request. Where the answer is no, none has.
    fn may_have_client(&mut self, key: &FlowKey<F::Address>) -> bool;
    /// Inserts a flow whose requests arrive as `key` says. Others may be evicted.
    fn insert_flow(
        &mut self,
        key: &FlowKey<F::Address>,
        new: &mut NewFlow<F::Address>,
        settings: &Settings,
    ) -> Result<(), InsertError>;
    /// Notes a packet of a flow that was found for `key`: clears and sets bits of its state, sets the
    /// time, and forgets the next hop of the direction, so that the route is looked up again.
    fn note_flow(&mut self, key: &FlowKey<F::Address>, found: &Known<F::Address>, note: Note);
    /// Removes a flow that was found for `key`.
    fn remove_flow(&mut self, key: &FlowKey<F::Address>, found: &Known<F::Address>);

    /// Whether clients may have flows to backends [themselves](crate::abi::traffic::DIRECT).
    fn has_direct(&self) -> bool;
    /// Notes that one is inserted next.
    fn begin_direct(&mut self);

    /// Looks up the ports of a fragmented datagram.
    fn fragment(&mut self, key: &FragmentKey<F::Address>) -> Option<Fragment>;
    /// Stores the ports of a fragmented datagram.
    fn insert_fragment(&mut self, key: &FragmentKey<F::Address>, fragment: &Fragment);

    /// Looks up the backend that a client is bound to.
    fn affinity(&mut self, key: &AffinityKey) -> Option<Self::AffinityEntry>;
    /// Binds a client to a backend. A full table evicts the client that was idle longest.
    fn bind(&mut self, key: &AffinityKey, affinity: &Affinity);
}
