//! The maps of flows, fragments and peers of datagrams, while those of the agent before are taken
//! over. They have another layout or another size.
//!
//! Flows are at one place at a time. Until HANDOVER is set, that is the maps before, because at some
//! hooks there are programs that know no others: an entry is then a converted copy, and each change
//! is made in the map before too. Afterwards it is the maps of this agent, into which a look-up moves
//! the entry that it finds in the map before only. Fragments and peers never change, so they are
//! inserted into both and looked up in both.

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use lb_common::{
    abi::{
        address::{Address4, Address6, Family, Ipv4, Ipv6},
        conversion::{
            BEFORE, ConversionWords, KEY, KEY_STEPS, LAST_SEEN, MOVED, MOVED_EMBRYONIC,
            MOVED_TABLE, NEXT_HOP, OWN, STATE, VALUE_STEPS,
        },
        flow::{Flow, FlowKey, NextHop},
        fragment::{Fragment, FragmentKey},
        socket::{DatagramKey, Peer},
    },
    balance::{Entry, FlowTable, tables::FlowEntry},
};

use crate::{
    maps::{
        self,
        handover::{self, Room},
    },
    memory,
};

use super::{EEXIST, FlowMaps};

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

/// Whether flows are in the maps of this agent.
#[inline(always)]
fn is_switched() -> bool {
    // SAFETY: a plain word that the agent may change at any time.
    handover::HANDOVER.get(0).map(|word| unsafe { core::ptr::read_volatile(word) }) != Some(0)
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
) -> Option<*mut T> {
    let number = room.next as usize & (Room::COPIES - 1);
    room.next = number as u64 + 1;
    let copy = &raw mut *room.copies.get_mut(number)?;
    memory::zero(copy);
    // SAFETY: the copy has room for every value.
    unsafe { convert::<VALUE_STEPS>(conversion, OWN, value, copy.cast()) };
    Some(copy.cast())
}

/// An entry of FLOWS or EMBRYONIC.
pub struct FlowHandle<F: Family> {
    /// The entry, or a copy of it.
    flow: *mut Flow<F::Address>,
    /// The entry of the map before that `flow` is a copy of; else null.
    before: *mut u8,
}

impl<F: FlowFamily> Entry<Flow<F::Address>> for FlowHandle<F> {
    #[inline(always)]
    fn get(&self) -> &Flow<F::Address> {
        // SAFETY: the pointer came from a look-up of this run and was checked.
        unsafe { &*self.flow }
    }

    #[inline(always)]
    fn store(&self, value: Flow<F::Address>) {
        memory::copy(self.flow, &raw const value);
        if !self.before.is_null() {
            // SAFETY: an entry of the map before.
            unsafe {
                let from = (&raw const value).cast();
                convert::<VALUE_STEPS>(F::CONVERSION, BEFORE, from, self.before);
            }
        }
    }
}

impl<F: FlowFamily> FlowEntry<F::Address> for FlowHandle<F> {
    #[inline(always)]
    fn set_state(&self, state: u8) {
        // SAFETY: as above.
        unsafe { core::ptr::write_volatile(&raw mut (*self.flow).state, state) };
        if !self.before.is_null() {
            let offset = word(F::CONVERSION, STATE) as usize;
            // SAFETY: an entry of the map before; the agent has compared the offset with its size.
            unsafe { core::ptr::write_volatile(self.before.add(offset), state) };
        }
    }

    #[inline(always)]
    fn set_last_seen(&self, now: u32) {
        // SAFETY: as above.
        unsafe { core::ptr::write_volatile(&raw mut (*self.flow).last_seen, now) };
        if !self.before.is_null() {
            let offset = word(F::CONVERSION, LAST_SEEN) as usize;
            // SAFETY: as above.
            unsafe { core::ptr::write_volatile(self.before.add(offset).cast(), now) };
        }
        self.set_next_hop(NextHop::UNKNOWN);
    }
}

impl<F: FlowFamily> FlowHandle<F> {
    /// Remembers the next hop, by one store.
    #[inline(always)]
    pub fn set_next_hop(&self, next_hop: NextHop) {
        // SAFETY: as above; one aligned word.
        unsafe { core::ptr::write_volatile(&raw mut (*self.flow).next_hop, next_hop) };
        let offset = word(F::CONVERSION, NEXT_HOP);
        if offset != 0 && !self.before.is_null() {
            // SAFETY: as above.
            unsafe {
                let place = self.before.add((offset & 0xff) as usize);
                core::ptr::write_volatile(place.cast(), next_hop);
            }
        }
    }
}

/// A family whose flows may be converted.
pub trait FlowFamily: Family {
    /// How flows are converted.
    const CONVERSION: &'static Global<ConversionWords>;
}

const NOEXIST: u64 = BPF_NOEXIST as u64;

/// One table of flows and the one before.
macro_rules! both {
    ($name:ident, $family:ty, $address:ty, $map:ident, $before:ident, $bit:ident) => {
        mod $name {
            use super::*;

            type Key = FlowKey<$address>;
            type Value = Flow<$address>;
            const CONVERSION: &Global<ConversionWords> = <$family as FlowFamily>::CONVERSION;

            #[inline(always)]
            fn is_same() -> bool {
                word(CONVERSION, MOVED) & $bit == 0
            }

            /// The entry, if there is one: its parts are written to `found`.
            #[inline(never)]
            pub fn find(key: &Key, found: &mut FlowHandle<$family>) -> bool {
                found.before = core::ptr::null_mut();
                let is_switched = is_same() || is_switched();
                if is_switched && let Some(flow) = maps::$map.get_ptr_mut(key) {
                    found.flow = flow;
                    return true;
                }
                if is_same() {
                    return false;
                }
                let Some(room) = room_with_key(CONVERSION, key) else { return false };
                let key_before = (&raw const room.key).cast::<Key>();
                // SAFETY: the room has as many bytes as the key of the map before.
                let Some(before) = handover::$before.get_ptr_mut(unsafe { &*key_before }) else {
                    return false;
                };
                let Some(copy) = copied::<Value>(CONVERSION, room, before.cast()) else {
                    return false;
                };
                if !is_switched {
                    found.flow = copy;
                    found.before = before.cast();
                    return true;
                }
                // If another run was faster, the entry that it inserted counts.
                // SAFETY: the copy is a value.
                let _ = maps::$map.insert(key, unsafe { &*copy }, NOEXIST);
                let Some(flow) = maps::$map.get_ptr_mut(key) else { return false };
                found.flow = flow;
                true
            }

            #[inline(never)]
            pub fn insert(key: &Key, flow: &Value, flags: u64) -> i32 {
                if is_same() {
                    return error(maps::$map.insert(key, flow, flags));
                }
                let Some(room) = room_with_key(CONVERSION, key) else { return -EEXIST };
                // SAFETY: as above.
                let key_before = unsafe { &*(&raw const room.key).cast::<Key>() };
                if is_switched() {
                    // So that a key that is reserved there is not reserved here as well.
                    if flags == NOEXIST && handover::$before.get_ptr(key_before).is_some() {
                        return -EEXIST;
                    }
                    return error(maps::$map.insert(key, flow, flags));
                }
                memory::zero(&raw mut room.value);
                let value = (&raw mut room.value).cast::<u8>();
                // SAFETY: the room has more bytes than any value.
                unsafe {
                    let from = core::ptr::from_ref(flow).cast();
                    convert::<VALUE_STEPS>(CONVERSION, BEFORE, from, value);
                    error(handover::$before.insert(key_before, &*value.cast::<Value>(), flags))
                }
            }

            #[inline(never)]
            pub fn remove(key: &Key) -> i32 {
                if is_same() {
                    return error(maps::$map.remove(key));
                }
                let Some(room) = room_with_key(CONVERSION, key) else { return 0 };
                // SAFETY: as above.
                let key_before = unsafe { &*(&raw const room.key).cast::<Key>() };
                let _ = handover::$before.remove(key_before);
                error(maps::$map.remove(key))
            }
        }
    };
}

/// 0, or a negative error number.
#[inline(always)]
fn error(result: Result<(), i32>) -> i32 {
    result.err().unwrap_or(0)
}

#[inline(always)]
fn result(error: i32) -> Result<(), i32> {
    if error == 0 { Ok(()) } else { Err(error) }
}

both!(flows4, Ipv4, Address4, FLOWS4, PREVIOUS_FLOWS4, MOVED_TABLE);
both!(flows6, Ipv6, Address6, FLOWS6, PREVIOUS_FLOWS6, MOVED_TABLE);
both!(embryonic4, Ipv4, Address4, EMBRYONIC4, PREVIOUS_EMBRYONIC4, MOVED_EMBRYONIC);
both!(embryonic6, Ipv6, Address6, EMBRYONIC6, PREVIOUS_EMBRYONIC6, MOVED_EMBRYONIC);

macro_rules! flow_maps {
    ($family:ty, $address:ty, $conversion:ident, $flows:ident, $embryonic:ident, $fragments:ident,
     $fragments_before:ident, $fragment_conversion:ident) => {
        impl FlowFamily for $family {
            const CONVERSION: &'static Global<ConversionWords> = &handover::$conversion;
        }

        impl FlowMaps for $family {
            #[inline(always)]
            fn flow(table: FlowTable, key: &FlowKey<$address>) -> Option<FlowHandle<Self>> {
                let null = core::ptr::null_mut();
                let mut found = FlowHandle { flow: null, before: core::ptr::null_mut() };
                let is_found = match table {
                    FlowTable::Embryonic => $embryonic::find(key, &mut found),
                    FlowTable::Flows => $flows::find(key, &mut found),
                };
                is_found.then_some(found)
            }

            #[inline(always)]
            fn insert(
                table: FlowTable,
                key: &FlowKey<$address>,
                flow: &Flow<$address>,
                flags: u64,
            ) -> Result<(), i32> {
                result(match table {
                    FlowTable::Embryonic => $embryonic::insert(key, flow, flags),
                    FlowTable::Flows => $flows::insert(key, flow, flags),
                })
            }

            #[inline(always)]
            fn remove(table: FlowTable, key: &FlowKey<$address>) -> Result<(), i32> {
                result(match table {
                    FlowTable::Embryonic => $embryonic::remove(key),
                    FlowTable::Flows => $flows::remove(key),
                })
            }

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
                let copy = copied::<Fragment>(conversion, room, before.cast())?;
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

flow_maps!(
    Ipv4,
    Address4,
    CONVERT_FLOWS4,
    flows4,
    embryonic4,
    FRAGMENTS4,
    PREVIOUS_FRAGMENTS4,
    CONVERT_FRAGMENTS4
);
flow_maps!(
    Ipv6,
    Address6,
    CONVERT_FLOWS6,
    flows6,
    embryonic6,
    FRAGMENTS6,
    PREVIOUS_FRAGMENTS6,
    CONVERT_FRAGMENTS6
);

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
