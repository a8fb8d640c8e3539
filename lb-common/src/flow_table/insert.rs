//! The insertion of a flow.

use crate::abi::{
    address::Address,
    flow::{Action, Flow, FlowKey, MOVED},
    flow_table::{Direction, ReplyWord, RequestWord, WAYS},
    settings::Lifetimes,
};

use super::{
    CANDIDATES, CHOICES, Class, Hash, IS_UDP, Memory, clear_reply,
    evict::{is_free, least_rank, rank},
    first, has_requests, protocol_bit, request_word, scan, scan_live,
};

/// Why a flow could not be inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InsertError {
    /// Another flow has its request or its reply.
    Exists,
    /// All flows of its bucket are established, and none was idle for long.
    Full,
}

/// A flow to insert, and what the insertion holds. It is one argument so that the programs, whose
/// stack is small, can keep it in a map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct NewFlow<A> {
    /// The request direction of the flow.
    pub flow: Flow<A>,
    /// A reply as it arrives.
    pub reply_key: FlowKey<A>,
    /// The action of replies; [`Action::default()`] if none pass this node.
    pub reply_action: Action,
    /// How long an established flow must be idle before it may be evicted, in the unit of times.
    pub protected: u32,
    /// The classes of the flows that made room for it, one bit for each, by number; those that were
    /// expired are not in it.
    pub evicted: u32,
    place: u32,
    word: RequestWord,
    reply_place: u32,
    /// Always 0.
    zero: u32,
    requests: Hash,
    replies: Hash,
}

/// Inserts a flow, whose entry `write` fills in.
///
/// The steps are: claim a word of FLOW_TABLE; write the entry; store the word of FLOW_REPLIES;
/// make the word ready; look for another flow with the same request or reply; become live. The words
/// are visible before the search, so of two CPUs that insert at the same time at least one sees the
/// other, and a flow that is ready but not live can be stopped by the other: see [`stops`]. From
/// then on the place may be another flow's, so nothing is written to the entry of a flow that is
/// ready.
///
/// # Errors
/// [`InsertError`]: nothing was inserted.
#[inline(always)]
pub fn insert<A: Address, M: Memory<A>>(
    memory: &M,
    key: &FlowKey<A>,
    new: &mut NewFlow<A>,
    lifetimes: &Lifetimes,
    write: impl FnOnce(M::Entry, &NewFlow<A>),
) -> Result<(), InsertError> {
    let seed = memory.seed().ok_or(InsertError::Full)?;
    new.requests = Hash::of_request(key, seed);
    new.evicted = 0;
    let has_replies = new.reply_action.action != 0;
    if has_replies {
        new.replies = Hash::of_reply(&new.reply_key, seed);
        if let Some(bucket) = memory.replies(new.replies.buckets[0]) {
            memory.prefetch_words(bucket);
        }
    }
    if !take_word(memory, new, lifetimes) {
        return Err(InsertError::Full);
    }
    let requests = memory.requests(new.place / WAYS as u32).ok_or(InsertError::Full)?;
    let entry = memory.entry(new.place).ok_or(InsertError::Full)?;
    write(entry, new);
    let (claimed, ready) = (new.word, new.word.ready());
    if has_replies && !refer(memory, new, lifetimes) {
        memory.swap(requests, new.place, claimed.0, claimed.freed().0);
        return Err(InsertError::Full);
    }
    let live = ready.live(new.flow.state | protocol_bit(key.protocol), new.flow.last_seen);
    if memory.swap(requests, new.place, claimed.0, ready.0)
        && !(has_replies && has_other_reply(memory, new))
        && !has_other_request(memory, key, new)
        && memory.swap(requests, new.place, ready.0, live.0)
    {
        return Ok(());
    }
    memory.swap(requests, new.place, ready.0, ready.freed().0);
    if has_replies {
        clear_reply(memory, ready, new.place, new.reply_place);
    }
    Err(InsertError::Exists)
}

/// How often a word is chosen anew because another CPU changed it.
const ATTEMPTS: u32 = 2;

/// Claims the word of the flow that is evicted first, in the first bucket if that has room. Returns
/// false if none may be.
#[inline(never)]
fn take_word<A: Address, M: Memory<A>>(
    memory: &M,
    new: &mut NewFlow<A>,
    lifetimes: &Lifetimes,
) -> bool {
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        let mut worst = memory.worst_request(new, lifetimes, 0);
        let mut number = new.requests.buckets[0];
        if !is_free(rank_of(worst)) {
            let other = memory.worst_request(new, lifetimes, 1);
            if rank_of(other) > rank_of(worst) {
                worst = other;
                number = new.requests.buckets[1];
            }
        }
        let Some(bucket) = memory.requests(number) else { return false };
        let (number, worst) =
            (memory.forget(bucket, number as u64) as u32, memory.forget(bucket, worst));
        if worst < ranked(least_rank(new.protected), 0) {
            return false;
        }
        let way = way_of(worst, new.requests.way());
        let place = number * WAYS as u32 + way;
        let Some(entry) = memory.entry(place) else { return false };
        let old = RequestWord(memory.load(bucket, way));
        let reply_place = memory.reply_place(entry);
        let word = old.claimed(new.requests.tag);
        let is_unchanged = rank(old, new.flow.last_seen, lifetimes) == rank_of(worst);
        if is_unchanged && memory.swap(bucket, way, old.0, word.0) {
            if old.is_live() {
                clear_reply(memory, old, place, reply_place);
                new.evicted = evicted_bit(rank_of(worst));
            }
            (new.place, new.word) = (place, word);
            return true;
        }
        attempt += 1;
    }
    false
}

/// The way of a bucket of FLOW_TABLE whose flow is evicted first, as [`ranked`] has it. Of ways that
/// are evicted alike it is the flow's own, where a look-up expects it.
#[inline(always)]
pub fn worst_request<A: Address, M: Memory<A>>(
    memory: &M,
    new: &NewFlow<A>,
    lifetimes: &Lifetimes,
    choice: u32,
) -> u64 {
    let Some(bucket) = memory.requests(new.requests.buckets[choice as usize & 1]) else { return 0 };
    let own = new.requests.way();
    let mut worst = 0;
    let mut way = 0;
    while way < WAYS as u32 {
        let rank = rank(RequestWord(memory.next(bucket, way)), new.flow.last_seen, lifetimes);
        let other = ranked(rank, way ^ own ^ (WAYS as u32 - 1));
        worst = memory.forget(bucket, core::cmp::max(worst, other));
        way += 1;
    }
    worst
}

/// The way in what [`worst_request`] returns.
#[inline(always)]
const fn way_of(worst: u64, own: u32) -> u32 {
    (worst as u32 ^ own ^ (WAYS as u32 - 1)) & (WAYS as u32 - 1)
}

/// A rank and a way in one number.
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

/// Stores the word in FLOW_REPLIES of a flow whose word is claimed, in the place of the one that is
/// evicted first. Returns false if none may be.
#[inline(never)]
fn refer<A: Address, M: Memory<A>>(
    memory: &M,
    new: &mut NewFlow<A>,
    lifetimes: &Lifetimes,
) -> bool {
    let Some(bucket) = memory.replies(new.replies.buckets[0]) else { return false };
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        let free = scan(memory, bucket, 0);
        let mut worst = ranked(VOID, first(free));
        if free == 0 {
            worst = worst_reply(memory, new, lifetimes, bucket);
            if worst < ranked(least_rank(new.protected), 0) {
                return false;
            }
        }
        let way = worst as u32 & (WAYS as u32 - 1);
        let old = ReplyWord(memory.load(bucket, way));
        if evict(memory, new, lifetimes, old, rank_of(worst)) {
            new.reply_place = new.replies.buckets[0] * WAYS as u32 + way;
            let Some(entry) = memory.entry(new.place) else { return false };
            memory.set_reply_place(entry, new.reply_place);
            let word = new.word.reply(new.replies.tag, new.place);
            if memory.swap(bucket, way, old.0, word.0) {
                return true;
            }
        }
        attempt += 1;
    }
    false
}

/// The rank of a word of FLOW_REPLIES that refers to no flow.
const VOID: u32 = u32::MAX;

/// The way of the bucket whose flow is evicted first, as [`ranked`] has it. A word whose flow is gone
/// counts as free.
#[inline(always)]
fn worst_reply<A: Address, M: Memory<A>>(
    memory: &M,
    new: &NewFlow<A>,
    lifetimes: &Lifetimes,
    bucket: M::Bucket,
) -> u64 {
    let mut worst = 0;
    let mut way = 0;
    while way < WAYS as u32 {
        let reply = ReplyWord(memory.next(bucket, way));
        let word = request_word(memory, reply.place()).unwrap_or_default();
        let is_void = !reply.is_of(word);
        let rank = if is_void { VOID } else { rank(word, new.flow.last_seen, lifetimes) };
        worst = memory.forget(bucket, core::cmp::max(worst, ranked(rank, way)));
        way += 1;
    }
    worst
}

/// Ends the flow that a word of FLOW_REPLIES refers to, if there is one. Returns false if its rank is
/// not `expected` any more: it is another flow, or has had a packet.
#[inline(always)]
fn evict<A: Address, M: Memory<A>>(
    memory: &M,
    new: &mut NewFlow<A>,
    lifetimes: &Lifetimes,
    reply: ReplyWord,
    expected: u32,
) -> bool {
    let place = reply.place();
    let Some(bucket) = memory.requests(place / WAYS as u32) else { return false };
    let word = RequestWord(memory.load(bucket, place));
    if !reply.is_of(word) {
        return true;
    }
    let rank = rank(word, new.flow.last_seen, lifetimes);
    if rank != expected || !memory.swap(bucket, place, word.0, word.freed().0) {
        return false;
    }
    new.evicted |= evicted_bit(rank);
    true
}

/// Whether another flow with this request is live, or becomes so before this one.
#[inline(never)]
fn has_other_request<A: Address, M: Memory<A>>(
    memory: &M,
    key: &FlowKey<A>,
    new: &NewFlow<A>,
) -> bool {
    let Hash { buckets, tag } = new.requests;
    let mut is_found = 0;
    let mut choice = 0;
    while choice < CHOICES {
        let number = buckets[choice];
        let Some(bucket) = memory.requests(number) else { return true };
        // Those that have moved have other requests by now.
        let moved = scan_live(memory, bucket, tag, IS_UDP | MOVED, IS_UDP | MOVED);
        let mut ways = scan(memory, bucket, tag) & !moved;
        let mut candidate = 0;
        // One of the candidates is the flow itself.
        while ways != 0 && candidate < CANDIDATES + 1 {
            let other = number * WAYS as u32 + first(ways);
            let is_other = memory.is_other(Direction::Request, key, other, new.place);
            is_found |= memory.forget(bucket, is_other as u64);
            ways &= ways - 1;
            candidate += 1;
        }
        // More CPUs insert such flows than are looked at.
        is_found |= ways;
        choice += 1;
    }
    is_found != 0
}

/// Whether another flow with this reply is live, or becomes so before this one.
#[inline(never)]
fn has_other_reply<A: Address, M: Memory<A>>(memory: &M, new: &NewFlow<A>) -> bool {
    let Hash { buckets: [bucket, _], tag } = new.replies;
    let Some(words) = memory.replies(bucket) else { return true };
    let mut ways = scan(memory, words, tag);
    let mut is_found = 0;
    let mut candidate = 0;
    while ways != 0 && candidate < CANDIDATES + 1 {
        let reply = ReplyWord(memory.load(words, first(ways)));
        is_found |= memory.forget(words, is_other_reply(memory, new, reply) as u64);
        ways &= ways - 1;
        candidate += 1;
    }
    is_found | ways != 0
}

#[inline(never)]
fn is_other_reply<A: Address, M: Memory<A>>(
    memory: &M,
    new: &NewFlow<A>,
    reply: ReplyWord,
) -> bool {
    let other = reply.place();
    let word = request_word(memory, other).unwrap_or_default();
    reply.is_of(word) && memory.is_other(Direction::Reply, &new.reply_key, other, new.place)
}

/// Whether the flow at `other` is another one with this key, which the one at `place` cannot stop.
#[inline(always)]
pub fn is_other<A: Address, M: Memory<A>>(
    memory: &M,
    direction: Direction,
    key: &FlowKey<A>,
    other: u32,
    place: u32,
) -> bool {
    other != place
        && memory.entry(other).is_some_and(|entry| memory.is_of(entry, direction, &key.tuple))
        && !stops(memory, direction, key, other, place)
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
    let mut attempt = 0;
    // It may become live, or end by itself, just before it is stopped.
    while attempt < 2 {
        let word = RequestWord(memory.load(bucket, other));
        if word.is_live() {
            let protocol = protocol_bit(key.protocol);
            return match direction {
                Direction::Request => !has_requests(word.state(), protocol),
                Direction::Reply => word.state() & IS_UDP != protocol,
            };
        }
        // One that is still being written will find this one.
        if !word.is_ready() {
            return true;
        }
        if place > other {
            return false;
        }
        if memory.swap(bucket, other, word.0, word.freed().0) {
            return true;
        }
        attempt += 1;
    }
    false
}
