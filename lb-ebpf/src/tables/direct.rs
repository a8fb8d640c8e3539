//! The maps of flows, fragments and peers of datagrams.
//!
//! While maps of another layout or size are taken over, `handover.rs` is in the place of this
//! module, in programs of their own. So that costs no packet anything at other times.

use aya_ebpf::bindings::BPF_ANY;
use lb_common::{
    abi::{
        address::{Address4, Address6, Family, Ipv4, Ipv6},
        flow::{Flow, FlowKey, NextHop},
        fragment::{Fragment, FragmentKey},
        socket::{DatagramKey, Peer},
    },
    balance::{Entry, FlowTable, tables::FlowEntry},
};

use crate::{maps, memory};

use super::FlowMaps;

pub use lb_common::abi::address::Family as FlowFamily;

/// An entry of FLOWS or EMBRYONIC, which is changed in place.
#[derive(Clone, Copy)]
pub struct FlowHandle<F: Family>(*mut Flow<F::Address>);

impl<F: Family> Entry<Flow<F::Address>> for FlowHandle<F> {
    #[inline(always)]
    fn get(&self) -> &Flow<F::Address> {
        // SAFETY: the pointer came from a look-up of this run and was checked.
        unsafe { &*self.0 }
    }

    #[inline(always)]
    fn store(&self, value: Flow<F::Address>) {
        memory::copy(self.0, &raw const value);
    }
}

impl<F: Family> FlowEntry<F::Address> for FlowHandle<F> {
    #[inline(always)]
    fn set_state(&self, state: u8) {
        // SAFETY: as above.
        unsafe { core::ptr::write_volatile(&raw mut (*self.0).state, state) }
    }

    #[inline(always)]
    fn set_last_seen(&self, now: u32) {
        // SAFETY: as above.
        unsafe { core::ptr::write_volatile(&raw mut (*self.0).last_seen, now) };
        self.set_next_hop(NextHop::UNKNOWN);
    }
}

impl<F: Family> FlowHandle<F> {
    /// Remembers the next hop, by one store.
    #[inline(always)]
    pub fn set_next_hop(&self, next_hop: NextHop) {
        // SAFETY: as above; one aligned word.
        unsafe { core::ptr::write_volatile(&raw mut (*self.0).next_hop, next_hop) }
    }
}

macro_rules! flow_maps {
    ($family:ty, $address:ty, $flows:ident, $embryonic:ident, $fragments:ident) => {
        impl FlowMaps for $family {
            #[inline(always)]
            fn flow(table: FlowTable, key: &FlowKey<$address>) -> Option<FlowHandle<Self>> {
                match table {
                    FlowTable::Embryonic => maps::$embryonic.get_ptr_mut(key).map(FlowHandle),
                    FlowTable::Flows => maps::$flows.get_ptr_mut(key).map(FlowHandle),
                }
            }

            #[inline(always)]
            fn insert(
                table: FlowTable,
                key: &FlowKey<$address>,
                flow: &Flow<$address>,
                flags: u64,
            ) -> Result<(), i32> {
                match table {
                    FlowTable::Embryonic => maps::$embryonic.insert(key, flow, flags),
                    FlowTable::Flows => maps::$flows.insert(key, flow, flags),
                }
            }

            #[inline(always)]
            fn remove(table: FlowTable, key: &FlowKey<$address>) -> Result<(), i32> {
                match table {
                    FlowTable::Embryonic => maps::$embryonic.remove(key),
                    FlowTable::Flows => maps::$flows.remove(key),
                }
            }

            #[inline(always)]
            fn fragment(key: &FragmentKey<$address>) -> Option<Fragment> {
                // SAFETY: the look-up of this run found it.
                maps::$fragments.get_ptr(key).map(|fragment| unsafe { *fragment })
            }

            #[inline(always)]
            fn insert_fragment(
                key: &FragmentKey<$address>,
                fragment: &Fragment,
            ) -> Result<(), i32> {
                maps::$fragments.insert(key, fragment, BPF_ANY as u64)
            }
        }
    };
}

flow_maps!(Ipv4, Address4, FLOWS4, EMBRYONIC4, FRAGMENTS4);
flow_maps!(Ipv6, Address6, FLOWS6, EMBRYONIC6, FRAGMENTS6);

/// Looks up in DATAGRAM_PEERS.
#[inline(always)]
pub fn datagram_peer(key: &DatagramKey) -> Option<Peer> {
    // SAFETY: the look-up of this run found it.
    maps::DATAGRAM_PEERS.get_ptr(key).map(|found| unsafe { *found })
}

/// Inserts into DATAGRAM_PEERS. Without room in the map, recvmsg() returns the backend as the
/// sender.
#[inline(always)]
pub fn insert_datagram_peer(key: &DatagramKey, requested: &Peer) {
    let _ = maps::DATAGRAM_PEERS.insert(key, requested, BPF_ANY as u64);
}
