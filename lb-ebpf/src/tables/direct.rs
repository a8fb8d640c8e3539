//! The maps of fragments and peers of datagrams.
//!
//! While maps of another layout or size are taken over, `handover.rs` is in the place of this
//! module, in programs of their own. So that costs no packet anything at other times.

use aya_ebpf::bindings::BPF_ANY;
use lb_common::abi::{
    address::{Address4, Address6, Ipv4, Ipv6},
    fragment::{Fragment, FragmentKey},
    socket::{DatagramKey, Peer},
};

use crate::maps;

use super::FragmentMaps;

/// Flows, in the table of this agent.
pub mod flow {
    use lb_common::{
        abi::{
            flow::{FlowKey, NextHop},
            settings::Settings,
        },
        balance::{Known, NewFlow, Search},
    };

    use crate::tables::flows::{self, Own};

    pub use crate::tables::flows::FlowMaps as Family;

    /// See [`flows::find`].
    #[inline(always)]
    pub fn find<F: Family>(
        key: &FlowKey<F::Address>,
        search: Search,
        found: &mut Known<F::Address>,
    ) -> bool {
        flows::find::<F, Own>(key, search, found)
    }

    /// See [`FlowMaps::may_have_reply`](Family::may_have_reply).
    #[inline(always)]
    pub fn may_have_reply<F: Family>(key: &FlowKey<F::Address>) -> bool {
        F::may_have_reply(key)
    }

    /// See [`FlowMaps::may_have_client`](Family::may_have_client).
    #[inline(always)]
    pub fn may_have_client<F: Family>(key: &FlowKey<F::Address>) -> bool {
        F::may_have_client(key)
    }

    /// See [`FlowMaps::insert`](Family::insert).
    #[inline(always)]
    pub fn insert<F: Family>(
        key: &FlowKey<F::Address>,
        new: &mut NewFlow<F::Address>,
        settings: &Settings,
    ) -> i32 {
        F::insert(key, new, settings)
    }

    /// See [`FlowMaps::note`](Family::note).
    #[inline(always)]
    pub fn note<F: Family>(
        _key: &FlowKey<F::Address>,
        found: &Known<F::Address>,
        bits: u32,
        time: u32,
    ) {
        F::note(found, bits, time);
    }

    /// See [`FlowMaps::remove`](Family::remove).
    #[inline(always)]
    pub fn remove<F: Family>(_key: &FlowKey<F::Address>, found: &Known<F::Address>) {
        F::remove(found);
    }

    /// See [`flows::remember`].
    #[inline(always)]
    pub fn remember<F: Family>(found: &Known<F::Address>, next_hop: NextHop) {
        flows::remember::<F, Own>(found, next_hop);
    }
}

macro_rules! fragment_maps {
    ($family:ty, $address:ty, $fragments:ident) => {
        impl FragmentMaps for $family {
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

fragment_maps!(Ipv4, Address4, FRAGMENTS4);
fragment_maps!(Ipv6, Address6, FRAGMENTS6);

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
