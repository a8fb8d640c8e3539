//! The insertion of a flow.

use crate::abi::{
    address::Address,
    flow::{Action, Flow, FlowKey, MOVED},
    flow_table::{Direction, NO_REPLY_PLACE, ReplyWord, RequestWord, WAYS},
    settings::Lifetimes,
};

use super::{
    CANDIDATES, Class, Hash, IS_UDP, Memory, clear_reply, direction_mask,
    evict::{class_of, has_flow_to_keep, least_rank, rank},
    filter, first, protocol_bit, request_word, scan, scan_live,
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
    /// In which of its buckets it is, see [`Hash::bucket`].
    choice: u32,
    requests: Hash,
    replies: Hash,
}

/// Inserts a flow, whose entry `write` fills in.
///
/// The steps are: claim a word of FLOW_TABLE; write the entry; set the bits of the filter; store the word
/// of FLOW_REPLIES, if the flow needs one; make the word ready; look for another flow with the same
/// request or reply; become live. All of it is visible before the search, so of two CPUs that insert at
/// the same time at least one sees the other, and a flow that is ready but not live can be stopped by the
/// other: see [`stops`]. From then on the place may be another flow's, so nothing is written to the entry
/// of a flow that is ready.
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
    new.replies =
        if has_replies(new) { Hash::of_reply(&new.reply_key, seed) } else { new.requests };
    (new.evicted, new.reply_place) = (0, NO_REPLY_PLACE);
    if !take_word(memory, new, lifetimes) || !fill(memory, new, lifetimes, write) {
        return Err(InsertError::Full);
    }
    if make_ready(memory, key, new)
        && !(may_be_found(memory, new, filter::AWAY) && has_other_word(memory, new))
        && make_live(memory, key, new)
    {
        return Ok(());
    }
    give_up(memory, new);
    Err(InsertError::Exists)
}

/// Writes the entry of a flow whose word is claimed, and makes it known to its replies. Returns false if
/// there is no room for its word in FLOW_REPLIES.
#[inline(never)]
fn fill<A: Address, M: Memory<A>>(
    memory: &M,
    new: &mut NewFlow<A>,
    lifetimes: &Lifetimes,
    write: impl FnOnce(M::Entry, &NewFlow<A>),
) -> bool {
    let Some(entry) = memory.entry(new.place) else { return false };
    write(entry, new);
    enter(memory, new);
    if !is_away(new) || refer(memory, new, lifetimes) {
        return true;
    }
    if let Some(requests) = memory.requests(new.place / WAYS as u32) {
        memory.swap(requests, new.place, new.word.0, new.word.freed().0);
    }
    false
}

/// Makes the word ready: from now on others see the flow that insert one like it. Returns false if there is
/// one like it in the buckets of FLOW_TABLE where it may be.
#[inline(never)]
fn make_ready<A: Address, M: Memory<A>>(memory: &M, key: &FlowKey<A>, new: &NewFlow<A>) -> bool {
    let (place, claimed) = (new.place, new.word);
    let bucket = memory.requests(place / WAYS as u32);
    if bucket.is_none_or(|bucket| !memory.swap(bucket, place, claimed.0, claimed.ready().0)) {
        return false;
    }
    let has_other = has_other_request(memory, key, new, 0)
        || has_other_request(memory, key, new, 1)
        || may_be_found(memory, new, filter::HOME) && has_other_at_home(memory, new);
    !has_other
}

/// Returns false if another one has ended the flow.
#[inline(always)]
fn make_live<A: Address, M: Memory<A>>(memory: &M, key: &FlowKey<A>, new: &NewFlow<A>) -> bool {
    let (place, ready) = (new.place, new.word.ready());
    let live = ready.live(new.flow.state | protocol_bit(key.protocol), new.flow.last_seen);
    let bucket = memory.requests(place / WAYS as u32);
    if bucket.is_none_or(|bucket| !memory.swap(bucket, place, ready.0, live.0)) {
        return false;
    }
    enter(memory, new);
    true
}

/// Frees the words of a flow that is ready and does not become live.
#[inline(never)]
fn give_up<A: Address, M: Memory<A>>(memory: &M, new: &NewFlow<A>) {
    let (place, ready) = (new.place, new.word.ready());
    if let Some(bucket) = memory.requests(place / WAYS as u32) {
        memory.swap(bucket, place, ready.0, ready.freed().0);
    }
    clear_reply(memory, ready, place, new.reply_place);
}

/// Whether replies of the flow pass this node.
#[inline(always)]
const fn has_replies<A>(new: &NewFlow<A>) -> bool {
    new.reply_action.action != 0
}

/// Whether the flow has replies that would not find it at their home.
#[inline(always)]
const fn is_away<A>(new: &NewFlow<A>) -> bool {
    has_replies(new) && (new.choice != 0 || new.replies.home != new.requests.home)
}

/// Sets the flow's bits in the filter, which is for replies: who looks for requests looks into the table.
#[inline(always)]
fn enter<A: Address, M: Memory<A>>(memory: &M, new: &NewFlow<A>) {
    if !has_replies(new) {
        return;
    }
    filter::enter(memory, new.requests, filter::HOME);
    if is_away(new) {
        filter::enter(memory, new.replies, filter::AWAY);
    }
}

/// Sets the bits of a live flow in the filter, for the agent, whose sweep makes it anew.
pub fn enter_live<A: Address, M: Memory<A>>(
    memory: &M,
    request: &FlowKey<A>,
    reply: &FlowKey<A>,
    reply_place: u32,
) {
    let Some(seed) = memory.seed() else { return };
    filter::enter(memory, Hash::of_request(request, seed), filter::HOME);
    if reply_place != NO_REPLY_PLACE {
        filter::enter(memory, Hash::of_reply(reply, seed), filter::AWAY);
    }
}

/// How often a word is chosen anew because another CPU changed it.
const ATTEMPTS: u32 = 2;

/// Claims the word of the flow that is evicted first: at home, unless the other bucket has one of a
/// later class. Returns false if none may be.
#[inline(never)]
fn take_word<A: Address, M: Memory<A>>(
    memory: &M,
    new: &mut NewFlow<A>,
    lifetimes: &Lifetimes,
) -> bool {
    let Some(seed) = memory.seed() else { return false };
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        let mut worst = memory.worst_request(new, lifetimes, 0);
        let mut choice = 0;
        if has_flow_to_keep(rank_of(worst)) {
            let other = memory.worst_request(new, lifetimes, 1);
            if class_of(rank_of(other)) > class_of(rank_of(worst)) {
                worst = other;
                choice = 1;
            }
        }
        let number = new.requests.bucket::<A>(choice, seed);
        let Some(bucket) = memory.requests(number) else { return false };
        let (choice, worst) =
            (memory.forget(bucket, choice as u64) as usize, memory.forget(bucket, worst));
        if worst < ranked(least_rank(new.protected), 0) {
            return false;
        }
        let way = way_of(worst, new.requests.way(choice));
        let place = number * WAYS as u32 + way;
        let Some(entry) = memory.entry(place) else { return false };
        let old = RequestWord(memory.load(bucket, way));
        let reply_place = memory.reply_place(entry);
        let word = old.claimed(new.requests.tag(choice));
        let is_unchanged = rank(old, new.flow.last_seen, lifetimes) == rank_of(worst);
        if is_unchanged && memory.swap(bucket, way, old.0, word.0) {
            if old.is_live() {
                clear_reply(memory, old, place, reply_place);
                new.evicted = evicted_bit(rank_of(worst));
            }
            (new.place, new.word, new.choice) = (place, word, choice as u32);
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
    let choice = choice as usize & 1;
    let Some(seed) = memory.seed() else { return 0 };
    let Some(bucket) = memory.requests(new.requests.bucket::<A>(choice, seed)) else { return 0 };
    let own = new.requests.way(choice);
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
    let Some(seed) = memory.seed() else { return false };
    let number = new.replies.reply_bucket::<A>(seed);
    let Some(bucket) = memory.replies(number) else { return false };
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
            new.reply_place = number * WAYS as u32 + way;
            let Some(entry) = memory.entry(new.place) else { return false };
            memory.set_reply_place(entry, new.reply_place);
            let word = new.word.reply(new.replies.tag(1), new.place);
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

/// Whether another flow with this request is live, or becomes so before this one, in one of its buckets.
#[inline(always)]
fn has_other_request<A: Address, M: Memory<A>>(
    memory: &M,
    key: &FlowKey<A>,
    new: &NewFlow<A>,
    choice: usize,
) -> bool {
    let Some(seed) = memory.seed() else { return true };
    let number = new.requests.bucket::<A>(choice, seed);
    let Some(bucket) = memory.requests(number) else { return true };
    let tag = new.requests.tag(choice);
    let ways = without_own(scan(memory, bucket, tag), number, new.place);
    if ways == 0 {
        return false;
    }
    // Those that have moved have other requests by now.
    let moved = scan_live(memory, bucket, tag, IS_UDP | MOVED, IS_UDP | MOVED);
    let ways = Ways { bucket: number, ways: (ways & !moved) as u32 };
    memory.has_other(Direction::Request, key, ways, new.place)
}

/// Whether another flow with this reply is live, or becomes so before this one, in the bucket where replies
/// look first.
#[inline(always)]
fn has_other_at_home<A: Address, M: Memory<A>>(memory: &M, new: &NewFlow<A>) -> bool {
    let Some(seed) = memory.seed() else { return true };
    let number = new.replies.bucket::<A>(0, seed);
    let Some(bucket) = memory.requests(number) else { return true };
    let ways = without_own(scan(memory, bucket, new.replies.tag(0)), number, new.place);
    let ways = Ways { bucket: number, ways: ways as u32 };
    ways.ways != 0 && memory.has_other(Direction::Reply, &new.reply_key, ways, new.place)
}

/// Some ways of a bucket, without the one at `place`, if that is in it.
#[inline(always)]
const fn without_own(ways: u64, bucket: u32, place: u32) -> u64 {
    let is_own = (place / WAYS as u32 == bucket) as u64;
    ways & !(is_own << (place % WAYS as u32))
}

/// The same, among those that have a word in FLOW_REPLIES.
#[inline(never)]
fn has_other_word<A: Address, M: Memory<A>>(memory: &M, new: &NewFlow<A>) -> bool {
    let Some(seed) = memory.seed() else { return true };
    let Some(words) = memory.replies(new.replies.reply_bucket::<A>(seed)) else { return true };
    let mut ways = scan(memory, words, new.replies.tag(1));
    let mut is_found = 0;
    let mut candidate = 0;
    while ways != 0 && candidate < CANDIDATES + 1 {
        let reply = ReplyWord(memory.load(words, first(ways)));
        let place = reply.place();
        let word = request_word(memory, place).unwrap_or_default();
        let other = Ways { bucket: place / WAYS as u32, ways: 1 << (place % WAYS as u32) };
        let is_other = reply.is_of(word)
            && memory.has_other(Direction::Reply, &new.reply_key, other, new.place);
        is_found |= memory.forget(words, is_other as u64);
        ways &= ways - 1;
        candidate += 1;
    }
    // More CPUs insert such flows than are looked at.
    is_found | ways != 0
}

/// Whether the filter says that a flow may have the new one's replies.
#[inline(always)]
fn may_be_found<A: Address, M: Memory<A>>(memory: &M, new: &NewFlow<A>, bit: u64) -> bool {
    has_replies(new) && filter::read_both(memory, new.replies) & bit != 0
}

/// Some ways of a bucket of FLOW_TABLE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ways {
    /// The bucket.
    pub bucket: u32,
    /// One bit for each way.
    pub ways: u32,
}

/// Whether at one of `ways` there is another flow with this key, which the one at `place` cannot stop. So
/// there is if more CPUs insert such flows than are looked at.
#[inline(always)]
pub fn has_other<A: Address, M: Memory<A>>(
    memory: &M,
    direction: Direction,
    key: &FlowKey<A>,
    Ways { bucket, ways }: Ways,
    place: u32,
) -> bool {
    let Some(words) = memory.requests(bucket) else { return true };
    let (mut ways, mut same) = (ways as u64 & 0xff, 0);
    let mut looked_at = 0;
    while ways != 0 && looked_at < WAYS {
        let way = first(ways);
        let Some(entry) = memory.entry(bucket * WAYS as u32 + way) else { return true };
        same |= (memory.is_of(entry, direction, &key.tuple) as u64) << way;
        same = memory.forget(words, same);
        ways &= ways - 1;
        looked_at += 1;
    }
    let mut candidate = 0;
    while same != 0 && candidate < CANDIDATES {
        let other = bucket * WAYS as u32 + first(same);
        if other != place && !stops(memory, direction, key, other, place) {
            return true;
        }
        same &= same - 1;
        candidate += 1;
    }
    same != 0
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
            return word.state() & direction_mask(direction, protocol) != protocol;
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
