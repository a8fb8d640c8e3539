//! The table of flows: how a flow is found, inserted and removed, on many CPUs at once and without a
//! lock. The programs, the agent and the tests run this same code over their own [`Memory`].
//!
//! - A flow is live from one compare-and-swap on its word in FLOW_TABLE to the next: claimed,
//!   ready, live, free. Nobody writes to an entry but the CPU that claimed its word.
//! - Whoever reads an entry compares the word before and after. Each claim changes its generation.
//! - A flow is at home in the bucket of its client's address and port, where both its requests and its
//!   replies look for it. If it is elsewhere, or its replies have another destination than its client, a
//!   word in FLOW_REPLIES refers to its place and generation: the word is void once the flow is gone,
//!   without being touched.
//! - FLOW_FILTER says of nearly every packet that belongs to no flow that it does not, see [`filter`].
//! - No two live flows have the same request, or the same reply: of two CPUs that insert such flows
//!   at the same time exactly one succeeds (see [`insert`]).
//!
//! `docs/flow-table.md` has the proof.

use crate::abi::{
    address::Address,
    affinity::AffinityKey,
    flow::{FlowKey, MOVED, Tuple},
    flow_table::{
        Direction, FlowSeed, MAX_ADDRESS_WORDS, NO_REPLY_PLACE, PERIOD_FACTOR, ReplyWord,
        RequestWord, TAG_SHIFT, TIMES, WAYS,
    },
    frontend::UDP,
    settings::Lifetimes,
};

mod evict;
pub mod filter;
mod insert;

pub use evict::{Class, FREE, NEVER, PROTECTED, class, rank};
pub use insert::{InsertError, NewFlow, Ways, enter_live, has_other, insert, worst_request};

/// The memory that a table is in.
///
/// Words are read and compared-and-swapped in one order that all CPUs agree on.
pub trait Memory<A: Address> {
    /// A bucket of FLOW_TABLE or FLOW_REPLIES.
    type Bucket: Copy;
    /// The entry at a place.
    type Entry: Copy;

    /// The seed of the table.
    fn seed(&self) -> Option<&FlowSeed>;
    /// A bucket of FLOW_TABLE.
    fn requests(&self, bucket: u32) -> Option<Self::Bucket>;
    /// A bucket of FLOW_REPLIES.
    fn replies(&self, bucket: u32) -> Option<Self::Bucket>;
    /// Reads a word; `way` counts modulo [`WAYS`].
    fn load(&self, bucket: Self::Bucket, way: u32) -> u64;
    /// The same in a loop over a bucket, where the compiler knows that the way is in bounds.
    #[inline(always)]
    fn next(&self, bucket: Self::Bucket, way: u32) -> u64 {
        self.load(bucket, way)
    }
    /// Replaces the word `old`, if it is still there.
    fn swap(&self, bucket: Self::Bucket, way: u32, old: u64, new: u64) -> bool;

    /// A word of FLOW_FILTER; `word` counts modulo the words that a bucket has there.
    fn filter_word(&self, bucket: u32, word: u32) -> u64;
    /// Sets bits of that word, in one step.
    fn set_filter_bits(&self, bucket: u32, word: u32, bits: u64);

    /// The entry at a place.
    fn entry(&self, place: u32) -> Option<Self::Entry>;
    /// Has the CPU fetch the entry at a place, which will probably be read.
    #[inline(always)]
    fn prefetch(&self, _place: u32) {}
    /// Whether packets of this direction of the flow arrive as `tuple`.
    fn is_of(&self, entry: Self::Entry, direction: Direction, tuple: &Tuple<A>) -> bool;
    /// Where in FLOW_REPLIES the flow has its word.
    fn reply_place(&self, entry: Self::Entry) -> u32;
    /// Sets where in FLOW_REPLIES the flow has its word.
    fn set_reply_place(&self, entry: Self::Entry, place: u32);

    /// [`worst_request`]. A program has a function for it that a verifier follows once.
    #[inline(always)]
    fn worst_request(&self, new: &NewFlow<A>, lifetimes: &Lifetimes, choice: u32) -> u64
    where
        Self: Sized,
    {
        worst_request(self, new, lifetimes, choice)
    }

    /// [`has_other`], likewise.
    #[inline(always)]
    fn has_other(&self, direction: Direction, key: &FlowKey<A>, ways: Ways, place: u32) -> bool
    where
        Self: Sized,
    {
        has_other(self, direction, key, ways, place)
    }

    /// Returns `value`, of which a verifier then knows nothing: it follows the code after a branch
    /// once, and not once for each way through it.
    #[inline(always)]
    fn forget(&self, _bucket: Self::Bucket, value: u64) -> u64 {
        value
    }
}

/// A flow that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found<E> {
    /// Its entry.
    pub entry: E,
    /// Its place.
    pub place: u32,
    /// Its word when it was found.
    pub word: RequestWord,
}

/// Where a key belongs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Hash {
    /// Of the client's address, port and protocol: where the flow is at home.
    pub home: u32,
    /// Of the whole key.
    pub whole: u32,
}

/// In how many buckets of FLOW_TABLE a flow may be: its client's, or else its own.
pub const CHOICES: usize = 2;

impl Hash {
    /// Where a flow belongs by its requests.
    #[inline(always)]
    pub fn of_request<A: Address>(key: &FlowKey<A>, seed: &FlowSeed) -> Self {
        Self::of(key, Direction::Request, seed)
    }

    /// Where a flow belongs by its replies. Its home is the same, unless they have another destination
    /// than its client.
    #[inline(always)]
    pub fn of_reply<A: Address>(key: &FlowKey<A>, seed: &FlowSeed) -> Self {
        Self::of(key, Direction::Reply, seed)
    }

    /// Two multilinear sums, mixed. The upper half of each sum is strongly universal for factors that
    /// nobody knows (Lemire and Kaser, "Strongly universal string hashing is fast", 2013).
    #[inline(always)]
    fn of<A: Address>(key: &FlowKey<A>, direction: Direction, seed: &FlowSeed) -> Self {
        const { assert!(cfg!(target_endian = "little")) };
        let length = const { size_of::<A>() / size_of::<u32>() };
        let words: &[u32] = bytemuck::cast_slice(bytemuck::bytes_of(key));
        let word = |index: usize| {
            // SAFETY: a reference. Volatile, because the compiler would keep all words on a program's
            // small stack until the key is compared.
            #[expect(unsafe_code, reason = "there are no volatile accesses without it")]
            unsafe {
                core::ptr::read_volatile(&raw const words[index])
            }
        };
        let (source_port, destination_port) = (word(2 * length) & 0xffff, word(2 * length) >> 16);
        let (client, other) = match direction {
            Direction::Request => (0, length),
            Direction::Reply => (length, 0),
        };
        let (client_port, other_port) = match direction {
            Direction::Request => (source_port, destination_port),
            Direction::Reply => (destination_port, source_port),
        };
        let term = |factor: usize, value: u32| seed.factors[factor].wrapping_mul(value.into());
        let mut sum = seed.factors[0].wrapping_add(term(1, client_port | key.protocol << 16));
        let mut index = 0;
        while index < length {
            sum = sum.wrapping_add(term(2 + index, word(client + index)));
            index += 1;
        }
        let home = mixed(sum);
        sum = sum.wrapping_add(term(2 + MAX_ADDRESS_WORDS, other_port));
        index = 0;
        while index < length {
            sum = sum.wrapping_add(term(3 + MAX_ADDRESS_WORDS + index, word(other + index)));
            index += 1;
        }
        Self { home, whole: mixed(sum) }
    }

    /// A bucket of FLOW_TABLE where the flow may be: 0 is its home.
    #[inline(always)]
    pub const fn bucket<A>(self, choice: usize, seed: &FlowSeed) -> u32 {
        scaled(self.part(choice), seed.buckets::<A>())
    }

    /// The bucket of FLOW_REPLIES where the flow has its word, if it has one.
    #[inline(always)]
    pub const fn reply_bucket<A>(self, seed: &FlowSeed) -> u32 {
        scaled(self.whole, seed.reply_buckets::<A>())
    }

    /// Twenty bits that most other flows of that bucket do not have, the lowest always 1: 0 is the tag of a
    /// free word.
    #[inline(always)]
    pub const fn tag(self, choice: usize) -> u64 {
        self.part(choice) as u64 & (u64::MAX >> TAG_SHIFT) | 1
    }

    /// The way of that bucket where the flow is unless another one was there before.
    #[inline(always)]
    pub const fn way(self, choice: usize) -> u32 {
        self.part(choice) >> 1 & (WAYS as u32 - 1)
    }

    #[inline(always)]
    const fn part(self, choice: usize) -> u32 {
        if choice == 0 { self.home } else { self.whole }
    }
}

/// A number below `count`, by the upper bits of `hash`.
#[inline(always)]
const fn scaled(hash: u32, count: u32) -> u32 {
    ((hash as u64 * count as u64) >> 32) as u32
}

/// The upper half of a multilinear sum, mixed (a step of the finalizer of MurmurHash3). Ports and periods
/// that follow one another have sums at one distance: without it they would get into a few buckets, or
/// choose in step, with one seed in a hundred.
#[inline(always)]
const fn mixed(sum: u64) -> u32 {
    ((sum ^ (sum >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd) >> 32) as u32
}

/// A number that looks random, and is always the same for this client and service port in this period.
#[inline(always)]
pub fn spread(key: &AffinityKey, period: u32, seed: &FlowSeed) -> u32 {
    const WORDS: usize = size_of::<AffinityKey>() / size_of::<u32>();
    const { assert!(WORDS < PERIOD_FACTOR) };
    let words: &[u32] = bytemuck::cast_slice(bytemuck::bytes_of(key));
    let mut sum =
        seed.factors[0].wrapping_add(seed.factors[PERIOD_FACTOR].wrapping_mul(period as u64));
    let mut index = 0;
    while index < WORDS {
        sum = sum.wrapping_add(seed.factors[index + 1].wrapping_mul(words[index] as u64));
        index += 1;
    }
    mixed(sum)
}

const _: () = assert!(PERIOD_FACTOR == 3 + 2 * MAX_ADDRESS_WORDS);

/// A bit of a flow's state: it is UDP, not TCP.
pub const IS_UDP: u8 = 64;

/// The bit of the state that says which protocol a flow has.
#[inline(always)]
pub const fn protocol_bit(protocol: u32) -> u8 {
    if protocol == UDP as u32 { IS_UDP } else { 0 }
}

/// The ways whose words have this tag, one bit for each; with the tag 0, those that are free in
/// FLOW_REPLIES. Without a branch: each would be a guess of the CPU, and a path for a verifier.
#[inline(always)]
fn scan<A: Address, M: Memory<A>>(memory: &M, bucket: M::Bucket, tag: u64) -> u64 {
    let mut found = 0;
    let mut way = 0;
    while way < WAYS as u32 {
        let difference = (memory.next(bucket, way) >> TAG_SHIFT) ^ tag;
        found |= (difference.wrapping_sub(1) >> 63) << way;
        way += 1;
    }
    found
}

/// The ways whose words have this tag and are live, in a state whose bits `mask` are `state`. Without a
/// branch, as above.
#[inline(always)]
fn scan_live<A: Address, M: Memory<A>>(
    memory: &M,
    bucket: M::Bucket,
    tag: u64,
    mask: u8,
    state: u8,
) -> u64 {
    let life = RequestWord::LIVE | mask as u64;
    let expected = (tag << TAG_SHIFT) | RequestWord::LIVE | state as u64;
    let mut found = 0;
    let mut way = 0;
    while way < WAYS as u32 {
        let word = memory.next(bucket, way) ^ expected;
        let difference = (word >> TAG_SHIFT) | (word & life);
        found |= (difference.wrapping_sub(1) >> 63) << way;
        way += 1;
    }
    found
}

/// How many words that may be a key's are looked at, but at home. Another one of the bucket has its tag for
/// one in about 5,000 look-ups, two others for one in 50 million, which then do not find their flow.
const CANDIDATES: usize = 2;

/// The first of some ways, of which there is one. Without a branch, as above: the lowest bit alone,
/// times a de Bruijn sequence, has in its upper three bits a number that no other bit has.
#[inline(always)]
const fn first(ways: u64) -> u32 {
    const SEQUENCE: u64 = 0b0001_0111;
    const WAY_BY_NUMBER: u64 = {
        let (mut table, mut way) = (0, 0);
        while way < WAYS as u64 {
            table |= way << (3 * ((SEQUENCE << way & 0xff) >> 5));
            way += 1;
        }
        table
    };
    let bit = ways & ways.wrapping_neg();
    let number = (bit.wrapping_mul(SEQUENCE) & 0xff) >> 5;
    (WAY_BY_NUMBER >> (3 * number)) as u32 & (WAYS as u32 - 1)
}

/// Finds the flow whose requests arrive as `key` says.
#[inline(always)]
pub fn find_request<A: Address, M: Memory<A>>(
    memory: &M,
    key: &FlowKey<A>,
) -> Option<Found<M::Entry>> {
    let hash = Hash::of_request(key, memory.seed()?);
    let mut choice = 0;
    while choice < CHOICES {
        let found = find_in_bucket(memory, key, Direction::Request, hash, choice);
        if found.is_some() {
            return found;
        }
        choice += 1;
    }
    None
}

/// Finds a flow in one of the buckets where it may be.
#[inline(always)]
fn find_in_bucket<A: Address, M: Memory<A>>(
    memory: &M,
    key: &FlowKey<A>,
    direction: Direction,
    hash: Hash,
    choice: usize,
) -> Option<Found<M::Entry>> {
    let number = hash.bucket::<A>(choice, memory.seed()?);
    if choice == 0 {
        // Its word and its entry are in two cache lines: both are fetched at once.
        memory.prefetch(number * WAYS as u32 + hash.way(choice));
    }
    let bucket = memory.requests(number)?;
    let protocol = protocol_bit(key.protocol);
    let mask = direction_mask(direction, protocol);
    let mut ways = scan_live(memory, bucket, hash.tag(choice), mask, protocol);
    // At home all flows of one client's port have one tag.
    let most = if choice == 0 { WAYS } else { CANDIDATES };
    let mut looked_at = 0;
    while ways != 0 && looked_at < most {
        let way = first(ways);
        let word = RequestWord(memory.load(bucket, way));
        let place = number * WAYS as u32 + way;
        let entry = memory.entry(place)?;
        if word.is_live()
            && word.state() & mask == protocol
            && memory.is_of(entry, direction, &key.tuple)
        {
            return Some(Found { entry, place, word });
        }
        ways &= ways - 1;
        looked_at += 1;
    }
    None
}

/// The bits of the state that say whether a flow of this protocol has the packets of this direction of
/// its entry: it has if they are the bit of the protocol alone. The requests of a flow that [`MOVED`]
/// are another's; that bit means something else with TCP.
#[inline(always)]
const fn direction_mask(direction: Direction, protocol: u8) -> u8 {
    match direction {
        Direction::Request if protocol == IS_UDP => IS_UDP | MOVED,
        Direction::Request | Direction::Reply => IS_UDP,
    }
}

/// Finds the flow whose replies arrive as `key` says.
#[inline(always)]
pub fn find_reply<A: Address, M: Memory<A>>(
    memory: &M,
    key: &FlowKey<A>,
) -> Option<Found<M::Entry>> {
    let hash = Hash::of_reply(key, memory.seed()?);
    let filter = filter::read(memory, hash);
    if filter & filter::HOME != 0 {
        let found = find_in_bucket(memory, key, Direction::Reply, hash, 0);
        if found.is_some() {
            return found;
        }
    }
    if filter & filter::AWAY != 0 { find_by_word(memory, key, hash) } else { None }
}

/// Finds a flow by its word in FLOW_REPLIES.
#[inline(always)]
fn find_by_word<A: Address, M: Memory<A>>(
    memory: &M,
    key: &FlowKey<A>,
    hash: Hash,
) -> Option<Found<M::Entry>> {
    let bucket = memory.replies(hash.reply_bucket::<A>(memory.seed()?))?;
    let udp = protocol_bit(key.protocol);
    let mut ways = scan(memory, bucket, hash.tag(1));
    let mut candidate = 0;
    while ways != 0 && candidate < CANDIDATES {
        let reply = ReplyWord(memory.load(bucket, first(ways)));
        let place = reply.place();
        let word = request_word(memory, place)?;
        let entry = memory.entry(place)?;
        if reply.is_of(word)
            && word.is_live()
            && word.state() & IS_UDP == udp
            && memory.is_of(entry, Direction::Reply, &key.tuple)
        {
            return Some(Found { entry, place, word });
        }
        ways &= ways - 1;
        candidate += 1;
    }
    None
}

/// Whether a flow may have these replies. Where the answer is no, none has; it is cheaper than to find
/// the flow.
#[inline(always)]
pub fn may_have_reply<A: Address, M: Memory<A>>(memory: &M, key: &FlowKey<A>) -> bool {
    let Some(seed) = memory.seed() else { return true };
    let hash = Hash::of_reply(key, seed);
    let filter = filter::read(memory, hash);
    if filter & filter::HOME != 0
        && find_in_bucket(memory, key, Direction::Reply, hash, 0).is_some()
    {
        return true;
    }
    let bucket = || memory.replies(hash.reply_bucket::<A>(seed));
    filter & filter::AWAY != 0
        && bucket().is_none_or(|bucket| scan(memory, bucket, hash.tag(1)) != 0)
}

/// Whether a flow may have the client of `key`, a request. Where the answer is no, none has.
#[inline(always)]
pub fn may_have_client<A: Address, M: Memory<A>>(memory: &M, key: &FlowKey<A>) -> bool {
    let Some(seed) = memory.seed() else { return true };
    filter::read(memory, Hash::of_request(key, seed)) & filter::HOME != 0
}

/// The word of the place `place`.
#[inline(always)]
pub fn request_word<A: Address, M: Memory<A>>(memory: &M, place: u32) -> Option<RequestWord> {
    let bucket = memory.requests(place / WAYS as u32)?;
    Some(RequestWord(memory.load(bucket, place)))
}

/// Whether the flow is still the one that was found. What was read from its entry before is then
/// the flow's.
#[inline(always)]
pub fn is_still<A: Address, M: Memory<A>>(memory: &M, found: &Found<M::Entry>) -> bool {
    let now = request_word(memory, found.place);
    now.is_some_and(|now| now.is_live() && found.word.is_same_flow(now))
}

/// Notes a packet of the flow: clears some bits of its state, sets others, and sets the time when it
/// was last seen. Returns false if the flow is gone.
#[inline(always)]
pub fn note<A: Address, M: Memory<A>>(
    memory: &M,
    found: &Found<M::Entry>,
    clear: u8,
    set: u8,
    time: u32,
) -> bool {
    let Some(bucket) = memory.requests(found.place / WAYS as u32) else { return false };
    let mut attempt = 0;
    // Another CPU may note a packet at the same time.
    while attempt < 4 {
        let word = RequestWord(memory.load(bucket, found.place));
        if !word.is_live() || !found.word.is_same_flow(word) {
            return false;
        }
        let new = word.live(word.state() & !clear | set, time);
        if memory.swap(bucket, found.place, word.0, new.0) {
            return true;
        }
        attempt += 1;
    }
    false
}

/// Removes a flow, if it is still the one that was found. Returns whether it was.
#[inline(always)]
pub fn remove<A: Address, M: Memory<A>>(memory: &M, found: &Found<M::Entry>) -> bool {
    let Some(bucket) = memory.requests(found.place / WAYS as u32) else { return false };
    let reply_place = memory.reply_place(found.entry);
    let mut attempt = 0;
    while attempt < 4 {
        let word = RequestWord(memory.load(bucket, found.place));
        if !word.is_live() || !found.word.is_same_flow(word) {
            return false;
        }
        if memory.swap(bucket, found.place, word.0, word.freed().0) {
            clear_reply(memory, word, found.place, reply_place);
            return true;
        }
        attempt += 1;
    }
    false
}

/// Frees the word in FLOW_REPLIES of the flow with this word, which is gone, if it had one.
#[inline(always)]
pub fn clear_reply<A: Address, M: Memory<A>>(
    memory: &M,
    word: RequestWord,
    place: u32,
    reply_place: u32,
) {
    if reply_place == NO_REPLY_PLACE {
        return;
    }
    let Some(bucket) = memory.replies(reply_place / WAYS as u32) else { return };
    let reply = ReplyWord(memory.load(bucket, reply_place));
    if reply.is_of(word) && reply.place() == place {
        memory.swap(bucket, reply_place, reply.0, 0);
    }
}

/// How long ago `time` was, in the unit of times. A time of another CPU may be ahead by a little: it
/// counts as now.
#[inline(always)]
pub const fn age(time: u32, now: u32) -> u32 {
    let age = now.wrapping_sub(time) & (TIMES - 1);
    // Without a branch, see `rank`.
    age & (age / (TIMES / 2)).wrapping_sub(1)
}
