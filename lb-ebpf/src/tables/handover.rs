//! The maps of fragments and peers of datagrams, while those of the agent before are taken over. They
//! have another layout or another size. Fragments and peers never change, so they are inserted into
//! both and looked up in both. `handover/flow.rs` has the flows.

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_ANY;
use lb_common::abi::{
    address::{Address4, Address6, Ipv4, Ipv6},
    conversion::{BEFORE, ConversionWords, KEY, KEY_STEPS, MOVED, OWN, VALUE_STEPS},
    fragment::{Fragment, FragmentKey},
    socket::{DatagramKey, Peer},
};

use crate::{
    maps::{
        self,
        handover::{self, Room},
    },
    memory,
};

use super::FragmentMaps;

#[path = "handover/flow.rs"]
pub mod flow;

/// A word of a conversion. The verifier knows its value.
#[inline(always)]
fn word(conversion: &'static Global<ConversionWords>, position: usize) -> u32 {
    let words = core::ptr::from_ref(conversion).cast::<u32>();
    // SAFETY: inside the constant.
    unsafe { core::ptr::read_volatile(words.add(position)) }
}

/// Performs `STEPS` steps, or as many as there are: each copies 1, 2, 4 or 8 bytes. A step is a
/// word: the offset in `from`, the offset in `to`, the number of bytes, a byte each.
///
/// # Safety
/// The agent has compared the offsets with the sizes of both layouts; both are in memory of at
/// least these sizes.
#[inline(always)]
unsafe fn convert<const STEPS: usize>(
    conversion: &'static Global<ConversionWords>,
    first: usize,
    from: *const u8,
    to: *mut u8,
) {
    let mut index = 0;
    while index < STEPS {
        let step = word(conversion, first + index);
        if step == 0 {
            return;
        }
        // SAFETY: as the caller says.
        unsafe {
            let from = from.add((step & 0xff) as usize);
            let to = to.add((step >> 8 & 0xff) as usize);
            match step >> 16 {
                8 => to.cast::<u64>().write_volatile(from.cast::<u64>().read_volatile()),
                4 => to.cast::<u32>().write_volatile(from.cast::<u32>().read_volatile()),
                2 => to.cast::<u16>().write_volatile(from.cast::<u16>().read_volatile()),
                _ => to.write_volatile(from.read_volatile()),
            }
        }
        index += 1;
    }
}

/// The working memory, and in it the key with the layout of the map before.
#[inline(always)]
#[expect(clippy::mut_from_ref, reason = "the room is in a map, not in what is borrowed")]
fn room_with_key<K>(
    conversion: &'static Global<ConversionWords>,
    key: &K,
) -> Option<&'static mut Room> {
    // SAFETY: no two runs that use it overlap on a CPU.
    let room = unsafe { &mut *handover::ROOM.get_ptr_mut(0)? };
    memory::zero(&raw mut room.key);
    // SAFETY: the room has more bytes than any key.
    unsafe {
        let from = core::ptr::from_ref(key).cast();
        convert::<KEY_STEPS>(conversion, KEY, from, (&raw mut room.key).cast());
    }
    Some(room)
}

/// A copy of `value`, which has the layout of the map before, with the layout of this release.
#[inline(always)]
fn copied<T>(
    conversion: &'static Global<ConversionWords>,
    room: &'static mut Room,
    value: *const u8,
) -> *mut T {
    let copy = &raw mut room.copy;
    memory::zero(copy);
    // SAFETY: the copy has room for every value.
    unsafe { convert::<VALUE_STEPS>(conversion, OWN, value, copy.cast()) };
    copy.cast()
}

macro_rules! fragment_maps {
    ($family:ty, $address:ty, $fragments:ident, $fragments_before:ident,
     $fragment_conversion:ident) => {
        impl FragmentMaps for $family {
            #[inline(never)]
            fn fragment(key: &FragmentKey<$address>) -> Option<Fragment> {
                if let Some(found) = maps::$fragments.get_ptr(key) {
                    // SAFETY: the look-up of this run found it.
                    return Some(unsafe { *found });
                }
                let conversion = &handover::$fragment_conversion;
                if word(conversion, MOVED) == 0 {
                    return None;
                }
                let room = room_with_key(conversion, key)?;
                let key_before = (&raw const room.key).cast::<FragmentKey<$address>>();
                // SAFETY: the room has as many bytes as the key of the map before.
                let before = handover::$fragments_before.get_ptr(unsafe { &*key_before })?;
                let copy = copied::<Fragment>(conversion, room, before.cast());
                // SAFETY: the copy is a value.
                Some(unsafe { *copy })
            }

            #[inline(never)]
            fn insert_fragment(
                key: &FragmentKey<$address>,
                fragment: &Fragment,
            ) -> Result<(), i32> {
                let conversion = &handover::$fragment_conversion;
                if word(conversion, MOVED) != 0
                    && let Some(room) = room_with_key(conversion, key)
                {
                    memory::zero(&raw mut room.value);
                    let value = (&raw mut room.value).cast::<u8>();
                    // SAFETY: the room has more bytes than any key and value.
                    unsafe {
                        let from = core::ptr::from_ref(fragment).cast();
                        convert::<VALUE_STEPS>(conversion, BEFORE, from, value);
                        let key = &*(&raw const room.key).cast::<FragmentKey<$address>>();
                        let value = &*value.cast::<Fragment>();
                        let _ = handover::$fragments_before.insert(key, value, BPF_ANY as u64);
                    }
                }
                maps::$fragments.insert(key, fragment, BPF_ANY as u64)
            }
        }
    };
}

fragment_maps!(Ipv4, Address4, FRAGMENTS4, PREVIOUS_FRAGMENTS4, CONVERT_FRAGMENTS4);
fragment_maps!(Ipv6, Address6, FRAGMENTS6, PREVIOUS_FRAGMENTS6, CONVERT_FRAGMENTS6);

/// Memory of a program of sockets, on its stack: the kernel may run another program meanwhile.
type SocketRoom = [u64; 8];

#[inline(always)]
fn peer_key_before(key: &DatagramKey) -> SocketRoom {
    let mut room = core::mem::MaybeUninit::<SocketRoom>::uninit();
    memory::zero(room.as_mut_ptr());
    // SAFETY: zeroed above; more bytes than any key of the map.
    unsafe {
        let from = core::ptr::from_ref(key).cast();
        convert::<KEY_STEPS>(&handover::CONVERT_PEERS, KEY, from, room.as_mut_ptr().cast());
        room.assume_init()
    }
}

/// Looks up in DATAGRAM_PEERS and in the map before.
#[inline(always)]
pub fn datagram_peer(key: &DatagramKey) -> Option<Peer> {
    if let Some(found) = maps::DATAGRAM_PEERS.get_ptr(key) {
        // SAFETY: the look-up of this run found it.
        return Some(unsafe { *found });
    }
    if word(&handover::CONVERT_PEERS, MOVED) == 0 {
        return None;
    }
    let key_before = peer_key_before(key);
    // SAFETY: as many bytes as the key of the map before.
    let before = handover::PREVIOUS_PEERS.get_ptr(unsafe { &*(&raw const key_before).cast() })?;
    let mut room = core::mem::MaybeUninit::<SocketRoom>::uninit();
    memory::zero(room.as_mut_ptr());
    // SAFETY: zeroed above; more bytes than a peer.
    unsafe {
        convert::<VALUE_STEPS>(
            &handover::CONVERT_PEERS,
            OWN,
            before.cast(),
            room.as_mut_ptr().cast(),
        );
        Some(*room.as_ptr().cast::<Peer>())
    }
}

/// Inserts into DATAGRAM_PEERS and into the map before. Without room in the map, recvmsg() returns
/// the backend as the sender.
#[inline(always)]
pub fn insert_datagram_peer(key: &DatagramKey, requested: &Peer) {
    let _ = maps::DATAGRAM_PEERS.insert(key, requested, BPF_ANY as u64);
    if word(&handover::CONVERT_PEERS, MOVED) == 0 {
        return;
    }
    let key_before = peer_key_before(key);
    let mut room = core::mem::MaybeUninit::<SocketRoom>::uninit();
    memory::zero(room.as_mut_ptr());
    // SAFETY: zeroed above; more bytes than any value of the map before.
    unsafe {
        let from = core::ptr::from_ref(requested).cast();
        convert::<VALUE_STEPS>(&handover::CONVERT_PEERS, BEFORE, from, room.as_mut_ptr().cast());
        let key = &*(&raw const key_before).cast::<DatagramKey>();
        let value = &*room.as_ptr().cast::<Peer>();
        let _ = handover::PREVIOUS_PEERS.insert(key, value, BPF_ANY as u64);
    }
}
