//! Flows, while those of the agent before are taken over. That agent had a table of another size, or
//! hash maps: one entry for each direction, and TCP handshakes that are not complete in maps of
//! their own.
//!
//! Until HANDOVER is set, new flows get into the maps before, because at some hooks there are programs
//! that know no others. Afterwards they get into the table of this agent, to which the agent moves
//! the others: each is in the table before it is gone from the maps before. A look-up tries both.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use lb_common::{
    abi::{
        address::{Address, Address4, Address6, Family as AddressFamily, Ipv4, Ipv6},
        conversion::{IN_HASHES, IN_TABLE, SAME},
        flow::{ANSWERED, CONFIRMED, Flow, FlowKey, NextHop, Tuple},
        flow_table::{Bucket, Direction, FlowBucket, FlowFilter, FlowSeed},
        frontend::TCP,
        settings::{Lifetimes, Settings},
    },
    balance::{Known, NewFlow, Search},
    flow_table::Ways,
};

use crate::{
    maps::handover::{
        self, FLOWS_BEFORE, PREVIOUS_FILTER4, PREVIOUS_FILTER6, PREVIOUS_REPLIES4,
        PREVIOUS_REPLIES6, PREVIOUS_SEED, PREVIOUS_TABLE4, PREVIOUS_TABLE6,
    },
    tables::{
        flows::{self, EXISTS, FULL, FlowMaps, Own, flow_maps},
        jiffies, settings,
    },
};

/// The table before, as a type parameter.
pub struct Before;

flow_maps!(
    before4,
    Before,
    Ipv4,
    Address4,
    PREVIOUS_SEED,
    PREVIOUS_TABLE4,
    PREVIOUS_REPLIES4,
    PREVIOUS_FILTER4
);
flow_maps!(
    before6,
    Before,
    Ipv6,
    Address6,
    PREVIOUS_SEED,
    PREVIOUS_TABLE6,
    PREVIOUS_REPLIES6,
    PREVIOUS_FILTER6
);

/// The hash maps that a family's flows were in.
pub trait HashMaps: AddressFamily {
    /// Looks up a direction of a flow, in EMBRYONIC if `is_embryonic`, else in FLOWS.
    fn get(key: &FlowKey<Self::Address>, is_embryonic: bool) -> Option<*mut Flow<Self::Address>>;
    /// Inserts a direction of a flow into FLOWS.
    fn insert_half(
        key: &FlowKey<Self::Address>,
        flow: &Flow<Self::Address>,
        flags: u64,
    ) -> Result<(), i32>;
    /// Removes a direction of a flow from both.
    fn remove_half(key: &FlowKey<Self::Address>);
}

macro_rules! hash_maps {
    ($family:ty, $address:ty, $flows:ident, $embryonic:ident) => {
        impl HashMaps for $family {
            #[inline(always)]
            fn get(key: &FlowKey<$address>, is_embryonic: bool) -> Option<*mut Flow<$address>> {
                if is_embryonic {
                    handover::$embryonic.get_ptr_mut(key)
                } else {
                    handover::$flows.get_ptr_mut(key)
                }
            }

            #[inline(always)]
            fn insert_half(
                key: &FlowKey<$address>,
                flow: &Flow<$address>,
                flags: u64,
            ) -> Result<(), i32> {
                handover::$flows.insert(key, flow, flags)
            }

            #[inline(always)]
            fn remove_half(key: &FlowKey<$address>) {
                let _ = handover::$flows.remove(key);
                let _ = handover::$embryonic.remove(key);
            }
        }
    };
}

hash_maps!(Ipv4, Address4, PREVIOUS_FLOWS4, PREVIOUS_EMBRYONIC4);
hash_maps!(Ipv6, Address6, PREVIOUS_FLOWS6, PREVIOUS_EMBRYONIC6);

/// The maps of a family's flows, now and before.
pub trait Family: FlowMaps<Own> + FlowMaps<Before> + HashMaps {}
impl<F: FlowMaps<Own> + FlowMaps<Before> + HashMaps> Family for F {}

/// [`Known::origin`] of a flow that is in the maps before.
const BEFORE: u32 = 1;

/// Where the flows of the agent before are. The verifier knows the value.
#[inline(always)]
fn before() -> u32 {
    FLOWS_BEFORE.load()
}

/// Whether flows are in the table of this agent.
#[inline(always)]
fn is_switched() -> bool {
    // SAFETY: a plain word that the agent may change at any time.
    before() == SAME
        || handover::HANDOVER.get(0).map(|word| unsafe { core::ptr::read_volatile(word) })
            != Some(0)
}

/// Looks a flow up.
#[inline(always)]
pub fn find<F: Family>(
    key: &FlowKey<F::Address>,
    search: Search,
    found: &mut Known<F::Address>,
) -> bool {
    is_switched() && flows::find::<F, Own>(key, search, found)
        || before() != SAME && find_before::<F>(key, search, found)
}

#[inline(always)]
fn find_before<F: Family>(
    key: &FlowKey<F::Address>,
    search: Search,
    found: &mut Known<F::Address>,
) -> bool {
    if before() == IN_TABLE {
        let is_found = flows::find::<F, Before>(key, search, found);
        found.origin = BEFORE;
        return is_found;
    }
    find_in_hashes::<F>(key, found)
}

/// Looks up in FLOWS, then in EMBRYONIC. A key has one direction there.
#[inline(never)]
fn find_in_hashes<F: Family>(key: &FlowKey<F::Address>, found: &mut Known<F::Address>) -> bool {
    let mut is_established = true;
    let mut entry = F::get(key, false);
    if entry.is_none() && key.protocol == TCP as u32 {
        is_established = false;
        entry = F::get(key, true);
    }
    let (Some(entry), Some(settings)) = (entry, settings()) else { return false };
    // SAFETY: the look-up of this run found it.
    found.flow.set(unsafe { &*entry });
    found.flow.last_seen = settings.time(found.flow.last_seen);
    if is_established && key.protocol == TCP as u32 && found.flow.state & ANSWERED != 0 {
        found.flow.state |= CONFIRMED;
    }
    (found.place, found.word, found.origin) = (0, 0, BEFORE);
    true
}

/// Whether a flow may have these replies.
#[inline(always)]
pub fn may_have_reply<F: Family>(key: &FlowKey<F::Address>) -> bool {
    <F as FlowMaps<Own>>::may_have_reply(key) || before() != SAME && may_have_reply_before::<F>(key)
}

#[inline(always)]
fn may_have_reply_before<F: Family>(key: &FlowKey<F::Address>) -> bool {
    if before() == IN_TABLE {
        return <F as FlowMaps<Before>>::may_have_reply(key);
    }
    is_in_hashes::<F>(key)
}

/// Whether a flow may have this client.
#[inline(always)]
pub fn may_have_client<F: Family>(key: &FlowKey<F::Address>) -> bool {
    before() == IN_HASHES
        || <F as FlowMaps<Own>>::may_have_client(key)
        || before() == IN_TABLE && <F as FlowMaps<Before>>::may_have_client(key)
}

#[inline(never)]
fn is_in_hashes<F: Family>(key: &FlowKey<F::Address>) -> bool {
    F::get(key, false).is_some() || F::get(key, true).is_some()
}

/// Inserts a flow. Returns 0, [`EXISTS`] or [`FULL`].
#[inline(always)]
pub fn insert<F: Family>(
    key: &FlowKey<F::Address>,
    new: &mut NewFlow<F::Address>,
    settings: &Settings,
) -> i32 {
    if is_switched() {
        // So that a key that is reserved there is not reserved here as well.
        let is_taken = before() != SAME
            && new.reply_action.action != 0
            && may_have_reply_before::<F>(&new.reply_key);
        return if is_taken { EXISTS } else { <F as FlowMaps<Own>>::insert(key, new, settings) };
    }
    if before() == IN_TABLE {
        return <F as FlowMaps<Before>>::insert(key, new, settings);
    }
    insert_into_hashes::<F>(key, new)
}

/// Inserts both directions into FLOWS, the reply's first. There the programs of the agent before find
/// it, a TCP handshake too.
#[inline(never)]
fn insert_into_hashes<F: Family>(key: &FlowKey<F::Address>, new: &mut NewFlow<F::Address>) -> i32 {
    let (time, request) = (new.flow.last_seen, new.flow.action);
    new.flow.last_seen = jiffies();
    let mut result = 0;
    if new.reply_action.action != 0 {
        reverse(&key.tuple, &mut new.flow);
        new.flow.action = new.reply_action;
        if F::insert_half(&new.reply_key, &new.flow, BPF_NOEXIST as u64).is_err() {
            result = EXISTS;
        }
        // Back to the direction of requests.
        reverse(&new.reply_key.tuple, &mut new.flow);
        new.flow.action = request;
    }
    if result == 0 && F::insert_half(key, &new.flow, BPF_ANY as u64).is_err() {
        result = FULL;
    }
    new.flow.last_seen = time;
    result
}

/// Makes a direction of a flow the other one, whose packets arrive as `arrives`.
#[inline(always)]
fn reverse<A: Address>(arrives: &Tuple<A>, flow: &mut Flow<A>) {
    flow.rewrite.set_reverse(arrives);
}

/// Notes a packet of a flow.
#[inline(always)]
pub fn note<F: Family>(key: &FlowKey<F::Address>, found: &Known<F::Address>, bits: u32, time: u32) {
    if found.origin == 0 {
        <F as FlowMaps<Own>>::note(found, bits, time);
    } else if before() == IN_TABLE {
        <F as FlowMaps<Before>>::note(found, bits, time);
    } else if before() == IN_HASHES {
        note_in_hashes::<F>(key, found, bits);
    }
}

/// Notes a packet in both entries. A TCP handshake that is complete moves to FLOWS, as the programs of
/// the agent before do it.
#[inline(never)]
fn note_in_hashes<F: Family>(key: &FlowKey<F::Address>, found: &Known<F::Address>, bits: u32) {
    let Some(room) = room::<F>() else { return };
    room.set_reverse(&found.flow.rewrite, key.protocol);
    let confirms = bits as u8 & CONFIRMED != 0 && key.protocol == TCP as u32;
    note_half::<F>(room, bits, confirms);
    note_half::<F>(key, bits, confirms);
}

#[inline(never)]
fn note_half<F: Family>(key: &FlowKey<F::Address>, bits: u32, confirms: bool) {
    let (clear, set) = ((bits >> 8) as u8, bits as u8);
    let mut is_embryonic = false;
    let mut entry = F::get(key, false);
    if entry.is_none() {
        is_embryonic = true;
        entry = F::get(key, true);
    }
    let Some(entry) = entry else { return };
    // SAFETY: the look-up of this run found it.
    unsafe {
        let state = (*entry).state & !clear | set & !CONFIRMED;
        core::ptr::write_volatile(&raw mut (*entry).state, state);
        core::ptr::write_volatile(&raw mut (*entry).last_seen, jiffies());
        core::ptr::write_volatile(&raw mut (*entry).next_hop, NextHop::UNKNOWN);
    }
    if confirms && is_embryonic {
        // SAFETY: as above.
        let _ = F::insert_half(key, unsafe { &*entry }, BPF_ANY as u64);
    }
}

/// Removes a flow.
#[inline(always)]
pub fn remove<F: Family>(key: &FlowKey<F::Address>, found: &Known<F::Address>) {
    if found.origin == 0 {
        <F as FlowMaps<Own>>::remove(found);
    } else if before() == IN_TABLE {
        <F as FlowMaps<Before>>::remove(found);
    } else if before() == IN_HASHES {
        remove_from_hashes::<F>(key, found);
    }
}

#[inline(never)]
fn remove_from_hashes<F: Family>(key: &FlowKey<F::Address>, found: &Known<F::Address>) {
    let Some(room) = room::<F>() else { return };
    room.set_reverse(&found.flow.rewrite, key.protocol);
    F::remove_half(key);
    F::remove_half(room);
}

/// Remembers the next hop of a direction of a flow.
#[inline(always)]
pub fn remember<F: Family>(found: &Known<F::Address>, next_hop: NextHop) {
    // A flow of the maps before is soon in the table.
    if found.origin == 0 {
        flows::remember::<F, Own>(found, next_hop);
    }
}

/// Working memory for the key of a flow's other direction.
#[inline(always)]
fn room<F: Family>() -> Option<&'static mut FlowKey<F::Address>> {
    let room = handover::ROOM.get_ptr_mut(0)?;
    // SAFETY: this CPU's entry; no two runs that use it overlap, and it has room for every key.
    unsafe { Some(&mut *(&raw mut (*room).key).cast()) }
}
