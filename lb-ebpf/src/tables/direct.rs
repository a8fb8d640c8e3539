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
