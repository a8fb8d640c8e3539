//! The table of flows in the maps of a loaded object, which nothing has pinned.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use lb_agent::maps::flow_table::{FlowAddress, FlowMaps, FlowTable, Flows, LiveFlow, SEED};
use lb_common::abi::address::{Address4, Address6};
use lb_common::abi::flow::{Flow, FlowKey, Tuple};
use lb_common::abi::flow_table::{
    Direction, FlowEntry, FlowSeed, PERIOD_FACTOR, REPLY_ROOM, RequestWord, TIMES, WAYS,
};
use lb_common::abi::settings::Lifetimes;
use lb_common::balance::Endpoint;
use lb_common::flow_table::{InsertError, Memory, NewFlow, request_word};
use lb_sys::TypedMap;
use lb_testing::flow_table::invariants::{self, Contents};
use lb_testing::flow_table::seed;

/// The sizes of the maps of a table with so many places, a multiple of [`WAYS`], by family.
pub fn sizes([ipv4, ipv6]: [u32; 2]) -> [(&'static str, u32); 6] {
    let buckets = |places| places / WAYS as u32;
    [
        (Address4::TABLE, buckets(ipv4)),
        (Address4::REPLIES, REPLY_ROOM * buckets(ipv4)),
        (Address4::FILTER, buckets(ipv4)),
        (Address6::TABLE, buckets(ipv6)),
        (Address6::REPLIES, REPLY_ROOM * buckets(ipv6)),
        (Address6::FILTER, buckets(ipv6)),
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

/// Maps a family's table, whose seed is written. `descriptor` gives the descriptor of a map.
///
/// # Errors
/// No such map, or one of another layout.
pub fn open<A: FlowAddress>(descriptor: impl Fn(&str) -> Result<OwnedFd>) -> Result<FlowTable<A>> {
    let maps = FlowMaps::of(&|name| descriptor(name).ok());
    maps.and_then(|maps| maps.map(true)).with_context(|| format!("cannot map {}", A::TABLE))
}

/// Forgets all flows. No program may run meanwhile.
pub fn clear<A: FlowAddress>(table: &FlowTable<A>) {
    let requests = (0..).map_while(|bucket| table.requests(bucket));
    for bucket in requests.chain((0..).map_while(|bucket| table.replies(bucket))) {
        for way in 0..WAYS as u32 {
            let is_cleared = table.swap(bucket, way, table.load(bucket, way), 0);
            assert!(is_cleared, "no program runs");
        }
    }
    (0..2).for_each(|copy| table.clear_filter(copy));
}

/// Makes all flows older, in the unit of their times. No program may run meanwhile.
pub fn age<A: FlowAddress>(table: &FlowTable<A>, times: u32) {
    for place in 0..table.places() {
        let word = request_word(table, place).unwrap_or_default();
        let older = word.live(word.state(), word.time().wrapping_sub(times));
        if let (true, Some(bucket)) = (word.is_live(), table.requests(place / WAYS as u32)) {
            assert!(table.swap(bucket, place, word.0, older.0), "no program runs");
        }
    }
}

/// Inserts a flow like another one, by another client. No established flow makes room for it.
///
/// # Errors
/// [`InsertError`]: nothing was inserted.
pub fn insert_like<A: FlowAddress>(
    table: &FlowTable<A>,
    like: &LiveFlow<A>,
    client: Endpoint<A>,
    lifetimes: &Lifetimes,
) -> Result<(), InsertError> {
    let of_client = |mut tuple: Tuple<A>| {
        (tuple.source, tuple.source_port) = (client.address, client.port);
        tuple
    };
    let LiveFlow { word, entry, .. } = like;
    let key = FlowKey { tuple: of_client(entry.request), protocol: like.protocol().into() };
    let action = |direction| entry.actions[direction as usize];
    let mut new = NewFlow::default();
    new.flow = Flow {
        rewrite: of_client(entry.translated),
        action: action(Direction::Request),
        state: word.state(),
        generation: entry.generation,
        backend: entry.backend,
        service: entry.service,
        last_seen: word.time(),
        ..Flow::default()
    };
    (new.reply_action, new.protected) = (action(Direction::Reply), TIMES - 1);
    new.reply_key.set_reverse(&new.flow.rewrite, key.protocol);
    table.insert(&key, &mut new, lifetimes)
}

/// Checks the table's invariants.
///
/// # Errors
/// What is wrong with it.
pub fn check<A: FlowAddress>(table: &FlowTable<A>) -> Result<Contents> {
    let entry_at = |place| table.copied(place).expect("the place is in bounds");
    invariants::check(table, entry_at).map_err(anyhow::Error::msg)
}

/// The flows of a table: their entries and their words.
pub fn entries<A: FlowAddress>(table: &FlowTable<A>) -> Vec<(FlowEntry<A>, RequestWord)> {
    table.live().map(|flow| (flow.entry, flow.word)).collect()
}
