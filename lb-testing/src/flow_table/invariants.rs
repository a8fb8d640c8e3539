//! What holds in a table of flows at every moment, checked while other threads change it.
//!
//! A flow that is live with the same generation before and after its entry is read was live all the
//! time between. What is said of two flows is said of flows that were so at the same time.

use std::collections::HashMap;

use lb_common::{
    abi::{
        address::Address,
        flow::{FlowKey, MOVED},
        flow_table::{
            FlowEntry, NO_REPLY_PLACE, REPLY_ROOM, ReplyWord, RequestWord, TAG_SHIFT, WAYS,
        },
        frontend::{TCP, UDP},
    },
    flow_table::{CHOICES, Hash, IS_UDP, Memory, filter, request_word},
};

/// What was in a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Flows that were live for as long as it was looked at.
    pub live: usize,
    /// Words of FLOW_TABLE that belong to a flow which is not live, or not yet.
    pub unfinished: usize,
    /// Words of FLOW_REPLIES that refer to no flow, but are in use.
    pub void: usize,
}

/// A flow that was live for as long as the table was looked at.
struct Live<A> {
    place: u32,
    word: RequestWord,
    entry: FlowEntry<A>,
    /// What the place of its word in FLOW_REPLIES had in it; `None` if it has none.
    reply: Option<ReplyWord>,
}

impl<A: Address> Live<A> {
    fn protocol(&self) -> u32 {
        if self.word.state() & IS_UDP == 0 { TCP.into() } else { UDP.into() }
    }

    /// How a request arrives.
    fn request(&self) -> FlowKey<A> {
        FlowKey { tuple: self.entry.request, protocol: self.protocol() }
    }

    /// How a reply arrives.
    fn reply(&self) -> FlowKey<A> {
        FlowKey { tuple: self.entry.translated.reversed(), protocol: self.protocol() }
    }

    /// Whether its replies pass this node.
    fn has_replies(&self) -> bool {
        self.entry.actions[1].action != 0
    }

    /// Whether it has the requests of its entry still.
    fn has_requests(&self) -> bool {
        self.word.state() & (IS_UDP | MOVED) != IS_UDP | MOVED
    }
}

/// Checks a table. `entry_at` reads the entry at a place.
///
/// # Errors
/// What is wrong with it, in a sentence.
pub fn check<A: Address, M: Memory<A>>(
    memory: &M,
    entry_at: impl Fn(u32) -> FlowEntry<A>,
) -> Result<Contents, String> {
    let buckets = memory.seed().ok_or("the table has no seed")?.buckets::<A>();
    let places = 0..buckets * WAYS as u32;
    let reply_places = 0..places.end * REPLY_ROOM;
    let requests = |place| request_word::<A, _>(memory, place).unwrap_or_default();
    let replies = |place| reply_word::<A, _>(memory, place);
    let words_before: Vec<_> = places.clone().map(requests).collect();
    let replies_before: Vec<_> = reply_places.clone().map(replies).collect();
    let read = |place| {
        let entry = entry_at(place);
        let reply = (entry.reply_place != NO_REPLY_PLACE).then(|| replies(entry.reply_place));
        Live { place, word: words_before[place as usize], entry, reply }
    };
    let is_live = |place: &u32| words_before[*place as usize].is_live();
    let mut live: Vec<_> = places.clone().filter(is_live).map(read).collect();
    let replies_after: Vec<_> = reply_places.clone().map(replies).collect();
    live.retain(|flow| {
        let after = requests(flow.place);
        after.is_live() && flow.word.is_same_flow(after)
    });
    let by_place: HashMap<_, _> = live.iter().map(|flow| (flow.place, flow)).collect();
    for flow in &live {
        check_flow(memory, flow)?;
    }
    check_pairs("requests", live.iter().filter(|flow| flow.has_requests()), Live::request)?;
    check_pairs("replies", live.iter().filter(|flow| flow.has_replies()), Live::reply)?;

    let mut void = 0;
    for at in reply_places {
        let reply = replies_after[at as usize];
        if reply != replies_before[at as usize] || reply.0 == 0 {
            continue;
        }
        match by_place.get(&reply.place()) {
            Some(flow) if reply.is_of(flow.word) => {
                if flow.entry.reply_place != at || !flow.has_replies() {
                    return Err(format!(
                        "the word {:#x} at {at} of FLOW_REPLIES refers to the flow at {}, {:?}",
                        reply.0, flow.place, flow.entry
                    ));
                }
            }
            _ => void += usize::from(!reply.is_of(requests(reply.place()))),
        }
    }
    let is_unfinished = |word: &&RequestWord| !word.is_free() && !word.is_live();
    let unfinished = words_before.iter().filter(is_unfinished).count();
    Ok(Contents { live: live.len(), unfinished, void })
}

/// Whether a flow is where its addresses say.
fn check_flow<A: Address, M: Memory<A>>(memory: &M, flow: &Live<A>) -> Result<(), String> {
    let seed = memory.seed().ok_or("the table has no seed")?;
    let described = || format!("the flow at {} ({:x?}), {:?}", flow.place, flow.word, flow.entry);
    let bucket = flow.place / WAYS as u32;
    let (request, reply) = (flow.request(), flow.reply());
    let hash = Hash::of_request(&request, seed);
    let is_at = |choice: usize| {
        hash.bucket::<A>(choice, seed) == bucket && hash.tag(choice) == flow.word.0 >> TAG_SHIFT
    };
    if !(0..CHOICES).any(is_at) {
        return Err(format!("{} has another place or tag than its request", described()));
    }
    if !flow.has_replies() {
        return Ok(());
    }
    let by_reply = Hash::of_reply(&reply, seed);
    let needs_word = flow.reply.is_some();
    if filter::read(memory, hash) & filter::HOME == 0
        || needs_word && filter::read(memory, by_reply) & filter::AWAY == 0
    {
        return Err(format!("{} is not in the filter", described()));
    }
    let Some(word) = flow.reply else {
        let is_found = by_reply.home == hash.home && is_at(0);
        return is_found.then_some(()).ok_or_else(|| format!("{} has no word", described()));
    };
    let is_of = word.is_of(flow.word) && word.place() == flow.place;
    let is_there = by_reply.reply_bucket::<A>(seed) == flow.entry.reply_place / WAYS as u32
        && by_reply.tag(1) == word.0 >> TAG_SHIFT;
    if !is_of || !is_there {
        return Err(format!("{} has no replies: {word:x?}", described()));
    }
    Ok(())
}

/// Whether no two flows have the same key.
fn check_pairs<'a, A: Address>(
    what: &str,
    flows: impl Iterator<Item = &'a Live<A>>,
    key: impl Fn(&Live<A>) -> FlowKey<A>,
) -> Result<(), String> {
    let mut known = HashMap::new();
    for flow in flows {
        if let Some(other) = known.insert(key(flow), flow.place) {
            let key = key(flow);
            return Err(format!(
                "{what} {key:?} belong to the flows at {other} and {}",
                flow.place
            ));
        }
    }
    Ok(())
}

fn reply_word<A: Address, M: Memory<A>>(memory: &M, place: u32) -> ReplyWord {
    let bucket = memory.replies(place / WAYS as u32);
    ReplyWord(bucket.map_or(0, |bucket| memory.load(bucket, place)))
}
