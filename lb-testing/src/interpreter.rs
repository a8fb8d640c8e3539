//! What runs the datapath for a case: the core on the host ([`Host`](crate::host::Host)), or
//! the loaded programs (`Kernel` of the tests crate).

use lb_common::{
    abi::{
        address::Address,
        affinity::{Affinity, AffinityKey},
        counter::Reason,
        flow::{FlowKey, Tuple},
    },
    balance::Answer,
};

use super::{
    family::TestFamily,
    site::TestSite,
    tables::{FlowEntries, Lookups},
    world::World,
};

/// What the datapath did with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate<A: Address> {
    /// It continues, bit for bit as it came.
    Untouched,
    /// It is gone.
    Dropped,
    /// It continues on its path with these addresses and ports.
    Translated(Tuple<A>),
    /// It leaves by the device that it came in by.
    Hairpinned(Tuple<A>),
    /// It takes the route of its new destination.
    Routed(Tuple<A>),
    /// The same, with its TTL decremented, as by a router.
    Forwarded(Tuple<A>),
    /// It is sent on untranslated, TTL decremented, in an outer header with these addresses.
    Encapsulated(Tuple<A>),
    /// Translated, and its MSS is smaller by the length of an outer header.
    MssClamped(Tuple<A>),
    /// It comes in by the loopback device.
    IntoLoopback(Tuple<A>),
    /// It comes in by the device with this index.
    IntoDevice(Tuple<A>, u32),
    /// Its sender gets an answer.
    Answered(Answer),
}

impl<A: Address> Fate<A> {
    /// The addresses and ports of a translated frame.
    pub fn tuple(&self) -> Option<Tuple<A>> {
        match self {
            Self::Untouched | Self::Dropped | Self::Answered(_) => None,
            Self::Translated(tuple)
            | Self::Hairpinned(tuple)
            | Self::Routed(tuple)
            | Self::Forwarded(tuple)
            | Self::Encapsulated(tuple)
            | Self::MssClamped(tuple)
            | Self::IntoLoopback(tuple)
            | Self::IntoDevice(tuple, _) => Some(*tuple),
        }
    }
}

/// What the datapath did with a frame, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome<A: Address> {
    /// The counter that moved.
    pub reason: Reason,
    /// What the datapath did with the frame.
    pub fate: Fate<A>,
}

/// What an interpreter panics with (`std::panic::panic_any`) if it cannot make such a frame
/// here.
#[derive(Clone, Copy, Debug)]
pub struct Untestable;

/// An interpreter of the datapath.
pub trait Interpreter<F: TestFamily> {
    /// Forgets everything: flows, affinity and the world.
    fn reset(&mut self);
    /// Replaces what the agent writes into the maps.
    fn load(&mut self, world: &World<F>);
    /// Puts a frame through the datapath. Panics if the datapath breaks a promise about every
    /// frame: checksums, bytes that must not change, one counter.
    fn send(&mut self, site: TestSite, frame: &[u8]) -> Outcome<F::Address>;
    /// Panics if the datapath broke a promise about all frames since [`Interpreter::reset`].
    fn finish(&mut self) {}
    /// What the last frame quotes after translation, if it was an ICMP error that was
    /// translated.
    fn quoted(&self) -> Option<Tuple<F::Address>>;
    /// Advances the clock.
    fn advance(&mut self, ticks: u32);
    /// Every flow.
    fn flows(&mut self) -> FlowEntries<F::Address>;
    /// Removes the flow with this request, as the sweep does, or another flow in a full table.
    fn remove_flow(&mut self, key: &FlowKey<F::Address>);
    /// Every entry of AFFINITY.
    fn affinities(&mut self) -> Vec<(AffinityKey, Affinity)>;
    /// Look-ups for the last frame, if the interpreter counts them.
    fn lookups(&self) -> Option<Lookups>;
}
