//! The table of flows in the kernel's maps.

use core::ptr;

use lb_common::{
    abi::{
        address::{Address4, Address6, Family, Ipv4, Ipv6},
        flow::{FlowKey, NextHop, Tuple},
        flow_table::{
            Bucket, Direction, FILTER_WORDS, FlowBucket, FlowEntry, FlowFilter, FlowSeed,
            RequestWord, WAYS,
        },
        settings::{Lifetimes, Settings},
    },
    balance::{InsertError, Known, Note, Search},
    flow_table::{self, Found, Memory, NewFlow, Ways},
};

use super::flows;
use crate::maps;

/// The maps of this agent, as a type parameter.
pub struct Own;

/// The maps of a family's flows, of this agent or of another one.
pub trait FlowMaps<P = Own>: Family {
    /// FLOW_SEED.
    fn seed() -> Option<&'static FlowSeed>;
    /// Looks up the flow with these requests.
    fn find_request(key: &FlowKey<Self::Address>, found: &mut Known<Self::Address>) -> bool;
    /// Looks up the flow with these replies.
    fn find_reply(key: &FlowKey<Self::Address>, found: &mut Known<Self::Address>) -> bool;
    /// Whether a flow may have these replies.
    fn may_have_reply(key: &FlowKey<Self::Address>) -> bool;
    /// Whether a flow may have the client of these requests.
    fn may_have_client(key: &FlowKey<Self::Address>) -> bool;
    /// Inserts a flow. Returns 0, [`EXISTS`] or [`FULL`].
    fn insert(
        key: &FlowKey<Self::Address>,
        new: &mut NewFlow<Self::Address>,
        settings: &Settings,
    ) -> i32;
    /// See [`flow_table::worst_request`].
    fn worst_request(new: &NewFlow<Self::Address>, lifetimes: &Lifetimes, choice: u32) -> u64;
    /// See [`flow_table::has_other`].
    fn has_other(
        direction: Direction,
        key: &FlowKey<Self::Address>,
        ways: Ways,
        place: u32,
    ) -> bool;
    /// Notes a packet of a flow. `bits` has the bits of the state to clear and to set, as [`bits()`] packs
    /// them.
    fn note(found: &Known<Self::Address>, bits: u32, time: u32);
    /// Removes a flow.
    fn remove(found: &Known<Self::Address>);

    /// A bucket of FLOW_TABLE.
    fn bucket(bucket: u32) -> Option<*mut FlowBucket<Self::Address>>;
    /// A bucket of FLOW_REPLIES.
    fn replies(bucket: u32) -> Option<*mut Bucket>;
    /// The words of a bucket in FLOW_FILTER.
    fn filter(bucket: u32) -> Option<*mut FlowFilter>;

    /// The words of a bucket of FLOW_TABLE.
    #[inline(always)]
    fn requests(bucket: u32) -> Option<*mut Bucket> {
        // They are its first field.
        Self::bucket(bucket).map(<*mut _>::cast)
    }

    /// The entry at a place.
    #[inline(always)]
    fn entry(place: u32) -> Option<*mut FlowEntry<Self::Address>> {
        let bucket = Self::bucket(place / WAYS as u32)?;
        // SAFETY: a look-up of this run found the bucket, and the way is in bounds.
        Some(unsafe {
            (&raw mut (*bucket).entries).cast::<FlowEntry<Self::Address>>().add(way(place))
        })
    }
}

/// Implements [`FlowMaps`] over some maps, in functions of a module.
///
/// The functions have C linkage: the kernel verifies such a function once and by itself, not again
/// for each path that leads to a call (`btf_check_subprog_call`, `do_check_subprogs`). So it assumes
/// nothing of their arguments, which may be null.
macro_rules! flow_maps {
    ($module:ident, $of:ty, $family:ty, $address:ty, $seed:path, $table:path, $replies:path, $filter:path) => {
        impl FlowMaps<$of> for $family {
            #[inline(always)]
            fn find_request(key: &FlowKey<$address>, found: &mut Known<$address>) -> bool {
                // SAFETY: references.
                unsafe { $module::find_request(key, found) != 0 }
            }

            #[inline(always)]
            fn find_reply(key: &FlowKey<$address>, found: &mut Known<$address>) -> bool {
                // SAFETY: as above.
                unsafe { $module::find_reply(key, found) != 0 }
            }

            #[inline(always)]
            fn may_have_reply(key: &FlowKey<$address>) -> bool {
                // SAFETY: as above.
                unsafe { $module::may_have_reply(key) != 0 }
            }

            #[inline(always)]
            fn may_have_client(key: &FlowKey<$address>) -> bool {
                // SAFETY: as above.
                unsafe { $module::may_have_client(key) != 0 }
            }

            #[inline(always)]
            fn insert(
                key: &FlowKey<$address>,
                new: &mut NewFlow<$address>,
                settings: &Settings,
            ) -> i32 {
                // SAFETY: as above.
                unsafe { $module::insert(key, new, settings) }
            }

            #[inline(always)]
            fn worst_request(new: &NewFlow<$address>, lifetimes: &Lifetimes, choice: u32) -> u64 {
                // SAFETY: as above.
                unsafe { $module::worst_request(new, lifetimes, choice) }
            }

            #[inline(always)]
            fn has_other(
                direction: Direction,
                key: &FlowKey<$address>,
                Ways { bucket, ways }: Ways,
                place: u32,
            ) -> bool {
                // SAFETY: as above.
                unsafe { $module::has_other(direction as u32, key, bucket, ways, place) != 0 }
            }

            #[inline(always)]
            fn note(found: &Known<$address>, bits: u32, time: u32) {
                // SAFETY: as above.
                unsafe { $module::note(found, bits, time) };
            }

            #[inline(always)]
            fn remove(found: &Known<$address>) {
                // SAFETY: as above.
                unsafe { $module::remove(found) };
            }

            #[inline(always)]
            fn seed() -> Option<&'static FlowSeed> {
                $seed.get(0)
            }

            #[inline(always)]
            fn bucket(bucket: u32) -> Option<*mut FlowBucket<$address>> {
                $table.get_ptr_mut(bucket)
            }

            #[inline(always)]
            fn replies(bucket: u32) -> Option<*mut Bucket> {
                $replies.get_ptr_mut(bucket)
            }

            #[inline(always)]
            fn filter(bucket: u32) -> Option<*mut FlowFilter> {
                $filter.get_ptr_mut(bucket)
            }
        }

        mod $module {
            use super::*;

            #[unsafe(export_name = concat!(stringify!($module), "_find_request"))]
            #[inline(never)]
            pub(super) unsafe extern "C" fn find_request(
                key: *const FlowKey<$address>,
                found: *mut Known<$address>,
            ) -> u32 {
                // SAFETY: the caller's.
                let (key, found) = unsafe { (key.as_ref(), found.as_mut()) };
                let (Some(key), Some(found)) = (key, found) else { return 0 };
                flows::find_request::<$family, $of>(key, found) as u32
            }

            #[unsafe(export_name = concat!(stringify!($module), "_find_reply"))]
            #[inline(never)]
            pub(super) unsafe extern "C" fn find_reply(
                key: *const FlowKey<$address>,
                found: *mut Known<$address>,
            ) -> u32 {
                // SAFETY: the caller's.
                let (key, found) = unsafe { (key.as_ref(), found.as_mut()) };
                let (Some(key), Some(found)) = (key, found) else { return 0 };
                flows::find_reply::<$family, $of>(key, found) as u32
            }

            #[unsafe(export_name = concat!(stringify!($module), "_may_have_reply"))]
            #[inline(never)]
            pub(super) unsafe extern "C" fn may_have_reply(key: *const FlowKey<$address>) -> u32 {
                // SAFETY: the caller's.
                let key = unsafe { key.as_ref() };
                let Some(key) = key else { return 0 };
                flows::may_have_reply::<$family, $of>(key) as u32
            }

            #[unsafe(export_name = concat!(stringify!($module), "_may_have_client"))]
            #[inline(never)]
            pub(super) unsafe extern "C" fn may_have_client(key: *const FlowKey<$address>) -> u32 {
                // SAFETY: the caller's.
                let key = unsafe { key.as_ref() };
                let Some(key) = key else { return 0 };
                flows::may_have_client::<$family, $of>(key) as u32
            }

            #[unsafe(export_name = concat!(stringify!($module), "_insert"))]
            #[inline(never)]
            pub(super) unsafe extern "C" fn insert(
                key: *const FlowKey<$address>,
                new: *mut NewFlow<$address>,
                settings: *const Settings,
            ) -> i32 {
                // SAFETY: the caller's.
                let all = unsafe { (key.as_ref(), new.as_mut(), settings.as_ref()) };
                let (Some(key), Some(new), Some(settings)) = all else { return flows::FULL };
                flows::insert::<$family, $of>(key, new, settings)
            }

            #[unsafe(export_name = concat!(stringify!($module), "_worst_request"))]
            #[inline(never)]
            pub(super) unsafe extern "C" fn worst_request(
                new: *const NewFlow<$address>,
                lifetimes: *const Lifetimes,
                choice: u32,
            ) -> u64 {
                // SAFETY: the caller's.
                let (new, lifetimes) = unsafe { (new.as_ref(), lifetimes.as_ref()) };
                let (Some(new), Some(lifetimes)) = (new, lifetimes) else { return 0 };
                flows::worst_request::<$family, $of>(new, lifetimes, choice)
            }

            #[unsafe(export_name = concat!(stringify!($module), "_has_other"))]
            #[inline(never)]
            pub(super) unsafe extern "C" fn has_other(
                direction: u32,
                key: *const FlowKey<$address>,
                bucket: u32,
                ways: u32,
                place: u32,
            ) -> u32 {
                // SAFETY: the caller's.
                let key = unsafe { key.as_ref() };
                let Some(key) = key else { return 1 };
                flows::has_other::<$family, $of>(direction, key, Ways { bucket, ways }, place)
                    as u32
            }

            #[unsafe(export_name = concat!(stringify!($module), "_note"))]
            #[inline(never)]
            pub(super) unsafe extern "C" fn note(
                found: *const Known<$address>,
                bits: u32,
                time: u32,
            ) -> u32 {
                // SAFETY: the caller's.
                let found = unsafe { found.as_ref() };
                let Some(found) = found else { return 0 };
                flows::note::<$family, $of>(found, bits, time);
                0
            }

            #[unsafe(export_name = concat!(stringify!($module), "_remove"))]
            #[inline(never)]
            pub(super) unsafe extern "C" fn remove(found: *const Known<$address>) -> u32 {
                // SAFETY: the caller's.
                let found = unsafe { found.as_ref() };
                let Some(found) = found else { return 0 };
                flows::remove::<$family, $of>(found);
                0
            }
        }
    };
}

#[cfg(feature = "handover")]
pub(crate) use flow_maps;

use maps::{
    FLOW_FILTER4, FLOW_FILTER6, FLOW_REPLIES4, FLOW_REPLIES6, FLOW_SEED, FLOW_TABLE4, FLOW_TABLE6,
};

flow_maps!(flows4, Own, Ipv4, Address4, FLOW_SEED, FLOW_TABLE4, FLOW_REPLIES4, FLOW_FILTER4);
flow_maps!(flows6, Own, Ipv6, Address6, FLOW_SEED, FLOW_TABLE6, FLOW_REPLIES6, FLOW_FILTER6);

/// A family's maps.
pub(crate) struct Maps<F, P>(core::marker::PhantomData<(F, P)>);

impl<F: FlowMaps<P>, P> Maps<F, P> {
    pub(crate) const NEW: Self = Self(core::marker::PhantomData);
}

impl<F: FlowMaps<P>, P> Memory<F::Address> for Maps<F, P> {
    type Bucket = *mut Bucket;
    type Entry = *mut FlowEntry<F::Address>;

    #[inline(always)]
    fn seed(&self) -> Option<&FlowSeed> {
        F::seed()
    }

    #[inline(always)]
    fn requests(&self, bucket: u32) -> Option<*mut Bucket> {
        F::requests(bucket)
    }

    #[inline(always)]
    fn replies(&self, bucket: u32) -> Option<*mut Bucket> {
        F::replies(bucket)
    }

    #[inline(always)]
    fn load(&self, bucket: *mut Bucket, way: u32) -> u64 {
        // SAFETY: a look-up of this run found the bucket.
        unsafe { ptr::read_volatile(word(bucket, way)) }
    }

    #[inline(always)]
    fn next(&self, bucket: *mut Bucket, way: u32) -> u64 {
        // SAFETY: a look-up of this run found the bucket, and the way is in bounds.
        unsafe { ptr::read_volatile(&raw const (*bucket).words[way as usize % WAYS]) }
    }

    #[inline(always)]
    fn swap(&self, bucket: *mut Bucket, way: u32, old: u64, new: u64) -> bool {
        // SAFETY: as above.
        unsafe { compare_and_swap(word(bucket, way), old, new) }
    }

    #[inline(always)]
    fn filter_word(&self, bucket: u32, word: u32) -> u64 {
        let Some(filter) = F::filter(bucket) else { return 0 };
        // SAFETY: a look-up of this run found it, and the word is in bounds.
        unsafe { ptr::read_volatile(filter_word(filter, word)) }
    }

    #[inline(always)]
    fn set_filter_bits(&self, bucket: u32, word: u32, bits: u64) {
        let Some(filter) = F::filter(bucket) else { return };
        // SAFETY: as above.
        unsafe { set_bits(filter_word(filter, word), bits) }
    }

    #[inline(always)]
    fn entry(&self, place: u32) -> Option<Self::Entry> {
        F::entry(place)
    }

    #[inline(always)]
    fn prefetch(&self, place: u32) {
        if let Some(entry) = F::entry(place) {
            // SAFETY: a look-up of this run found the entry.
            unsafe { ptr::read_volatile(&raw const (*entry).backend) };
        }
    }

    #[inline(always)]
    fn is_of(&self, entry: Self::Entry, direction: Direction, tuple: &Tuple<F::Address>) -> bool {
        match direction {
            Direction::Request => is_request::<F>(entry, tuple),
            Direction::Reply => is_reply::<F>(entry, tuple),
        }
    }

    #[inline(always)]
    fn reply_place(&self, entry: Self::Entry) -> u32 {
        // SAFETY: as above.
        unsafe { ptr::read_volatile(&raw const (*entry).reply_place) }
    }

    #[inline(always)]
    fn set_reply_place(&self, entry: Self::Entry, place: u32) {
        // SAFETY: as above.
        unsafe { ptr::write_volatile(&raw mut (*entry).reply_place, place) }
    }

    #[inline(always)]
    fn worst_request(&self, new: &NewFlow<F::Address>, lifetimes: &Lifetimes, choice: u32) -> u64 {
        F::worst_request(new, lifetimes, choice)
    }

    #[inline(always)]
    fn has_other(
        &self,
        direction: Direction,
        key: &FlowKey<F::Address>,
        ways: Ways,
        place: u32,
    ) -> bool {
        F::has_other(direction, key, ways, place)
    }

    #[inline(always)]
    fn forget(&self, bucket: *mut Bucket, value: u64) -> u64 {
        forget(Memory::<F::Address>::next(self, bucket, 0), value)
    }
}

/// Whether requests of the flow arrive as `tuple`.
#[inline(always)]
fn is_request<F: Family>(entry: *mut FlowEntry<F::Address>, tuple: &Tuple<F::Address>) -> bool {
    // SAFETY: a look-up of this run found the entry. What another CPU writes meanwhile is noticed by
    // the word.
    unsafe { (*entry).is_of(Direction::Request, tuple) }
}

/// Whether replies of the flow arrive as `tuple`.
#[inline(always)]
fn is_reply<F: Family>(entry: *mut FlowEntry<F::Address>, tuple: &Tuple<F::Address>) -> bool {
    // SAFETY: as above.
    unsafe { (*entry).is_of(Direction::Reply, tuple) }
}

/// Replaces `*place` by `new` if it is `old`.
///
/// # Safety
/// `place` is a word of a map's value.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub(super) unsafe fn compare_and_swap(place: *mut u64, old: u64, new: u64) -> bool {
    let found: u64;
    // SAFETY: the caller's; one aligned word. The instruction needs Linux 5.12.
    unsafe {
        core::arch::asm!(
            "r0 = cmpxchg_64({place} + 0, r0, {new})",
            inout("r0") old => found,
            place = in(reg) place,
            new = in(reg) new,
        );
    }
    found == old
}

/// Sets bits of `*place` in one step.
///
/// # Safety
/// `place` is a word of a map's value.
#[cfg(target_arch = "bpf")]
#[inline(always)]
unsafe fn set_bits(place: *mut u64, bits: u64) {
    // SAFETY: the caller's; one aligned word. The instruction needs Linux 5.12.
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({place} + 0) |= {bits}",
            place = in(reg) place,
            bits = in(reg) bits,
        );
    }
}

/// Returns `value`, of which the verifier then knows nothing: it does not see that the difference of a
/// number from itself is zero.
#[cfg(target_arch = "bpf")]
#[inline(always)]
fn forget(any: u64, mut value: u64) -> u64 {
    // SAFETY: arithmetic.
    unsafe {
        core::arch::asm!(
            "{zero} = {any}",
            "{zero} ^= {any}",
            "{value} += {zero}",
            any = in(reg) any,
            value = inout(reg) value,
            zero = out(reg) _,
        );
    }
    value
}

/// A word of a bucket's filter, which counts modulo [`FILTER_WORDS`].
#[inline(always)]
fn filter_word(filter: *mut FlowFilter, word: u32) -> *mut u64 {
    filter.cast::<u64>().wrapping_add(way(word) % FILTER_WORDS)
}

/// The word of a way, which counts modulo [`WAYS`].
#[inline(always)]
fn word(bucket: *mut Bucket, way: u32) -> *mut u64 {
    bucket.cast::<u64>().wrapping_add(self::way(way))
}

/// The way of a place.
#[cfg(target_arch = "bpf")]
#[inline(always)]
fn way(place: u32) -> usize {
    let mut way = u64::from(place);
    // Where the compiler knows that the way is in bounds, it would leave this out, but the verifier
    // may not know.
    // SAFETY: arithmetic.
    unsafe { core::arch::asm!("{way} &= {mask}", way = inout(reg) way, mask = const WAYS - 1) };
    way as usize
}

/// For clippy, which compiles the programs for the host.
#[cfg(not(target_arch = "bpf"))]
pub(super) unsafe fn compare_and_swap(place: *mut u64, old: u64, new: u64) -> bool {
    // SAFETY: the caller's.
    let word = unsafe { core::sync::atomic::AtomicU64::from_ptr(place) };
    let order = core::sync::atomic::Ordering::SeqCst;
    word.compare_exchange(old, new, order, order).is_ok()
}

#[cfg(not(target_arch = "bpf"))]
unsafe fn set_bits(place: *mut u64, bits: u64) {
    // SAFETY: the caller's.
    let word = unsafe { core::sync::atomic::AtomicU64::from_ptr(place) };
    word.fetch_or(bits, core::sync::atomic::Ordering::SeqCst);
}

#[cfg(not(target_arch = "bpf"))]
fn way(place: u32) -> usize {
    place as usize % WAYS
}

#[cfg(not(target_arch = "bpf"))]
fn forget(_any: u64, value: u64) -> u64 {
    value
}

/// Looks a flow up.
#[inline(always)]
pub fn find<F: FlowMaps<P>, P>(
    key: &FlowKey<F::Address>,
    search: Search,
    found: &mut Known<F::Address>,
) -> bool {
    let is_reply_first = matches!(search, Search::RepliesFirst);
    (search.has_requests() && !is_reply_first && F::find_request(key, found))
        || (search.has_replies() && F::find_reply(key, found))
        || (is_reply_first && F::find_request(key, found))
}

#[inline(always)]
pub(crate) fn find_request<F: FlowMaps<P>, P>(
    key: &FlowKey<F::Address>,
    found: &mut Known<F::Address>,
) -> bool {
    let place = flow_table::find_request(&Maps::<F, P>::NEW, key);
    read::<F, P>(place, Direction::Request, found)
}

#[inline(always)]
pub(crate) fn find_reply<F: FlowMaps<P>, P>(
    key: &FlowKey<F::Address>,
    found: &mut Known<F::Address>,
) -> bool {
    let place = flow_table::find_reply(&Maps::<F, P>::NEW, key);
    read::<F, P>(place, Direction::Reply, found)
}

#[inline(always)]
pub(crate) fn worst_request<F: FlowMaps<P>, P>(
    new: &NewFlow<F::Address>,
    lifetimes: &Lifetimes,
    choice: u32,
) -> u64 {
    flow_table::worst_request(&Maps::<F, P>::NEW, new, lifetimes, choice)
}

#[inline(always)]
pub(crate) fn has_other<F: FlowMaps<P>, P>(
    direction: u32,
    key: &FlowKey<F::Address>,
    ways: Ways,
    place: u32,
) -> bool {
    let direction = if direction == 0 { Direction::Request } else { Direction::Reply };
    flow_table::has_other(&Maps::<F, P>::NEW, direction, key, ways, place)
}

#[inline(always)]
pub(crate) fn may_have_reply<F: FlowMaps<P>, P>(key: &FlowKey<F::Address>) -> bool {
    flow_table::may_have_reply(&Maps::<F, P>::NEW, key)
}

#[inline(always)]
pub(crate) fn may_have_client<F: FlowMaps<P>, P>(key: &FlowKey<F::Address>) -> bool {
    flow_table::may_have_client(&Maps::<F, P>::NEW, key)
}

#[inline(always)]
fn read<F: FlowMaps<P>, P>(
    place: Option<Found<*mut FlowEntry<F::Address>>>,
    direction: Direction,
    found: &mut Known<F::Address>,
) -> bool {
    let Some(place) = place else { return false };
    // SAFETY: a look-up of this run found the entry.
    unsafe { (*place.entry).read(direction, place.word, &mut found.flow) };
    (found.place, found.word, found.origin) = (place.place, place.word.0, 0);
    flow_table::is_still(&Maps::<F, P>::NEW, &place)
}

#[inline(always)]
pub(crate) fn note<F: FlowMaps<P>, P>(found: &Known<F::Address>, note: u32, time: u32) {
    let Some(entry) = F::entry(found.place) else { return };
    let place = Found { entry, place: found.place, word: RequestWord(found.word) };
    let (clear, set) = ((note >> 8) as u8, note as u8);
    if flow_table::note(&Maps::<F, P>::NEW, &place, clear, set, time) {
        let direction = found.flow.action.is_reply() as usize & 1;
        // SAFETY: a look-up of this run found the entry; one aligned word.
        unsafe { ptr::write_volatile(&raw mut (*entry).next_hops[direction], NextHop::UNKNOWN) };
    }
}

/// `note` in one argument.
#[inline(always)]
pub fn bits(note: Note) -> u32 {
    (note.clear as u32) << 8 | note.set as u32
}

#[inline(always)]
pub(crate) fn remove<F: FlowMaps<P>, P>(found: &Known<F::Address>) {
    let Some(entry) = F::entry(found.place) else { return };
    let place = Found { entry, place: found.place, word: RequestWord(found.word) };
    flow_table::remove(&Maps::<F, P>::NEW, &place);
}

/// The flow has another's request or reply.
pub const EXISTS: i32 = 1;
/// There is no room for the flow.
pub const FULL: i32 = 2;

#[inline(always)]
pub(crate) fn insert<F: FlowMaps<P>, P>(
    key: &FlowKey<F::Address>,
    new: &mut NewFlow<F::Address>,
    settings: &Settings,
) -> i32 {
    let write = |entry: *mut FlowEntry<F::Address>, new: &NewFlow<F::Address>| {
        // SAFETY: a look-up of this run found the entry, and this run has claimed it.
        unsafe { (*entry).write(&key.tuple, &new.flow, new.reply_action) }
    };
    match flow_table::insert(&Maps::<F, P>::NEW, key, new, &settings.flow_lifetimes, write) {
        Ok(()) => count(INSERTED | new.evicted << 1, 0),
        Err(InsertError::Exists) => count(new.evicted << 1, EXISTS),
        Err(InsertError::Full) => count(new.evicted << 1, FULL),
    }
}

/// The bit of an insertion among the events. The bit of an eviction follows for each class.
const INSERTED: u32 = 1;

/// Counts events, one bit for each, and returns `result`.
#[inline(never)]
fn count(mut events: u32, result: i32) -> i32 {
    let mut index = 0;
    while events != 0 && index < flow_table_events() {
        if events & 1 != 0
            && let Some(count) = maps::FLOW_EVENTS.get_ptr_mut(index)
        {
            // SAFETY: this CPU's entry.
            unsafe { *count += 1 };
        }
        events >>= 1;
        index += 1;
    }
    result
}

const fn flow_table_events() -> u32 {
    lb_common::abi::flow_table::EVENTS as u32
}

/// Remembers the next hop of a direction of a flow.
#[inline(always)]
pub fn remember<F: FlowMaps<P>, P>(found: &Known<F::Address>, next_hop: NextHop) {
    if let Some(entry) = F::entry(found.place) {
        let place = Found { entry, place: found.place, word: RequestWord(found.word) };
        let direction = found.flow.action.is_reply() as usize & 1;
        let store = |next_hop| {
            // SAFETY: a look-up of this run found the entry; one aligned word.
            unsafe { ptr::write_volatile(&raw mut (*entry).next_hops[direction], next_hop) };
        };
        if flow_table::is_still(&Maps::<F, P>::NEW, &place) {
            store(next_hop);
            // Another flow may have got the place in between. It looks its route up again.
            if !flow_table::is_still(&Maps::<F, P>::NEW, &place) {
                store(NextHop::UNKNOWN);
            }
        }
    }
}
