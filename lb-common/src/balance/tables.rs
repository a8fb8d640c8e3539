//! The tables as the core sees them: kernel maps in the programs, plain maps in tests.

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
    /// What the entry holds, or held when it was looked up.
    fn get(&self) -> &T;

    /// Replaces what the entry holds, without a lock: fields that a packet on another
    /// CPU changes at the same moment may keep either value.
    fn store(&self, value: T);
}

/// An entry of a flow table: the core changes nothing else of it in place.
pub trait FlowEntry<A>: Entry<Flow<A>> {
    /// Replaces the state.
    fn set_state(&self, state: u8);

    /// Notes that a packet was seen at `now`, and forgets the next hop.
    fn set_last_seen(&self, now: u32);
}

/// Which of a family's two flow tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FlowTable {
    /// FLOWS4 or FLOWS6.
    Flows,
    /// EMBRYONIC4 or EMBRYONIC6: TCP handshakes that are not complete.
    Embryonic,
}

/// Why a flow table took no entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InsertError {
    /// There is an entry of that key.
    Exists,
    /// There is no room.
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

    /// Looks up a front end.
    fn frontend(&mut self, key: &FrontendKey<F::Address>) -> Option<Frontend>;
    /// Looks up the front end [of any node](FrontendKey::of_any_node).
    fn node_port(&mut self, port: Be16, protocol: u8) -> Option<Frontend>;
    /// Whether the source ranges of a service port hold a client.
    fn is_in_range(&mut self, service: u32, client: &F::Address) -> bool;
    /// Whether a node of the cluster has this address.
    fn is_node(&mut self, address: &F::Address) -> bool;
    /// Looks up a service port.
    fn service(&mut self, index: u32) -> Option<Service>;
    /// The backend in a slot.
    fn slot(&mut self, position: u32) -> Option<u32>;
    /// Looks up a backend.
    fn backend(&mut self, id: u32) -> Option<Backend<F::Address>>;

    /// The index into DEVICES of the device that the kernel knows by `ifindex`.
    fn device(&mut self, ifindex: u32) -> Option<u32>;

    /// Looks up one direction of a flow.
    fn flow(&mut self, table: FlowTable, key: &FlowKey<F::Address>) -> Option<Self::FlowEntry>;
    /// Adds one direction of a flow; replaces what is there only if `replace`.
    fn insert_flow(
        &mut self,
        table: FlowTable,
        key: &FlowKey<F::Address>,
        flow: &Flow<F::Address>,
        replace: bool,
    ) -> Result<(), InsertError>;
    /// Removes one direction of a flow, if it is there.
    fn remove_flow(&mut self, table: FlowTable, key: &FlowKey<F::Address>);

    /// Looks up the ports of a datagram that comes in fragments.
    fn fragment(&mut self, key: &FragmentKey<F::Address>) -> Option<Fragment>;
    /// Enters the ports of such a datagram.
    fn insert_fragment(&mut self, key: &FragmentKey<F::Address>, fragment: &Fragment);

    /// Looks up which backend a client is bound to.
    fn affinity(&mut self, key: &AffinityKey) -> Option<Self::AffinityEntry>;
    /// Binds a client to a backend. A full table forgets the client that was idle longest.
    fn bind(&mut self, key: &AffinityKey, affinity: &Affinity);
}
