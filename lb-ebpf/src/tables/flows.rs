//! The table of flows in the kernel's maps.

use core::ptr;

use lb_common::{
    abi::{
        address::{Address4, Address6, Family, Ipv4, Ipv6},
        flow::{FlowKey, NextHop, Tuple},
        flow_table::{Bucket, Direction, FlowEntry, FlowSeed, RequestWord, WAYS},
        settings::Settings,
    },
    balance::{InsertError, Known, Note, Search},
    flow_table::{self, Found, Memory, NewFlow},
};

use crate::maps;

/// The maps of this agent, as a type parameter.
pub struct Own;

/// The maps of a family's flows, of this agent or of another one.
pub trait FlowMaps<P = Own>: Family {
    /// FLOW_SEED.
    fn seed() -> Option<&'static FlowSeed>;
    /// A bucket of FLOW_REQUESTS.
    fn requests(bucket: u32) -> Option<*mut Bucket>;
    /// A bucket of FLOW_REPLIES.
    fn replies(bucket: u32) -> Option<*mut Bucket>;
    /// An entry of FLOW_ENTRIES.
    fn entry(place: u32) -> Option<*mut FlowEntry<Self::Address>>;
}

/// Implements [`FlowMaps`] over some maps.
macro_rules! flow_maps {
    ($of:ty, $family:ty, $address:ty, $seed:path, $requests:path, $replies:path, $entries:path) => {
        impl FlowMaps<$of> for $family {
            #[inline(always)]
            fn seed() -> Option<&'static FlowSeed> {
                $seed.get(0)
            }

            #[inline(always)]
            fn requests(bucket: u32) -> Option<*mut Bucket> {
                $requests.get_ptr_mut(bucket)
            }

            #[inline(always)]
            fn replies(bucket: u32) -> Option<*mut Bucket> {
                $replies.get_ptr_mut(bucket)
            }

            #[inline(always)]
            fn entry(place: u32) -> Option<*mut FlowEntry<$address>> {
                $entries.get_ptr_mut(place)
            }
        }
    };
}

#[cfg(feature = "handover")]
pub(crate) use flow_maps;

use maps::{
    FLOW_ENTRIES4, FLOW_ENTRIES6, FLOW_REPLIES4, FLOW_REPLIES6, FLOW_REQUESTS4, FLOW_REQUESTS6,
    FLOW_SEED,
};

flow_maps!(Own, Ipv4, Address4, FLOW_SEED, FLOW_REQUESTS4, FLOW_REPLIES4, FLOW_ENTRIES4);
flow_maps!(Own, Ipv6, Address6, FLOW_SEED, FLOW_REQUESTS6, FLOW_REPLIES6, FLOW_ENTRIES6);

/// A family's maps.
struct Maps<F, P>(core::marker::PhantomData<(F, P)>);

impl<F: FlowMaps<P>, P> Maps<F, P> {
    const NEW: Self = Self(core::marker::PhantomData);
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
    fn entry(&self, place: u32) -> Option<Self::Entry> {
        F::entry(place)
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
    fn forget(&self, bucket: *mut Bucket, value: u64) -> u64 {
        forget(Memory::<F::Address>::next(self, bucket, 0), value)
    }
}

/// Whether requests of the flow arrive as `tuple`. A function of its own, because in the loop over
/// candidates the compiler would keep the whole tuple on the stack.
#[inline(never)]
fn is_request<F: Family>(entry: *mut FlowEntry<F::Address>, tuple: &Tuple<F::Address>) -> bool {
    // SAFETY: a look-up of this run found the entry. What another CPU writes meanwhile is noticed by
    // the word.
    unsafe { (*entry).is_of(Direction::Request, tuple) }
}

/// Whether replies of the flow arrive as `tuple`.
#[inline(never)]
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
unsafe fn compare_and_swap(place: *mut u64, old: u64, new: u64) -> bool {
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

/// The word of a way, which counts modulo [`WAYS`].
#[cfg(target_arch = "bpf")]
#[inline(always)]
fn word(bucket: *mut Bucket, way: u32) -> *mut u64 {
    let mut way = u64::from(way);
    // Where the compiler knows that the way is in bounds, it would leave this out, but the verifier
    // may not know.
    // SAFETY: arithmetic.
    unsafe { core::arch::asm!("{way} &= {mask}", way = inout(reg) way, mask = const WAYS - 1) };
    bucket.cast::<u64>().wrapping_add(way as usize)
}

/// For clippy, which compiles the programs for the host.
#[cfg(not(target_arch = "bpf"))]
unsafe fn compare_and_swap(place: *mut u64, old: u64, new: u64) -> bool {
    // SAFETY: the caller's.
    let word = unsafe { core::sync::atomic::AtomicU64::from_ptr(place) };
    let order = core::sync::atomic::Ordering::SeqCst;
    word.compare_exchange(old, new, order, order).is_ok()
}

#[cfg(not(target_arch = "bpf"))]
fn word(bucket: *mut Bucket, way: u32) -> *mut u64 {
    bucket.cast::<u64>().wrapping_add(way as usize % WAYS)
}

#[cfg(not(target_arch = "bpf"))]
fn forget(_any: u64, value: u64) -> u64 {
    value
}

/// Looks a flow up. Each direction is a function of its own, so that the verifier follows it once for
/// each call and not together with what comes after.
#[inline(always)]
pub fn find<F: FlowMaps<P>, P>(
    key: &FlowKey<F::Address>,
    search: Search,
    found: &mut Known<F::Address>,
) -> bool {
    let is_reply_first = matches!(search, Search::RepliesFirst);
    (search.has_requests() && !is_reply_first && find_request::<F, P>(key, found))
        || (search.has_replies() && find_reply::<F, P>(key, found))
        || (is_reply_first && find_request::<F, P>(key, found))
}

/// Whether a flow may have these replies.
#[inline(never)]
pub fn may_have_reply<F: FlowMaps<P>, P>(key: &FlowKey<F::Address>) -> bool {
    flow_table::may_have_reply(&Maps::<F, P>::NEW, key)
}

#[inline(never)]
fn find_request<F: FlowMaps<P>, P>(key: &FlowKey<F::Address>, found: &mut Known<F::Address>) -> bool {
    let place = flow_table::find_request(&Maps::<F, P>::NEW, key);
    read::<F, P>(place, Direction::Request, found)
}

#[inline(never)]
fn find_reply<F: FlowMaps<P>, P>(key: &FlowKey<F::Address>, found: &mut Known<F::Address>) -> bool {
    let place = flow_table::find_reply(&Maps::<F, P>::NEW, key);
    read::<F, P>(place, Direction::Reply, found)
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

/// Notes a packet of a flow.
#[inline(never)]
pub fn note<F: FlowMaps<P>, P>(found: &Known<F::Address>, note: u32, time: u32) {
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

/// Removes a flow.
#[inline(never)]
pub fn remove<F: FlowMaps<P>, P>(found: &Known<F::Address>) {
    let Some(entry) = F::entry(found.place) else { return };
    let place = Found { entry, place: found.place, word: RequestWord(found.word) };
    flow_table::remove(&Maps::<F, P>::NEW, &place);
}

/// The flow has another's request or reply.
pub const EXISTS: i32 = 1;
/// There is no room for the flow.
pub const FULL: i32 = 2;

/// Inserts a flow. Returns 0, [`EXISTS`] or [`FULL`].
#[inline(never)]
pub fn insert<F: FlowMaps<P>, P>(
    key: &FlowKey<F::Address>,
    new: &mut NewFlow<F::Address>,
    settings: &Settings,
) -> i32 {
    let write = |entry: *mut FlowEntry<F::Address>, new: &NewFlow<F::Address>| {
        // SAFETY: a look-up of this run found the entry, and this run has claimed it.
        unsafe { (*entry).write(&key.tuple, &new.flow, new.reply_action) }
    };
    match flow_table::insert(&Maps::<F, P>::NEW, key, new, &settings.lifetimes, write) {
        Ok(()) => {
            count(new.evicted);
            0
        }
        Err(InsertError::Exists) => EXISTS,
        Err(InsertError::Full) => FULL,
    }
}

/// Counts an insertion, and the classes of the flows that made room for it.
#[inline(never)]
fn count(evicted: u32) {
    let mut events = 1 | evicted << 1;
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
        if flow_table::is_still(&Maps::<F, P>::NEW, &place) {
            // SAFETY: a look-up of this run found the entry; one aligned word.
            unsafe { ptr::write_volatile(&raw mut (*entry).next_hops[direction], next_hop) };
        }
    }
}
