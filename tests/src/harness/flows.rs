//! The table of flows in the maps of a loaded object, which nothing has pinned.

use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use lb_agent::maps::flow_table::{FlowAddress, Flows, SEED, first_word};
use lb_common::abi::address::{Address4, Address6};
use lb_common::abi::flow::Tuple;
use lb_common::abi::flow_table::{
    Bucket, Direction, FlowBucket, FlowEntry, FlowSeed, PERIOD_FACTOR, REPLY_ROOM, RequestWord,
    WAYS,
};
use lb_common::flow_table::{Memory, request_word};
use lb_sys::{SharedArray, TypedMap};
use lb_testing::flow_table::invariants::ReadEntries;
use lb_testing::flow_table::seed;

/// The sizes of the maps of a table with so many places, a multiple of [`WAYS`], by family.
pub fn sizes([ipv4, ipv6]: [u32; 2]) -> [(&'static str, u32); 4] {
    let buckets = |places| places / WAYS as u32;
    [
        (Address4::TABLE, buckets(ipv4)),
        (Address4::REPLIES, REPLY_ROOM * buckets(ipv4)),
        (Address6::TABLE, buckets(ipv6)),
        (Address6::REPLIES, REPLY_ROOM * buckets(ipv6)),
    ]
}

/// Writes the seed of a table with so many places, by family. `descriptor` gives the descriptor of a
/// map.
///
/// # Errors
/// No such map, or the kernel refuses.
pub fn write_seed(
    descriptor: impl FnOnce(&str) -> Result<OwnedFd>,
    places: [u32; 2],
) -> Result<()> {
    let map: TypedMap<u32, FlowSeed> = TypedMap::new(descriptor(SEED)?)?;
    let seed = seed(places.map(|places| places / WAYS as u32));
    map.set(&0, &seed).context("cannot write the seed of the flows")
}

/// Has clients with affinity choose anew, as if their Services' timeouts had passed. Flows stay.
///
/// # Errors
/// The kernel refuses.
pub fn begin_period(seed: &TypedMap<u32, FlowSeed>) -> Result<()> {
    let mut changed = seed.get(&0)?.context("the seed of the flows is not there")?;
    let factor = &mut changed.factors[PERIOD_FACTOR];
    // An odd constant: the golden ratio of 2^64.
    *factor = factor.wrapping_add(0x9e37_79b9_7f4a_7c15);
    seed.set(&0, &changed).context("cannot write the seed of the flows")
}

/// A family's table.
#[derive(Debug)]
pub struct KernelFlows<A> {
    seed: FlowSeed,
    table: SharedArray,
    replies: SharedArray,
    address: PhantomData<fn(A)>,
}

impl<A: FlowAddress> KernelFlows<A> {
    /// Maps a table whose seed is written. `descriptor` gives the descriptor of a map.
    ///
    /// # Errors
    /// No such map, or one of another layout.
    pub fn open(descriptor: impl Fn(&str) -> Result<OwnedFd>) -> Result<Self> {
        let seed: TypedMap<u32, FlowSeed> = TypedMap::new(descriptor(SEED)?)?;
        let array = |name, size| {
            SharedArray::new(descriptor(name)?.as_fd(), size, true)
                .with_context(|| format!("cannot map {name}"))
        };
        Ok(Self {
            seed: seed.get(&0)?.context("the seed of the flows is not there")?,
            table: array(A::TABLE, size_of::<FlowBucket<A>>())?,
            replies: array(A::REPLIES, size_of::<Bucket>())?,
            address: PhantomData,
        })
    }

    /// Forgets all flows. No program may run meanwhile.
    pub fn clear(&self) {
        for array in [&self.table, &self.replies] {
            for bucket in 0..array.entries() {
                (0..WAYS).for_each(|way| assert!(array.store(bucket, way, 0), "it is in bounds"));
            }
        }
    }

    /// Makes all flows older, in the unit of their times.
    pub fn age(&self, times: u32) {
        for place in 0..self.places() {
            let word = request_word(self, place).unwrap_or_default();
            let older = word.live(word.state(), word.time().wrapping_sub(times));
            if let (true, Some(bucket)) = (word.is_live(), self.requests(place / WAYS as u32)) {
                assert!(self.swap(bucket, place, word.0, older.0), "no program runs");
            }
        }
    }

    fn array(&self, direction: Direction) -> &SharedArray {
        match direction {
            Direction::Request => &self.table,
            Direction::Reply => &self.replies,
        }
    }
}

impl<A: FlowAddress> Memory<A> for KernelFlows<A> {
    type Bucket = (Direction, u32);
    type Entry = u32;

    fn seed(&self) -> Option<&FlowSeed> {
        Some(&self.seed)
    }

    fn requests(&self, bucket: u32) -> Option<Self::Bucket> {
        (bucket < self.table.entries()).then_some((Direction::Request, bucket))
    }

    fn replies(&self, bucket: u32) -> Option<Self::Bucket> {
        (bucket < self.replies.entries()).then_some((Direction::Reply, bucket))
    }

    fn load(&self, (direction, bucket): Self::Bucket, way: u32) -> u64 {
        let word = self.array(direction).load(bucket, way as usize % WAYS);
        word.expect("the bucket is in bounds")
    }

    fn swap(&self, (direction, bucket): Self::Bucket, way: u32, old: u64, new: u64) -> bool {
        self.array(direction).compare_and_swap(bucket, way as usize % WAYS, old, new)
    }

    fn entry(&self, place: u32) -> Option<u32> {
        (place < self.places()).then_some(place)
    }

    fn is_of(&self, place: u32, direction: Direction, tuple: &Tuple<A>) -> bool {
        self.copy_of(place).is_of(direction, tuple)
    }

    fn reply_place(&self, place: u32) -> u32 {
        self.copy_of(place).reply_place
    }

    fn set_reply_place(&self, place: u32, reply_place: u32) {
        Flows::write(self, place, &FlowEntry { reply_place, ..self.copy_of(place) });
    }
}

impl<A: FlowAddress> Flows<A> for KernelFlows<A> {
    fn places(&self) -> u32 {
        self.table.entries() * WAYS as u32
    }

    fn copied(&self, place: u32) -> Option<FlowEntry<A>> {
        let mut entry = FlowEntry::default();
        let words = bytemuck::cast_slice_mut(bytemuck::bytes_of_mut(&mut entry));
        self.table.copy(place / WAYS as u32, first_word::<A>(place), words).then_some(entry)
    }

    fn write(&self, place: u32, entry: &FlowEntry<A>) {
        let words = bytemuck::cast_slice(bytemuck::bytes_of(entry));
        let is_inside = self.table.fill(place / WAYS as u32, first_word::<A>(place), words);
        assert!(is_inside, "the place is in bounds");
    }
}

impl<A: FlowAddress> ReadEntries<A> for KernelFlows<A> {
    fn copy_of(&self, place: u32) -> FlowEntry<A> {
        self.copied(place).expect("the place is in bounds")
    }
}

/// The flows of a table: their entries and their words.
pub fn entries<A: FlowAddress>(table: &KernelFlows<A>) -> Vec<(FlowEntry<A>, RequestWord)> {
    table.live().map(|flow| (flow.entry, flow.word)).collect()
}
