//! The table of flows in ordinary memory, for tests: the algorithm is that of the programs.

pub mod invariants;
pub mod numbered;

use std::{array, mem::offset_of, sync::atomic::Ordering::SeqCst};

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, fence};
#[cfg(not(loom))]
use std::sync::atomic::AtomicU64;

use lb_common::{
    abi::{
        address::Address,
        flow::Tuple,
        flow_table::{Direction, FILTER_WORDS, FlowEntry, FlowSeed, REPLY_ROOM, RequestWord, WAYS},
    },
    flow_table::{Memory, request_word},
};

type Words = [AtomicU64; WAYS];
/// An entry word by word, because CPUs read and write it at the same time.
type EntryWords = [AtomicU64; ENTRY_WORDS];
const ENTRY_WORDS: usize = size_of::<FlowEntry<lb_common::abi::address::Address6>>() / 8;

/// A table of flows.
#[derive(Debug)]
pub struct HostTable {
    seed: FlowSeed,
    requests: Vec<Words>,
    replies: Vec<Words>,
    filter: Vec<[AtomicU64; FILTER_WORDS]>,
    entries: Vec<EntryWords>,
}

fn words<const N: usize>() -> [AtomicU64; N] {
    array::from_fn(|_| AtomicU64::new(0))
}

/// A seed with numbers that are always the same, for tables with so many buckets, by family.
pub fn seed(buckets: [u32; 2]) -> FlowSeed {
    numbered_seed(0, buckets)
}

/// The seed with this number: each has other numbers.
pub fn numbered_seed(number: u64, buckets: [u32; 2]) -> FlowSeed {
    let mut seed = FlowSeed { buckets, ..FlowSeed::default() };
    // splitmix64 (Steele, Lea and Flood 2014).
    let mut state = number << 32;
    for factor in &mut seed.factors {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        *factor = mixed ^ (mixed >> 31);
    }
    seed
}

impl HostTable {
    /// An empty table for both families.
    pub fn new(buckets: u32) -> Self {
        let seed = seed([buckets; 2]);
        let empty = |buckets| (0..buckets).map(|_| words()).collect();
        let entries = (0..buckets * WAYS as u32).map(|_| words()).collect();
        let filter = (0..buckets).map(|_| words()).collect();
        let (requests, replies) = (empty(buckets), empty(buckets * REPLY_ROOM));
        Self { seed, requests, replies, filter, entries }
    }

    /// Every flow that is live: its place, its word and its entry.
    pub fn live<A: Address>(&self) -> Vec<(u32, RequestWord, FlowEntry<A>)> {
        let places = 0..self.entries.len() as u32;
        let word = |place| request_word::<A, _>(self, place).unwrap_or_default();
        let flow = |place| (place, word(place), self.entry_at(place));
        places.map(flow).filter(|(_, word, _)| word.is_live()).collect()
    }

    /// How many words of FLOW_REPLIES are in use.
    pub fn reply_words(&self) -> usize {
        self.replies.iter().flatten().filter(|word| word.load(SeqCst) != 0).count()
    }

    /// The entry at a place.
    pub fn entry_at<A: Address>(&self, place: u32) -> FlowEntry<A> {
        let mut entry = FlowEntry::default();
        let words: &mut [u64] = bytemuck::cast_slice_mut(bytemuck::bytes_of_mut(&mut entry));
        for (word, from) in words.iter_mut().zip(&self.entries[place as usize]) {
            *word = from.load(SeqCst);
        }
        entry
    }

    /// Writes an entry.
    pub fn store<A: Address>(&self, place: u32, entry: FlowEntry<A>) {
        let words: &[u64] = bytemuck::cast_slice(bytemuck::bytes_of(&entry));
        for (word, to) in words.iter().zip(&self.entries[place as usize]) {
            to.store(*word, SeqCst);
        }
    }
}

/// A bucket: of which of the two arrays, and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BucketOf(Direction, u32);

impl HostTable {
    fn word(&self, BucketOf(direction, bucket): BucketOf, way: u32) -> &AtomicU64 {
        let buckets = match direction {
            Direction::Request => &self.requests,
            Direction::Reply => &self.replies,
        };
        &buckets[bucket as usize][way as usize % WAYS]
    }
}

impl<A: Address> Memory<A> for HostTable {
    type Bucket = BucketOf;
    type Entry = u32;

    fn seed(&self) -> Option<&FlowSeed> {
        Some(&self.seed)
    }

    fn requests(&self, bucket: u32) -> Option<BucketOf> {
        ((bucket as usize) < self.requests.len()).then_some(BucketOf(Direction::Request, bucket))
    }

    fn replies(&self, bucket: u32) -> Option<BucketOf> {
        ((bucket as usize) < self.replies.len()).then_some(BucketOf(Direction::Reply, bucket))
    }

    fn load(&self, bucket: BucketOf, way: u32) -> u64 {
        self.word(bucket, way).load(SeqCst)
    }

    fn swap(&self, bucket: BucketOf, way: u32, old: u64, new: u64) -> bool {
        // loom orders nothing but fences in one order that all threads agree on.
        #[cfg(loom)]
        fence(SeqCst);
        let is_replaced = self.word(bucket, way).compare_exchange(old, new, SeqCst, SeqCst).is_ok();
        #[cfg(loom)]
        fence(SeqCst);
        is_replaced
    }

    fn filter_word(&self, bucket: u32, word: u32) -> u64 {
        self.filter[bucket as usize][word as usize % FILTER_WORDS].load(SeqCst)
    }

    fn set_filter_bits(&self, bucket: u32, word: u32, bits: u64) {
        #[cfg(loom)]
        fence(SeqCst);
        self.filter[bucket as usize][word as usize % FILTER_WORDS].fetch_or(bits, SeqCst);
        #[cfg(loom)]
        fence(SeqCst);
    }

    fn entry(&self, place: u32) -> Option<u32> {
        ((place as usize) < self.entries.len()).then_some(place)
    }

    fn is_of(&self, entry: u32, direction: Direction, tuple: &Tuple<A>) -> bool {
        self.entry_at::<A>(entry).is_of(direction, tuple)
    }

    fn reply_place(&self, entry: u32) -> u32 {
        self.entries[entry as usize][reply_place_word::<A>()].load(SeqCst) as u32
    }

    fn set_reply_place(&self, entry: u32, place: u32) {
        self.entries[entry as usize][reply_place_word::<A>()].store(place.into(), SeqCst);
    }
}

/// The word of an entry that has its `reply_place`, and nothing else but zeros.
const fn reply_place_word<A: Address>() -> usize {
    const { assert!(cfg!(target_endian = "little")) };
    offset_of!(FlowEntry<A>, reply_place) / 8
}
