//! Removes flows that expired long ago, and counts the entries of the maps.
//!
//! The programs decide by themselves whether an entry has expired. The sweep only frees room, and
//! waits for twice the timeout.

use std::{
    collections::HashMap,
    io,
    mem::offset_of,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
    thread,
    time::Duration,
};

use bytemuck::Pod;
use lb_common::{
    abi::{
        address::{Address, Address4, Address6},
        affinity::{Affinity, AffinityKey, BY_SOCKET},
        flow::MOVED,
        flow_table::{EVENTS, FlowSeed, ReplyWord, RequestWord, TIMES, WAYS},
        frontend::UDP,
        service::Service,
        settings::{Lifetimes, PortRange, Settings, Timeouts},
        socket::{DatagramKey, Peer},
        traffic::{DIRECT, DirectFlows, NO_SERVICE},
    },
    balance::track,
    flow_table::{self, Class, age, class, request_word},
};
use lb_sys::{PerCpuCounters, TypedMap};

use super::{
    flow_table::{self as table, FlowAddress, FlowMaps, Flows, LiveFlow, lifetime},
    mapped::MappedArray,
    pins::{PinError, Pins},
    read::opened,
    source_ports::{self, PortCounts},
};
use crate::report::PortUse;

/// The pause between two batches, so that a sweep of a full table does not occupy a CPU.
const PAUSE: Duration = Duration::from_millis(2);

/// How many places of flows a batch has.
const PLACES: u32 = 32_768;

/// How long a connection that both sides have closed may still need translation: see
/// [`Sweeper::live`].
const CLOSED_SECONDS: u32 = 2;

/// The maps that the programs fill.
pub struct Sweeper {
    flows4: SweptFlows<Address4>,
    flows6: SweptFlows<Address6>,
    affinity: TypedMap<AffinityKey, Affinity>,
    datagram_peers: TypedMap<DatagramKey, Peer>,
    services: MappedArray<Service>,
    seed: MappedArray<FlowSeed>,
    direct: MappedArray<DirectFlows>,
    /// DIRECT_FLOWS at the last sweep.
    direct_before: DirectFlows,
    clock: std::os::fd::OwnedFd,
}

/// A family's flows, which are mapped only while they are swept.
struct SweptFlows<A> {
    maps: FlowMaps<A>,
    unfinished: Unfinished,
}

/// Words of FLOW_TABLE, by place, that a program or an agent had claimed when the last sweep saw
/// them. No insertion takes as long as from one sweep to the next, unless an agent was killed
/// meanwhile.
type Unfinished = HashMap<u32, RequestWord>;

/// The fill of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapFill {
    /// The map's name.
    pub map: &'static str,
    /// The number of entries.
    pub entries: u64,
    /// The capacity.
    pub max_entries: u64,
    /// The number of entries that this sweep removed.
    pub removed: u64,
}

/// The number of flows of each class, by its number.
pub type Classes = [u64; Class::ALL.len()];

/// What a sweep has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// The fill of each map whose entries come from traffic.
    pub fills: Vec<MapFill>,
    /// The flows, IPv4 and IPv6.
    pub flows: [Classes; 2],
    /// The backends whose source ports are [`CROWDED`](source_ports::CROWDED), the worst one first.
    pub ports: Vec<PortUse>,
}

/// What is counted of the flows of a family.
#[derive(Debug)]
struct Counts<A> {
    classes: Classes,
    ports: PortCounts<A>,
}

impl<A: Address> Counts<A> {
    fn new(source_ports: PortRange) -> Self {
        Self { classes: Classes::default(), ports: PortCounts::new(source_ports) }
    }
}

impl Sweeper {
    /// Opens the pinned maps.
    ///
    /// # Errors
    /// [`PinError`] if one is missing or of another layout.
    pub fn open(pins: &Pins) -> Result<Self, PinError> {
        let path = pins.clock();
        Ok(Self {
            flows4: SweptFlows::open(pins)?,
            flows6: SweptFlows::open(pins)?,
            affinity: opened(pins, "AFFINITY", TypedMap::new)?,
            datagram_peers: opened(pins, "DATAGRAM_PEERS", TypedMap::new)?,
            services: opened(pins, "SERVICES", MappedArray::readable)?,
            seed: opened(pins, table::SEED, MappedArray::writable)?,
            direct: opened(pins, "DIRECT_FLOWS", MappedArray::writable)?,
            direct_before: DirectFlows::default(),
            clock: lb_sys::obj_get(&path).map_err(|source| PinError::Open { path, source })?,
        })
    }

    /// Sweeps every map once. `source_ports` is the range that the programs draw from. Blocking.
    ///
    /// # Errors
    /// Those of the bpf(2) calls and of mmap(2).
    pub fn sweep(
        &mut self,
        timeouts: &Timeouts,
        ticks_per_second: u32,
        source_ports: PortRange,
    ) -> io::Result<Swept> {
        let time_shift = Settings::time_shift_of(ticks_per_second);
        let now = lb_sys::ticks_now(self.clock.as_fd())?;
        let time = now >> time_shift;
        let lifetimes = track::lifetimes(timeouts);
        let mut fills = Vec::new();
        let (mut counts4, mut counts6) = (Counts::new(source_ports), Counts::new(source_ports));
        let direct = self.direct.load(0)?;
        // The copies of the filters that are not in use are made anew: what is gone is not in them. The
        // programs look into the others no more by the next sweep.
        let [filter4, filter6] = self.seed.load(0)?.filters.map(|copy| copy & 1 ^ 1);
        fills.push(self.flows4.sweep(time, &lifetimes, filter4, &mut counts4)?);
        fills.push(self.flows6.sweep(time, &lifetimes, filter6, &mut counts6)?);
        let filters = u64::from(filter6) << u32::BITS | u64::from(filter4);
        self.seed.publish(0, offset_of!(FlowSeed, filters), filters)?;
        // A flow that is not found was inserted since the sweep before, or is gone.
        if direct == self.direct_before
            && direct.begun != direct.ended
            && !self.flows4.has_direct()?
            && !self.flows6.has_direct()?
        {
            self.direct.publish(0, offset_of!(DirectFlows, ended), direct.begun)?;
        }
        self.direct_before = direct;
        let services = &mut self.services;
        fills.push(sweep_map("AFFINITY", &self.affinity, |key, entry| {
            let limit = match key.kind {
                // A datagram socket keeps its backend for as long as a UDP flow does.
                BY_SOCKET => timeouts.udp_stream << time_shift,
                // An index out of range belongs to no Service: the entry has expired.
                _ => services
                    .load(key.service)
                    .map_or(0, |service| service.affinity_seconds)
                    .saturating_mul(ticks_per_second),
            };
            is_past(now, entry.last_seen, limit)
        })?);
        fills.push(sweep_map("DATAGRAM_PEERS", &self.datagram_peers, |_, _| false)?);
        let mut ports = counts4.ports.crowded(Ipv4Addr::from);
        ports.extend(counts6.ports.crowded(Ipv6Addr::from));
        source_ports::sort(&mut ports);
        Ok(Swept { fills, flows: [counts4.classes, counts6.classes], ports })
    }

    /// The number of flows that the programs would find. A connection that both sides have closed no
    /// longer counts once it was idle for `CLOSED_SECONDS`; the programs keep it for longer, in case
    /// its last packet was lost. Reserved source ports do not count.
    ///
    /// # Errors
    /// Those of the bpf(2) calls and of mmap(2).
    pub fn live(&self, settings: &Settings) -> io::Result<u64> {
        let time = settings.time(lb_sys::ticks_now(self.clock.as_fd())?);
        let flows4 = self.flows4.maps.map(false)?;
        let flows6 = self.flows6.maps.map(false)?;
        Ok(live_flows(&flows4, settings, time) + live_flows(&flows6, settings, time))
    }

    /// Marks every flow of UDP as moved: the client's next datagram counts as new, and an answer that is
    /// under way finds its flow.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn evict_datagram_requests(&self) -> io::Result<()> {
        move_datagrams(&self.flows4.maps.map(true)?);
        move_datagrams(&self.flows6.maps.map(true)?);
        Ok(())
    }
}

/// Marks every flow of datagrams to a Service as [`MOVED`].
fn move_datagrams<A: Address>(table: &impl Flows<A>) {
    let is_moved = |flow: &LiveFlow<A>| flow.protocol() == UDP && flow.entry.service != DIRECT;
    for flow in table.live().filter(is_moved) {
        flow_table::note(table, &flow.found(), 0, MOVED, flow.word.time());
    }
}

impl<A: FlowAddress> SweptFlows<A> {
    fn open(pins: &Pins) -> Result<Self, PinError> {
        Ok(Self { maps: FlowMaps::open(pins)?, unfinished: Unfinished::new() })
    }

    fn sweep(
        &mut self,
        time: u32,
        lifetimes: &Lifetimes,
        filter: u32,
        counts: &mut Counts<A>,
    ) -> io::Result<MapFill> {
        let table = self.maps.map(true)?;
        table.clear_filter(filter);
        let removed = sweep_flows(&table, time, lifetimes, &mut self.unfinished, counts);
        clear_replies(&table);
        let (entries, max_entries) = (counts.classes.iter().sum(), table.places().into());
        Ok(MapFill { map: A::TABLE, entries, max_entries, removed })
    }

    /// Whether there are flows of clients that talk to backends themselves.
    fn has_direct(&self) -> io::Result<bool> {
        let table = self.maps.map(false)?;
        Ok(table.live().any(|flow| flow.entry.service == DIRECT))
    }
}

/// Counts live flows.
fn live_flows<A: Address>(table: &impl Flows<A>, settings: &Settings, time: u32) -> u64 {
    let closed = settings.times(CLOSED_SECONDS);
    let live = table.live().filter(|flow| {
        let lifetime = lifetime(flow.word, &settings.flow_lifetimes);
        let limit = if flow.class() == Class::Closed { lifetime.min(closed) } else { lifetime };
        flow.entry.service != NO_SERVICE && age(flow.word.time(), time) <= limit
    });
    live.count() as u64
}

/// Removes flows that are past twice their timeout, and insertions that were not finished. Counts
/// the others and their source ports, and enters them into the filter. Returns how many flows it has removed.
fn sweep_flows<A: Address>(
    table: &impl Flows<A>,
    time: u32,
    lifetimes: &Lifetimes,
    unfinished: &mut Unfinished,
    counts: &mut Counts<A>,
) -> u64 {
    let (mut removed, mut still_unfinished) = (0, Unfinished::new());
    for place in 0..table.places() {
        if place % PLACES == PLACES - 1 {
            thread::sleep(PAUSE);
        }
        let word = request_word(table, place).unwrap_or_default();
        if word.is_free() {
            continue;
        }
        if !word.is_live() {
            if unfinished.get(&place) != Some(&word) {
                still_unfinished.insert(place, word);
            } else if let Some(bucket) = table.requests(place / WAYS as u32) {
                table.swap(bucket, place, word.0, word.freed().0);
            }
            continue;
        }
        if age(word.time(), time) > longest_age(lifetime(word, lifetimes))
            && table
                .flow(place)
                .is_some_and(|flow| flow.word == word && table.remove_unchanged(&flow))
        {
            removed += 1;
            continue;
        }
        // One that has become live since the filter was empty has entered itself.
        if let Some(flow) = table.flow(place) {
            table.enter_into_filter(&flow);
            counts.ports.add(&flow);
        }
        counts.classes[class(word.state()) as usize] += 1;
    }
    *unfinished = still_unfinished;
    removed
}

/// How old a flow with this timeout may be: twice the timeout, but never so old that it would soon
/// look like one of the future.
fn longest_age(lifetime: u32) -> u32 {
    const OLDEST: u32 = TIMES / 2 - TIMES / 128;
    lifetime.saturating_mul(2).min(OLDEST)
}

/// Clears the words of FLOW_REPLIES whose flow is gone: those that are cleared with their flow are
/// not among them.
fn clear_replies<A: Address>(table: &impl Flows<A>) {
    let buckets = (0..).map_while(|bucket| table.replies(bucket));
    for (number, bucket) in (0..).zip(buckets) {
        if number % (PLACES / WAYS as u32) == PLACES / WAYS as u32 - 1 {
            thread::sleep(PAUSE);
        }
        for way in 0..WAYS as u32 {
            let reply = ReplyWord(table.load(bucket, way));
            let is_void = || {
                let word = request_word(table, reply.place());
                !word.is_some_and(|word| reply.is_of(word))
            };
            if reply.0 != 0 && is_void() {
                table.swap(bucket, way, reply.0, 0);
            }
        }
    }
}

/// COUNTERS, summed over the CPUs; the index is
/// [`Hook::counter`](lb_common::abi::counter::Hook::counter).
///
/// # Errors
/// [`PinError`] if the map is missing or cannot be read.
pub fn counters(pins: &Pins) -> Result<Vec<u64>, PinError> {
    opened(pins, "COUNTERS", |map| PerCpuCounters::new(map)?.sums())
}

/// FLOW_EVENTS, summed over the CPUs: flows that were inserted, then those that were evicted, by
/// class.
///
/// # Errors
/// [`PinError`] if the map is missing or cannot be read.
pub fn flow_events(pins: &Pins) -> Result<[u64; EVENTS], PinError> {
    opened(pins, "FLOW_EVENTS", |map| {
        let sums = PerCpuCounters::new(map)?.sums()?;
        sums.try_into().map_err(|_| io::Error::other("another number of entries"))
    })
}

/// Removes the expired entries of `map`, batch by batch.
fn sweep_map<K: Pod, V: Pod>(
    name: &'static str,
    map: &TypedMap<K, V>,
    mut is_expired: impl FnMut(&K, &V) -> bool,
) -> io::Result<MapFill> {
    let (mut seen, mut removed) = (0u64, 0u64);
    let mut failure = None;
    map.visit(|keys, values| {
        seen += keys.len() as u64;
        let expired: Vec<K> = keys
            .iter()
            .zip(values)
            .filter(|(key, value)| is_expired(key, value))
            .map(|(key, _)| *key)
            .collect();
        for key in &expired {
            match remove_if(map, key, &mut is_expired) {
                Ok(is_removed) => removed += u64::from(is_removed),
                Err(error) => failure = Some(error),
            }
        }
        if keys.len() == lb_sys::BATCH {
            thread::sleep(PAUSE);
        }
        failure.is_none()
    })?;
    failure.map_or(Ok(()), Err)?;
    let max_entries = map.max_entries().into();
    Ok(MapFill { map: name, entries: seen.saturating_sub(removed), max_entries, removed })
}

/// Removes an entry if it is still expired: a packet may have refreshed it since its batch was
/// read.
fn remove_if<K: Pod, V: Pod>(
    map: &TypedMap<K, V>,
    key: &K,
    mut is_expired: impl FnMut(&K, &V) -> bool,
) -> io::Result<bool> {
    match map.get(key)? {
        Some(value) if is_expired(key, &value) => map.remove(key),
        _ => Ok(false),
    }
}

/// Whether more than twice `timeout` ticks have passed since `last_seen`. An entry that a packet
/// refreshed after `now` was read has `last_seen` in the future, and has not expired.
fn is_past(now: u32, last_seen: u32, timeout: u32) -> bool {
    let age = now.wrapping_sub(last_seen);
    age < 1 << 31 && age > timeout.min(1 << 29) * 2
}

#[cfg(test)]
mod tests {
    use lb_common::{
        abi::{
            address::Be16,
            flow::{ANSWERED, CONFIRMED, FlowKey, MOVED, RESET, STREAM},
            flow_table::Direction,
            frontend::{TCP, UDP},
        },
        flow_table::{Memory, may_have_client, may_have_reply},
    };

    use super::*;
    use crate::maps::flow_table::{
        FlowTable,
        tests::{TIMEOUTS, add, flow_of, key},
    };

    fn swept(
        table: &FlowTable<Address4>,
        time: u32,
        unfinished: &mut Unfinished,
    ) -> (u64, Classes) {
        let mut counts = Counts::new(PortRange::default());
        let lifetimes = track::lifetimes(&TIMEOUTS);
        let removed = sweep_flows(table, time, &lifetimes, unfinished, &mut counts);
        clear_replies(table);
        (removed, counts.classes)
    }

    #[test]
    fn an_entry_is_old_past_twice_its_timeout_also_across_the_wrap_of_the_clock() {
        assert!(!is_past(1000, 900, 50));
        assert!(is_past(1001, 900, 50));
        assert!(is_past(50, u32::MAX - 51, 50));
        assert!(!is_past(900, 901, 50), "refreshed after the clock was read");
        assert!(!is_past(u32::MAX, u32::MAX - (1 << 29), u32::MAX));
    }

    #[test]
    fn flows_past_twice_their_timeout_go_and_the_others_are_counted_by_class() {
        let table = FlowTable::<Address4>::anonymous(64).unwrap();
        let rows = [
            (TCP, ANSWERED | CONFIRMED, 2000),
            (TCP, 0, 120),
            (TCP, ANSWERED | CONFIRMED | RESET, 220),
            (UDP, 0, 60),
            (UDP, ANSWERED, 60),
            (UDP, ANSWERED | STREAM, 360),
        ];
        let start = TIMES - 10;
        for (port, (protocol, state, _)) in (1..).zip(rows) {
            add(&table, &key(port, protocol), state, start).unwrap();
        }
        let none = &mut Unfinished::new();
        assert_eq!(swept(&table, start + 60, none), (0, [1, 1, 1, 1, 2]));
        assert_eq!(swept(&table, 61 - 10, none), (2, [1, 1, 0, 1, 1]), "across the wrap");
        assert_eq!(swept(&table, 221 - 10, none), (2, [1, 1, 0, 0, 0]));
        assert_eq!(swept(&table, 361 - 10, none), (1, [1, 0, 0, 0, 0]));
        assert_eq!(swept(&table, 2001 - 10, none), (1, [0; 5]));
    }

    #[test]
    fn a_sweep_counts_the_source_ports_that_flows_to_a_backend_use() {
        let table = FlowTable::<Address4>::anonymous(64).unwrap();
        let lifetimes = track::lifetimes(&TIMEOUTS);
        let range = PortRange { first: 2000, count: 10 };
        for port in 1..=8 {
            let key = key(port, UDP);
            let mut new = flow_of(&key, 0, 0);
            new.flow.rewrite.source = Ipv4Addr::new(10, 2, 0, 1).into();
            new.flow.rewrite.source_port = Be16::new(2000 + port);
            new.reply_key.set_reverse(&new.flow.rewrite, key.protocol);
            table.insert(&key, &mut new, &lifetimes).unwrap();
        }
        add(&table, &key(2009, UDP), 0, 0).unwrap();
        let mut counts = Counts::new(range);
        sweep_flows(&table, 0, &lifetimes, &mut Unfinished::new(), &mut counts);
        let found = counts.ports.crowded(Ipv4Addr::from);
        let texts: Vec<_> = found.iter().map(ToString::to_string).collect();
        let expected = "backend 10.1.0.2:80/udp: 8 of 10 source ports of 10.2.0.1 are in use";
        assert_eq!(texts, [expected]);
    }

    #[test]
    fn no_flow_gets_so_old_that_it_looks_new() {
        let lifetime = super::super::timeouts::LONGEST;
        assert!(lifetime < longest_age(lifetime) && longest_age(lifetime) < TIMES / 2);
        assert_eq!(longest_age(100), 200);
    }

    #[test]
    fn a_reply_word_without_its_flow_is_cleared() {
        let table = FlowTable::<Address4>::anonymous(8).unwrap();
        let (kept, lost) = (key(1, TCP), key(2, TCP));
        // With a source address of the node, replies do not find them at home.
        let away = |key: &FlowKey<Address4>| {
            let mut new = flow_of(key, 0, 0);
            new.flow.rewrite.source = Ipv4Addr::new(10, 2, 0, 1).into();
            new.reply_key.set_reverse(&new.flow.rewrite, key.protocol);
            new
        };
        for key in [kept, lost] {
            table.insert(&key, &mut away(&key), &track::lifetimes(&TIMEOUTS)).unwrap();
        }
        let place = table.find(&lost, Direction::Request).unwrap().place;
        let word = request_word(&table, place).unwrap();
        let bucket = table.requests(place / WAYS as u32).unwrap();
        assert!(table.swap(bucket, place, word.0, word.freed().0));
        let has_word = |key: &_| may_have_reply(&table, &away(key).reply_key);
        assert!(has_word(&kept) && has_word(&lost));
        clear_replies(&table);
        assert!(has_word(&kept) && !has_word(&lost));
    }

    #[test]
    fn the_filter_forgets_flows_that_are_gone_and_keeps_the_others() {
        let table = FlowTable::<Address4>::anonymous(64).unwrap();
        let (kept, lost) = (key(1, TCP), key(2, TCP));
        add(&table, &kept, ANSWERED | CONFIRMED, 0).unwrap();
        add(&table, &lost, 0, 0).unwrap();
        let may_be = |key: &FlowKey<Address4>| may_have_client(&table, key);
        assert!(may_be(&kept) && may_be(&lost) && !may_be(&key(3, TCP)));
        let found = table.find(&lost, Direction::Request).unwrap();
        assert!(table.remove_unchanged(&found));
        assert!(may_be(&lost), "the copy that is in use has it still");
        // The sweep makes the other copy, then the programs use that one.
        for copy in [1, 0] {
            table.clear_filter(copy);
            swept(&table, 0, &mut Unfinished::new());
        }
        assert!(may_be(&kept) && !may_be(&lost));
        assert!(table.find(&flow_of(&kept, 0, 0).reply_key, Direction::Reply).is_some());
    }

    #[test]
    fn an_insertion_that_was_not_finished_ends_with_the_second_sweep() {
        let table = FlowTable::<Address4>::anonymous(1).unwrap();
        let bucket = table.requests(0).unwrap();
        let claimed = RequestWord::default().claimed(3);
        assert!(table.swap(bucket, 5, 0, claimed.0));
        let unfinished = &mut Unfinished::new();
        swept(&table, 0, unfinished);
        assert_eq!(table.load(bucket, 5), claimed.0);
        swept(&table, 0, unfinished);
        assert_eq!(table.load(bucket, 5), claimed.freed().0);
        assert!(unfinished.is_empty());
    }

    #[test]
    fn a_drain_waits_for_flows_that_still_need_translation() {
        let table = FlowTable::<Address4>::anonymous(64).unwrap();
        for (port, (protocol, state)) in (1..).zip([
            (TCP, ANSWERED | CONFIRMED),
            (TCP, ANSWERED | CONFIRMED | RESET),
            (UDP, ANSWERED | MOVED),
            (UDP, ANSWERED),
        ]) {
            add(&table, &key(port, protocol), state, 0).unwrap();
        }
        let settings = Settings {
            flow_lifetimes: track::lifetimes(&TIMEOUTS),
            ticks_per_second: 10,
            ..Settings::default()
        };
        let live = |time| live_flows(&table, &settings, time);
        assert_eq!([0, 20, 21, 31, 1001].map(live), [4, 4, 2, 1, 0]);
    }

    #[test]
    fn datagrams_whose_requests_are_evicted_keep_their_replies() {
        let table = FlowTable::<Address4>::anonymous(64).unwrap();
        for protocol in [TCP, UDP] {
            let key = key(1, protocol);
            add(&table, &key, ANSWERED, 0).unwrap();
            move_datagrams(&table);
            let flow = table.live().find(|flow| flow.protocol() == protocol).unwrap();
            let mut reply = key;
            reply.set_reverse(&flow.entry.translated, protocol.into());
            let found = [(key, Direction::Request), (reply, Direction::Reply)]
                .map(|(key, direction)| table.find(&key, direction).is_some());
            assert_eq!(found, [protocol == TCP, true], "{protocol}");
        }
    }
}
