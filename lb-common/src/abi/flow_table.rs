//! FLOW_TABLE4 and 6, FLOW_REPLIES4 and 6, FLOW_FILTER4 and 6, FLOW_SEED: the table of flows.
//!
//! Every flow has one entry, at the place that its word in FLOW_TABLE has: bucket times
//! [`WAYS`] plus way. Where replies would not find it there, a word in FLOW_REPLIES refers to the
//! place. `docs/flow-table.md` describes the whole; [`flow_table`](crate::flow_table) has the algorithm.

use bytemuck::{Pod, Zeroable};

use super::{
    flow::{Action, Flow, NextHop, STATES, Tuple},
    ip::{Address, Address4, Address6, pod},
};

/// The words of a bucket, which fill a cache line.
pub const WAYS: usize = 8;

/// A bucket of FLOW_REPLIES, and the words of a [`FlowBucket`]. They change by compare-and-swap alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Bucket {
    /// [`RequestWord`]s or [`ReplyWord`]s.
    pub words: [u64; WAYS],
}

/// A word of FLOW_TABLE: whether there is a flow, whose it is, and its life.
///
/// From the lowest bit: 7 bits of state, 1 that says that the flow is live, 24 bits of time, 12 of
/// generation, 20 of tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct RequestWord(pub u64);

/// A word of FLOW_REPLIES: 32 bits of place, 12 of generation, 20 of tag. 0 = free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplyWord(pub u64);

const TIME_SHIFT: u32 = 8;
const GENERATION_SHIFT: u32 = 32;
/// Where a tag begins in a word of either kind.
pub const TAG_SHIFT: u32 = 44;
const GENERATION: u64 = 0xfff << GENERATION_SHIFT;

/// The times in a word count modulo this. Their unit is between 50 and 80 ms, see
/// [`Settings::time_shift`](super::settings::Settings::time_shift), so half of it is more than five
/// days.
pub const TIMES: u32 = 1 << 24;

impl RequestWord {
    /// The flow is live: it can be found.
    pub const LIVE: u64 = 1 << 7;
    /// All bits of the state.
    pub const STATE: u64 = 0x7f;
    /// The bits that say whether there is a flow, and its state.
    pub const LIFE: u64 = 0xff;
    /// The lowest byte of a word that a program has claimed: it is writing the entry.
    const CLAIMED: u64 = 1;
    /// The same, once the entry is written. Whether the flow becomes live is not decided.
    const READY: u64 = 2;

    /// The word as it is claimed for a new flow with this tag in the place of `self`.
    #[inline(always)]
    pub const fn claimed(self, tag: u64) -> Self {
        let mut generation = self.0.wrapping_add(1 << GENERATION_SHIFT) & GENERATION;
        if generation == 0 {
            generation = 1 << GENERATION_SHIFT;
        }
        Self((tag << TAG_SHIFT) | generation | Self::CLAIMED)
    }

    /// The claimed word once its entry is written.
    #[inline(always)]
    pub const fn ready(self) -> Self {
        Self(self.0 & !0xff | Self::READY)
    }

    /// The word of the flow as it is live, in `state`, last seen at `time`.
    #[inline(always)]
    pub const fn live(self, state: u8, time: u32) -> Self {
        let life = state as u64 & Self::STATE | ((time & (TIMES - 1)) as u64) << TIME_SHIFT;
        Self(self.identity() | life | Self::LIVE)
    }

    /// The word once the flow is gone. The generation stays, so that the next flow here has another.
    #[inline(always)]
    pub const fn freed(self) -> Self {
        Self(self.0 & GENERATION)
    }

    /// Whether the word belongs to no flow.
    #[inline(always)]
    pub const fn is_free(self) -> bool {
        self.0 & 0xff == 0
    }

    /// Whether the flow is live.
    #[inline(always)]
    pub const fn is_live(self) -> bool {
        self.0 & Self::LIVE != 0
    }

    /// Whether the entry is written, but the flow is not live yet.
    #[inline(always)]
    pub const fn is_ready(self) -> bool {
        self.0 & 0xff == Self::READY
    }

    /// The state of the flow.
    #[inline(always)]
    pub const fn state(self) -> u8 {
        (self.0 & Self::STATE) as u8
    }

    /// When a packet of the flow was last noted.
    #[inline(always)]
    pub const fn time(self) -> u32 {
        (self.0 >> TIME_SHIFT) as u32 & (TIMES - 1)
    }

    /// Tag and generation: what stays the same for as long as a flow is here.
    #[inline(always)]
    pub const fn identity(self) -> u64 {
        self.0 >> GENERATION_SHIFT << GENERATION_SHIFT
    }

    /// Whether `other` is a word of the same flow.
    #[inline(always)]
    pub const fn is_same_flow(self, other: Self) -> bool {
        (self.0 ^ other.0) >> GENERATION_SHIFT == 0 && !other.is_free()
    }

    /// The word of FLOW_REPLIES that refers to this flow, which is at `place`.
    #[inline(always)]
    pub const fn reply(self, tag: u64, place: u32) -> ReplyWord {
        ReplyWord((tag << TAG_SHIFT) | (self.0 & GENERATION) | place as u64)
    }
}

impl ReplyWord {
    /// The place of the flow.
    #[inline(always)]
    pub const fn place(self) -> u32 {
        self.0 as u32
    }

    /// Whether it refers to the flow with this word, whose tag is another.
    #[inline(always)]
    pub const fn is_of(self, request: RequestWord) -> bool {
        (self.0 ^ request.0) & GENERATION == 0 && !request.is_free()
    }
}

/// The two directions of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Direction {
    /// From the client.
    Request,
    /// From the backend.
    Reply,
}

/// A flow. Both of its directions are here; its state and time are in its [`RequestWord`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FlowEntry<A> {
    /// A request as it arrives.
    pub request: Tuple<A>,
    /// A request once it is translated: a reply as it arrives is its reverse.
    pub translated: Tuple<A>,
    /// Index into BACKENDS4 or BACKENDS6.
    pub backend: u32,
    /// Index into SERVICES.
    pub service: u32,
    /// Index into DEVICES of the egress device of a flow of a node process, or
    /// [`LOOPBACK_DEVICE`](super::flow::LOOPBACK_DEVICE).
    pub device: u32,
    /// The backend's generation when the flow chose it.
    pub generation: u16,
    /// How requests and replies are sent on, by [`Direction`].
    pub actions: [Action; 2],
    /// The next hops of requests and replies that the program forwards, if it has looked up the
    /// routes, by [`Direction`].
    pub next_hops: [NextHop; 2],
    /// Where in FLOW_REPLIES the flow has its word: bucket times [`WAYS`] plus way, or
    /// [`NO_REPLY_PLACE`].
    pub reply_place: u32,
    /// Always 0.
    pub zero: u32,
}

/// A bucket of FLOW_TABLE. The entries are next to their words, because memory is fetched by lines but
/// found by pages, and most of both is in no cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct FlowBucket<A> {
    /// [`RequestWord`]s.
    pub words: Bucket,
    /// The flow of each word.
    pub entries: [FlowEntry<A>; WAYS],
}

pod! {
    FlowBucket<A> { Bucket, [FlowEntry<A>; WAYS] }
    FlowEntry<A> { Tuple<A>, Tuple<A>, u32, u32, u32, u16, [Action; 2], [NextHop; 2], u32, u32 }
}
const _: () = assert!(
    size_of::<FlowEntry<Address4>>() == 64
        && size_of::<FlowEntry<Address6>>() == 112
        && size_of::<Bucket>() == 64
        && size_of::<FlowBucket<Address6>>() == 64 + WAYS * 112
);

impl<A: Address> FlowEntry<A> {
    /// Whether packets of this direction arrive as `tuple`.
    #[inline(always)]
    pub fn is_of(&self, direction: Direction, tuple: &Tuple<A>) -> bool {
        match direction {
            Direction::Request => self.request.is(tuple),
            Direction::Reply => self.translated.is_reverse_of(tuple),
        }
    }

    /// Copies a direction of the flow, whose word is `word`.
    #[inline(always)]
    pub fn read(&self, direction: Direction, word: RequestWord, into: &mut Flow<A>) {
        match direction {
            Direction::Request => into.rewrite.set(&self.translated),
            Direction::Reply => into.rewrite.set_reverse(&self.request),
        }
        let index = direction as usize & 1;
        into.action = self.actions[index];
        into.state = word.state() & (STATES as u8 - 1);
        into.generation = self.generation;
        into.backend = self.backend;
        into.service = self.service;
        into.last_seen = word.time();
        into.device = self.device;
        into.next_hop = self.next_hops[index];
    }

    /// Becomes a new flow, whose requests arrive as `request` and whose request direction is `flow`.
    /// It has no word in FLOW_REPLIES yet.
    #[inline(always)]
    pub fn write(&mut self, request: &Tuple<A>, flow: &Flow<A>, reply_action: Action) {
        self.request.set(request);
        self.translated.set(&flow.rewrite);
        self.backend = flow.backend;
        self.service = flow.service;
        self.device = flow.device;
        self.generation = flow.generation;
        self.actions = [flow.action, reply_action];
        self.next_hops = [NextHop::UNKNOWN; 2];
        self.reply_place = NO_REPLY_PLACE;
        self.zero = 0;
    }
}

/// [`FlowEntry::reply_place`] of a flow that has no word in FLOW_REPLIES.
pub const NO_REPLY_PLACE: u32 = u32::MAX;

/// How many words of FLOW_REPLIES there are for a place: every flow of a node may need one. A reply
/// belongs into one bucket, so with half as many flows as places one bucket in 1,000 is full then, and to
/// find the flow that makes room takes a look at the word of each.
pub const REPLY_ROOM: u32 = 2;

/// The words of a bucket in FLOW_FILTER: 64 cells of two bits, twice.
pub const FILTER_WORDS: usize = 4;

/// An element of FLOW_FILTER: the cells of the clients that are at home in a bucket, see
/// [`flow_table::filter`](crate::flow_table::filter).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(32))]
pub struct FlowFilter {
    /// Sixteen cells each.
    pub words: [u64; FILTER_WORDS],
}

/// Words of 32 bits in the longest address.
pub const MAX_ADDRESS_WORDS: usize = size_of::<Address6>() / size_of::<u32>();

/// How many random factors hashes need: a first one, one for each port, one for each word of two
/// addresses, and [`PERIOD_FACTOR`].
pub const FACTORS: usize = 4 + 2 * MAX_ADDRESS_WORDS;

/// The factor of the period in which a client with affinity chooses. No flow's place depends on it.
pub const PERIOD_FACTOR: usize = FACTORS - 1;

/// The one entry of FLOW_SEED. It lasts as long as the table, which cannot be searched without it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct FlowSeed {
    /// Random numbers that nobody else knows, so that nobody can choose the bucket of a flow.
    pub factors: [u64; FACTORS],
    /// The number of buckets of FLOW_TABLE4 and of FLOW_TABLE6. FLOW_REPLIES have
    /// [`REPLY_ROOM`] times as many.
    pub buckets: [u32; 2],
    /// Which copy of the bits of FLOW_FILTER4 and of FLOW_FILTER6 is in use, 0 or 1. Written by the
    /// agent's sweep.
    pub filters: [u32; 2],
}

impl FlowSeed {
    /// The number of buckets of the family with addresses of type `A`.
    #[inline(always)]
    pub const fn buckets<A>(&self) -> u32 {
        self.buckets[const { family::<A>() }]
    }

    /// Which copy of that family's filter is in use.
    #[inline(always)]
    pub fn filter<A>(&self) -> u32 {
        // SAFETY: a reference. Volatile, because the agent may change it at any time.
        #[expect(unsafe_code, reason = "there are no volatile accesses without it")]
        unsafe {
            core::ptr::read_volatile(&raw const self.filters[const { family::<A>() }])
        }
    }

    /// The number of buckets of FLOW_REPLIES of that family.
    #[inline(always)]
    pub const fn reply_buckets<A>(&self) -> u32 {
        self.buckets::<A>().wrapping_mul(REPLY_ROOM)
    }
}

/// The number of the family with addresses of type `A`: 0 is IPv4.
pub const fn family<A>() -> usize {
    (size_of::<A>() > size_of::<Address4>()) as usize
}

/// The number of entries of FLOW_EVENTS: flows that were inserted, then those that were evicted, one
/// entry for each [`Class`](crate::flow_table::Class).
pub const EVENTS: usize = 6;
