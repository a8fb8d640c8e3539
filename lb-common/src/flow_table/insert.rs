//! The insertion of a flow.

use crate::abi::{
    address::Address,
    flow::FlowKey,
    flow_table::{Direction, ReplyWord, RequestWord, TAG_SHIFT, WAYS},
    settings::Lifetimes,
};

use super::{
    CANDIDATES, Class, Hash, IS_UDP, Memory, clear_reply,
    evict::{least_rank, rank},
    has_requests, protocol_bit, request_word, scan,
};

/// Why a flow could not be inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InsertError {
    /// Another flow has its request or its reply.
    Exists,
    /// All flows of its bucket are established, and none was idle for long.
    Full,
}

/// A flow that was inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inserted {
    /// Its place.
    pub place: u32,
    /// Its word.
    pub word: RequestWord,
    /// The classes of flows that made room for it, one bit for each, by number; those that were
    /// expired are not in it.
    pub evicted: u32,
}

/// A flow to insert.
pub struct NewFlow<'a, A> {
    /// A request as it arrives.
    pub key: &'a FlowKey<A>,
    /// A reply as it arrives; `None` if no replies pass this node.
    pub reply: Option<&'a FlowKey<A>>,
    /// Its state.
    pub state: u8,
    /// Now, in the unit of times.
    pub now: u32,
    /// The lifetimes of flows.
    pub lifetimes: &'a Lifetimes,
    /// How long an established flow must be idle before it may be evicted, in the unit of times.
    pub protected: u32,
}

/// Inserts a flow, whose entry `write` fills in.
///
/// The steps are: claim a word of FLOW_REQUESTS; write the entry; make the word ready; store the
/// word of FLOW_REPLIES; look for another flow with the same request or reply; become live. The
/// words are visible before the search, so of two CPUs that insert at the same time at least one
/// sees the other, and a flow that is ready but not live can be stopped by the other: see
/// [`yields`].
///
/// # Errors
/// [`InsertError`]: nothing was inserted.
#[inline(always)]
pub fn insert<A: Address, M: Memory<A>>(
    memory: &M,
    flow: &NewFlow<A>,
    write: impl FnOnce(M::Entry),
) -> Result<Inserted, InsertError> {
    let seed = memory.seed().ok_or(InsertError::Full)?;
    let hash = Hash::of(flow.key, seed);
    let requests = memory.requests(hash.bucket).ok_or(InsertError::Full)?;
    let claim = claim(memory, flow, requests, hash).ok_or(InsertError::Full)?;
    let entry = memory.entry(claim.place).ok_or(InsertError::Full)?;
    write(entry);
    let ready = claim.word.ready();
    let free = || memory.swap(requests, claim.place, ready.0, ready.freed().0);
    if !memory.swap(requests, claim.place, claim.word.0, ready.0) {
        return Err(InsertError::Full);
    }
    let mut evicted = claim.evicted;
    if let Some(reply) = flow.reply {
        let reply_hash = Hash::of(reply, seed);
        let Some(more) = refer(memory, flow, reply_hash, ready, claim.place, entry) else {
            free();
            return Err(InsertError::Full);
        };
        evicted |= more;
        if has_other_reply(memory, reply, reply_hash, claim.place) {
            free();
            clear_reply(memory, ready, claim.place, memory.reply_place(entry));
            return Err(InsertError::Exists);
        }
    }
    let live = ready.live(flow.state | protocol_bit(flow.key.protocol), flow.now);
    if has_other_request(memory, flow.key, requests, hash, claim.place)
        || !memory.swap(requests, claim.place, ready.0, live.0)
    {
        free();
        if flow.reply.is_some() {
            clear_reply(memory, ready, claim.place, memory.reply_place(entry));
        }
        return Err(InsertError::Exists);
    }
    Ok(Inserted { place: claim.place, word: live, evicted })
}

/// How often a word is chosen anew because another CPU changed it.
const ATTEMPTS: u32 = 4;

/// Claims the word of the flow in the bucket that is evicted first.
#[inline(always)]
fn claim<A: Address, M: Memory<A>>(
    memory: &M,
    flow: &NewFlow<A>,
    bucket: M::Bucket,
    hash: Hash,
) -> Option<Inserted> {
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        let mut worst = 0;
        let mut way = 0;
        while way < WAYS as u32 {
            let rank = rank(RequestWord(memory.load(bucket, way)), flow.now, flow.lifetimes);
            worst = core::cmp::max(worst, ranked(rank, way));
            way += 1;
        }
        if worst < ranked(least_rank(flow.protected), 0) {
            return None;
        }
        let way = worst as u32 & (WAYS as u32 - 1);
        let place = hash.bucket * WAYS as u32 + way;
        let old = RequestWord(memory.load(bucket, way));
        let reply_place = memory.reply_place(memory.entry(place)?);
        let word = old.claimed(hash.tag);
        let is_unchanged = rank(old, flow.now, flow.lifetimes) == rank_of(worst);
        if is_unchanged && memory.swap(bucket, way, old.0, word.0) {
            let mut evicted = 0;
            if old.is_live() {
                clear_reply(memory, old, place, reply_place);
                evicted = evicted_bit(rank_of(worst));
            }
            return Some(Inserted { place, word, evicted });
        }
        attempt += 1;
    }
    None
}

/// A rank and a way in one number, so that the greatest of them is found without a branch.
#[inline(always)]
const fn ranked(rank: u32, way: u32) -> u64 {
    ((rank as u64) << 8) | way as u64
}

#[inline(always)]
const fn rank_of(ranked: u64) -> u32 {
    (ranked >> 8) as u32
}

/// The bit of the class of an evicted flow with this rank; 0 if it was expired.
#[inline(always)]
const fn evicted_bit(rank: u32) -> u32 {
    const CLASSES: u32 = (1 << Class::ALL.len()) - 1;
    (1 << ((rank >> 24).wrapping_sub(1) & 31)) & CLASSES
}

/// Stores the word in FLOW_REPLIES of a flow that is ready, in the place of the one that is evicted
/// first. Returns the classes of flows that made room; `None` if there is no room.
#[inline(always)]
fn refer<A: Address, M: Memory<A>>(
    memory: &M,
    flow: &NewFlow<A>,
    hash: Hash,
    ready: RequestWord,
    place: u32,
    entry: M::Entry,
) -> Option<u32> {
    let bucket = memory.replies(hash.bucket)?;
    let word = ready.reply(hash.tag, place);
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        let (mut old, mut evicted) = (0, 0);
        let mut way = scan(memory, bucket, 0, u64::MAX, 0);
        if way >= WAYS as u32 {
            let worst = worst_reply(memory, flow, bucket);
            if worst < ranked(least_rank(flow.protected), 0) {
                return None;
            }
            way = worst as u32 & (WAYS as u32 - 1);
            old = memory.load(bucket, way);
            evicted = match evict(memory, flow, ReplyWord(old)) {
                Some(evicted) => evicted,
                None => {
                    attempt += 1;
                    continue;
                }
            };
        }
        memory.set_reply_place(entry, hash.bucket * WAYS as u32 + way);
        if memory.swap(bucket, way, old, word.0) {
            return Some(evicted);
        }
        attempt += 1;
    }
    None
}

/// The way of the bucket whose flow is evicted first, as [`ranked`] has it. A word whose flow is gone
/// counts as free.
#[inline(always)]
fn worst_reply<A: Address, M: Memory<A>>(
    memory: &M,
    flow: &NewFlow<A>,
    bucket: M::Bucket,
) -> u64 {
    let mut worst = 0;
    let mut way = 0;
    while way < WAYS as u32 {
        let reply = ReplyWord(memory.load(bucket, way));
        if let Some(word) = request_word(memory, reply.place()) {
            let is_void = !reply.is_of(word);
            let rank = if is_void { u32::MAX } else { rank(word, flow.now, flow.lifetimes) };
            worst = core::cmp::max(worst, ranked(rank, way));
        }
        way += 1;
    }
    worst
}

/// Ends the flow that a word of FLOW_REPLIES refers to. Returns the bit of its class, 0 if it was
/// gone or expired; `None` if it must stay.
#[inline(always)]
fn evict<A: Address, M: Memory<A>>(
    memory: &M,
    flow: &NewFlow<A>,
    reply: ReplyWord,
) -> Option<u32> {
    let place = reply.place();
    let bucket = memory.requests(place / WAYS as u32)?;
    let word = RequestWord(memory.load(bucket, place));
    if !reply.is_of(word) {
        return Some(0);
    }
    let rank = rank(word, flow.now, flow.lifetimes);
    if rank < least_rank(flow.protected)
        || !memory.swap(bucket, place, word.0, word.freed().0)
    {
        return None;
    }
    Some(evicted_bit(rank))
}

/// Whether another flow with this request is live, or becomes so before this one, which is at
/// `place`.
#[inline(always)]
fn has_other_request<A: Address, M: Memory<A>>(
    memory: &M,
    key: &FlowKey<A>,
    bucket: M::Bucket,
    hash: Hash,
    place: u32,
) -> bool {
    let (mask, wanted) = (u64::MAX << TAG_SHIFT, hash.tag << TAG_SHIFT);
    let mut way = 0;
    let mut candidate = 0;
    // One of the candidates is the flow itself.
    while candidate < CANDIDATES + 1 {
        way = scan(memory, bucket, way, mask, wanted);
        if way >= WAYS as u32 {
            return false;
        }
        let other = hash.bucket * WAYS as u32 + way;
        if other != place
            && let Some(entry) = memory.entry(other)
            && memory.is_of(entry, Direction::Request, &key.tuple)
            && !stops(memory, Direction::Request, key, other, place)
        {
            return true;
        }
        way += 1;
        candidate += 1;
    }
    false
}

/// Whether another flow with this reply is live, or becomes so before this one, which is at `place`.
#[inline(always)]
fn has_other_reply<A: Address, M: Memory<A>>(
    memory: &M,
    key: &FlowKey<A>,
    hash: Hash,
    place: u32,
) -> bool {
    let Some(bucket) = memory.replies(hash.bucket) else { return true };
    let (mask, wanted) = (u64::MAX << TAG_SHIFT, hash.tag << TAG_SHIFT);
    let mut way = 0;
    let mut candidate = 0;
    while candidate < CANDIDATES + 1 {
        way = scan(memory, bucket, way, mask, wanted);
        if way >= WAYS as u32 {
            return false;
        }
        let reply = ReplyWord(memory.load(bucket, way));
        let other = reply.place();
        if other != place
            && let Some(word) = request_word(memory, other)
            && reply.is_of(word)
            && let Some(entry) = memory.entry(other)
            && memory.is_of(entry, Direction::Reply, &key.tuple)
            && !stops(memory, Direction::Reply, key, other, place)
        {
            return true;
        }
        way += 1;
        candidate += 1;
    }
    false
}

/// Whether the flow at `place` goes on although the one at `other` has the same request or reply: of
/// two that are both ready the one at the lower place does, and ends the other.
#[inline(always)]
fn stops<A: Address, M: Memory<A>>(
    memory: &M,
    direction: Direction,
    key: &FlowKey<A>,
    other: u32,
    place: u32,
) -> bool {
    let Some(bucket) = memory.requests(other / WAYS as u32) else { return true };
    let word = RequestWord(memory.load(bucket, other));
    if word.is_live() {
        let protocol = protocol_bit(key.protocol);
        return match direction {
            Direction::Request => !has_requests(word.state(), protocol),
            Direction::Reply => word.state() & IS_UDP != protocol,
        };
    }
    // One that is still being written will find this one.
    !word.is_ready() || place < other && memory.swap(bucket, other, word.0, word.freed().0)
}
