//! How much memory the maps take. The kernel charges it to the cgroup of the agent that makes them.
//!
//! It counts what the kernel allocates for each type of map, and is right to a few per cent: a test
//! compares it with the kernel's own count.

use std::fmt;

use aya_obj::generated::{
    BPF_F_NO_PREALLOC,
    bpf_map_type::{
        BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_LPM_TRIE, BPF_MAP_TYPE_LRU_HASH,
        BPF_MAP_TYPE_LRU_PERCPU_HASH, BPF_MAP_TYPE_PERCPU_ARRAY, BPF_MAP_TYPE_SK_STORAGE,
    },
};

use super::pins::{PinnedMap, possible_cpus};

/// What every entry of a hash map has beside its key and value.
const HASH_ENTRY: u64 = 48;
/// A bucket of a hash map.
const BUCKET: u64 = 16;
/// What a node of a trie has beside its key and value.
const TRIE_NODE: u64 = 40;
/// A pointer to the memory of each CPU.
const POINTER: u64 = 8;

/// The memory of maps, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// What is allocated when they are made.
    pub fixed: u64,
    /// What is allocated besides when all entries are used.
    pub growing: u64,
}

impl Memory {
    /// That of all `maps`.
    pub fn of(maps: &[PinnedMap]) -> Self {
        maps.iter().map(Self::of_one).fold(Self::default(), |sum, one| Self {
            fixed: sum.fixed + one.fixed,
            growing: sum.growing + one.growing,
        })
    }

    /// That of one map.
    pub fn of_one(map: &PinnedMap) -> Self {
        let entries = u64::from(map.max_entries);
        let cpus = u64::from(possible_cpus());
        let round = |bytes: u32| u64::from(bytes).next_multiple_of(8);
        let (key, value) = (round(map.layout.key_size), round(map.layout.value_size));
        let buckets = entries.next_power_of_two() * BUCKET;
        let is = |kind| map.layout.map_type == kind as u32;
        let (fixed, entry) = if is(BPF_MAP_TYPE_HASH) || is(BPF_MAP_TYPE_LRU_HASH) {
            (buckets, HASH_ENTRY + key + value)
        } else if is(BPF_MAP_TYPE_LRU_PERCPU_HASH) {
            (buckets, HASH_ENTRY + key + POINTER + value * cpus)
        } else if is(BPF_MAP_TYPE_PERCPU_ARRAY) {
            (0, POINTER + value * cpus)
        } else if is(BPF_MAP_TYPE_LPM_TRIE) {
            // A node with an entry needs at most one without.
            (0, 2 * TRIE_NODE + 2 * u64::from(map.layout.key_size) + value)
        } else if is(BPF_MAP_TYPE_SK_STORAGE) {
            // Belongs to the sockets.
            (0, 0)
        } else {
            (0, value)
        };
        match map.layout.flags & BPF_F_NO_PREALLOC {
            0 => Self { fixed: fixed + entry * entries, growing: 0 },
            _ => Self { fixed, growing: entry * entries },
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mebibytes = |bytes: u64| bytes.div_ceil(1 << 20);
        let (fixed, growing) = (mebibytes(self.fixed), mebibytes(self.growing));
        write!(formatter, "{fixed} MiB, up to {growing} MiB more with every entry in use")
    }
}
