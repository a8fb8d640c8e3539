//! What holds in a table of flows at every moment, checked while other threads change it.
//!
//! A flow that is live with the same generation before and after its entry is read was live all the
//! time between. What is said of two flows is said of flows that were so at the same time.

use std::collections::HashMap;

use lb_common::{
    abi::{
        address::Address,
        flow::{FlowKey, MOVED},
        flow_table::{FlowEntry, REPLY_ROOM, ReplyWord, RequestWord, TAG_SHIFT, WAYS},
        frontend::{TCP, UDP},
    },
    flow_table::{CHOICES, Hash, IS_UDP, Memory, request_word},
};

/// A table whose entries can be read.
pub trait ReadEntries<A: Address>: Memory<A> {
    /// The entry at a place.
    fn copy_of(&self, place: u32) -> FlowEntry<A>;
}

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
    /// What the place of its word in FLOW_REPLIES had in it.
    reply: ReplyWord,
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

/// Checks a table.
///
/// # Errors
/// What is wrong with it, in a sentence.
pub fn check<A: Address, M: ReadEntries<A>>(memory: &M) -> Result<Contents, String> {
    let buckets = memory.seed().ok_or("the table has no seed")?.buckets::<A>();
    let places = 0..buckets * WAYS as u32;
    let reply_places = 0..places.end * REPLY_ROOM;
    let requests = |place| request_word::<A, _>(memory, place).unwrap_or_default();
    let replies = |place| reply_word::<A, _>(memory, place);
    let words_before: Vec<_> = places.clone().map(requests).collect();
    let replies_before: Vec<_> = reply_places.clone().map(replies).collect();
    let read = |place| {
        let entry = memory.copy_of(place);
        Live { place, word: words_before[place as usize], entry, reply: replies(entry.reply_place) }
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
    let is_at = |place: u32, tag: u64, hash: Hash, choices: usize| {
        let bucket = place / WAYS as u32;
        hash.buckets[..choices].contains(&bucket) && tag >> TAG_SHIFT == hash.tag
    };
    let described = || format!("the flow at {} ({:x?}), {:?}", flow.place, flow.word, flow.entry);
    if !is_at(flow.place, flow.word.0, Hash::of_request(&flow.request(), seed), CHOICES) {
        return Err(format!("{} has another place or tag than its request", described()));
    }
    if !flow.has_replies() {
        return Ok(());
    }
    let is_of = flow.reply.is_of(flow.word) && flow.reply.place() == flow.place;
    let hash = Hash::of_reply(&flow.reply(), seed);
    if !is_of || !is_at(flow.entry.reply_place, flow.reply.0, hash, 1) {
        return Err(format!("{} has no replies: {:x?}", described(), flow.reply));
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
