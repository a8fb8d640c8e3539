//! The interface of the tables: kernel maps in the programs, ordinary maps in tests.

use crate::abi::{
    address::{Be16, Family},
    affinity::{Affinity, AffinityKey},
    backend::Backend,
    flow::{Flow, FlowKey},
    fragment::{Fragment, FragmentKey},
    frontend::{Frontend, FrontendKey},
    service::Service,
};

/// An entry of a table that is changed in place.
pub trait Entry<T> {
    /// The value of the entry, now or when it was looked up.
    fn get(&self) -> &T;

    /// Replaces the value without a lock. A field that a packet on another CPU changes at the same
    /// moment may keep either value.
    fn store(&self, value: T);
}

/// An entry of a flow table, in which the core changes only these fields in place.
pub trait FlowEntry<A>: Entry<Flow<A>> {
    /// Replaces the state.
    fn set_state(&self, state: u8);

    /// Sets the time of the last packet to `now` (jiffies) and clears the next hop, so that the
    /// route is looked up again.
    fn set_last_seen(&self, now: u32);
}

/// One of a family's two flow tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FlowTable {
    /// FLOWS4 or FLOWS6.
    Flows,
    /// EMBRYONIC4 or EMBRYONIC6: TCP handshakes that are not complete.
    Embryonic,
}

/// Why an entry could not be inserted into a flow table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InsertError {
    /// The table has an entry with this key.
    Exists,
    /// The table is full.
    Full,
}

/// The tables of one family, a clock and a source of random numbers.
pub trait Tables<F: Family> {
    /// An entry of a flow table.
    type FlowEntry: FlowEntry<F::Address>;
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

    /// Looks up one direction of a flow.
    fn flow(&mut self, table: FlowTable, key: &FlowKey<F::Address>) -> Option<Self::FlowEntry>;
    /// Inserts one direction of a flow. Replaces an existing entry only if `replace`.
    fn insert_flow(
        &mut self,
        table: FlowTable,
        key: &FlowKey<F::Address>,
        flow: &Flow<F::Address>,
        replace: bool,
    ) -> Result<(), InsertError>;
    /// Removes one direction of a flow, if it is in the table.
    fn remove_flow(&mut self, table: FlowTable, key: &FlowKey<F::Address>);

    /// Looks up the ports of a fragmented datagram.
    fn fragment(&mut self, key: &FragmentKey<F::Address>) -> Option<Fragment>;
    /// Stores the ports of a fragmented datagram.
    fn insert_fragment(&mut self, key: &FragmentKey<F::Address>, fragment: &Fragment);

    /// Looks up the backend that a client is bound to.
    fn affinity(&mut self, key: &AffinityKey) -> Option<Self::AffinityEntry>;
    /// Binds a client to a backend. A full table evicts the client that was idle longest.
    fn bind(&mut self, key: &AffinityKey, affinity: &Affinity);
}
