//! The table of flows in memory that is shared with the programs.
//!
//! The algorithm is that of the programs, [`lb_common::flow_table`]; this module only gives it the
//! memory. After the table is open, nothing here needs a system call. Invariant: a flow that is
//! returned was read as a whole, while it was live.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, OwnedFd},
};

use lb_common::{
    abi::{
        address::{Address, Address4, Address6},
        flow::{FlowKey, Tuple},
        flow_table::{
            Bucket, Direction, FILTER_WORDS, FlowBucket, FlowEntry, FlowFilter, FlowSeed,
            REPLY_ROOM, RequestWord, WAYS,
        },
        frontend::{TCP, UDP},
        settings::{Lifetimes, Settings},
    },
    flow_table::{
        self, Class, Found, IS_UDP, InsertError, Memory, NewFlow, age, class, filter, request_word,
    },
};
use lb_sys::SharedArray;

pub use super::flow_names::{FlowAddress, MAPS, SEED, buckets};
use super::{
    mapped::MappedArray,
    pins::{PinError, Pins},
    read::opened,
};

/// A table of flows whose entries can be copied out and written.
pub trait Flows<A: Address>: Memory<A, Entry = u32> {
    /// How many flows there is room for.
    fn places(&self) -> u32;

    /// The entry at a place, which may be changing; `None` outside of the table.
    fn copied(&self, place: u32) -> Option<FlowEntry<A>>;

    /// Writes the entry at a place that the caller has claimed.
    fn write(&self, place: u32, entry: &FlowEntry<A>);

    /// The flow at a place, if one is live there.
    fn flow(&self, place: u32) -> Option<LiveFlow<A>>
    where
        Self: Sized,
    {
        let word = request_word(self, place).filter(|word| word.is_live())?;
        self.read(Found { entry: place, place, word })
    }

    /// Reads a flow that was found; `None` if it has gone.
    fn read(&self, found: Found<u32>) -> Option<LiveFlow<A>>
    where
        Self: Sized,
    {
        let entry = self.copied(found.place)?;
        let Found { place, word, .. } = found;
        flow_table::is_still(self, &found).then_some(LiveFlow { place, word, entry })
    }

    /// Every live flow.
    fn live(&self) -> impl Iterator<Item = LiveFlow<A>>
    where
        Self: Sized,
    {
        (0..self.places()).filter_map(|place| self.flow(place))
    }

    /// The flow one of whose directions arrives as `key` says.
    fn find(&self, key: &FlowKey<A>, direction: Direction) -> Option<LiveFlow<A>>
    where
        Self: Sized,
    {
        let found = match direction {
            Direction::Request => flow_table::find_request(self, key),
            Direction::Reply => flow_table::find_reply(self, key),
        };
        self.read(found?)
    }

    /// Inserts a flow whose requests arrive as `key` says.
    ///
    /// # Errors
    /// [`InsertError`]: nothing was inserted.
    fn insert(
        &self,
        key: &FlowKey<A>,
        new: &mut NewFlow<A>,
        lifetimes: &Lifetimes,
    ) -> Result<(), InsertError>
    where
        Self: Sized,
    {
        let write = |place, new: &NewFlow<A>| {
            let mut entry = FlowEntry::default();
            entry.write(&key.tuple, &new.flow, new.reply_action);
            self.write(place, &entry);
        };
        flow_table::insert(self, key, new, lifetimes, write)
    }

    /// Enters a flow into both copies of the filter.
    fn enter_into_filter(&self, flow: &LiveFlow<A>)
    where
        Self: Sized,
    {
        let LiveFlow { entry, .. } = flow;
        let protocol = flow.protocol().into();
        let request = FlowKey { tuple: entry.request, protocol };
        let mut reply = FlowKey::default();
        reply.set_reverse(&entry.translated, protocol);
        if entry.actions[Direction::Reply as usize].action != 0 {
            flow_table::enter_live(self, &request, &reply, entry.reply_place);
        }
    }

    /// Removes a flow unless a packet was noted since it was read. Returns whether it was removed.
    fn remove_unchanged(&self, flow: &LiveFlow<A>) -> bool
    where
        Self: Sized,
    {
        let LiveFlow { place, word, entry } = flow;
        let is_removed = self
            .requests(place / WAYS as u32)
            .is_some_and(|bucket| self.swap(bucket, *place, word.0, word.freed().0));
        if is_removed {
            flow_table::clear_reply(self, *word, *place, entry.reply_place);
        }
        is_removed
    }
}

/// A flow, as it was when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveFlow<A> {
    /// Its place.
    pub place: u32,
    /// Its word: state and time.
    pub word: RequestWord,
    /// Its entry.
    pub entry: FlowEntry<A>,
}

impl<A> LiveFlow<A> {
    /// [`TCP`] or [`UDP`].
    pub fn protocol(&self) -> u8 {
        if self.word.state() & IS_UDP == 0 { TCP } else { UDP }
    }

    /// Where it is, for the functions that change it.
    pub fn found(&self) -> Found<u32> {
        Found { entry: self.place, place: self.place, word: self.word }
    }

    /// Its class.
    pub fn class(&self) -> Class {
        class(self.word.state())
    }
}

/// The timeout of a flow with this word, in the unit of times.
pub fn lifetime(word: RequestWord, lifetimes: &Lifetimes) -> u32 {
    Lifetimes::ticks(lifetimes.words[(word.0 & RequestWord::LIFE) as usize])
}

/// Whether a flow with this word is past its timeout at `time`, so that it counts as absent.
pub fn is_expired(word: RequestWord, time: u32, lifetimes: &Lifetimes) -> bool {
    age(word.time(), time) > lifetime(word, lifetimes)
}

/// So many times in seconds, rounded; `None` if the settings are not programmed yet.
pub fn seconds(times: u32, settings: &Settings) -> Option<u32> {
    let (ticks, second) =
        (u64::from(times) << (settings.time_shift & 31), settings.ticks_per_second);
    (second != 0).then(|| (ticks + u64::from(second / 2)).div_euclid(second.into()) as u32)
}

/// The pinned table of a family.
#[derive(Debug)]
pub struct FlowTable<A> {
    seed: FlowSeed,
    table: SharedArray,
    replies: SharedArray,
    filter: SharedArray,
    address: PhantomData<fn(A)>,
}

/// A bucket of one of the two arrays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BucketOf(Direction, u32);

impl<A: FlowAddress> FlowTable<A> {
    /// Opens the pinned maps for reading.
    ///
    /// # Errors
    /// [`PinError`] if one is missing or of another layout.
    pub fn readable(pins: &Pins) -> Result<Self, PinError> {
        Self::opened(pins, false)
    }

    /// Opens the pinned maps for reading and writing.
    ///
    /// # Errors
    /// [`PinError`] if one is missing or of another layout.
    pub fn writable(pins: &Pins) -> Result<Self, PinError> {
        Self::opened(pins, true)
    }

    fn opened(pins: &Pins, is_writable: bool) -> Result<Self, PinError> {
        let mapped = FlowMaps::open(pins)?.map(is_writable);
        mapped.map_err(|source| PinError::Open { path: pins.map(A::TABLE), source })
    }

    fn new(seed: FlowSeed, [table, replies, filter]: [SharedArray; 3]) -> Self {
        Self { seed, table, replies, filter, address: PhantomData }
    }

    /// An empty table of this process alone, for tests.
    ///
    /// # Errors
    /// Those of mmap(2).
    #[cfg(test)]
    pub(crate) fn anonymous(buckets: u32) -> io::Result<Self> {
        let table = SharedArray::anonymous(buckets, size_of::<FlowBucket<A>>())?;
        let replies = SharedArray::anonymous(buckets * REPLY_ROOM, size_of::<Bucket>())?;
        let filter = SharedArray::anonymous(buckets, size_of::<FlowFilter>())?;
        Ok(Self::new(seed([buckets; 2])?, [table, replies, filter]))
    }

    /// Empties a copy of the filter, 0 or 1. Programs must not look into this one.
    pub fn clear_filter(&self, copy: u32) {
        let bits = filter::bits_of_copy(copy);
        for bucket in 0..self.filter.entries() {
            for word in 0..FILTER_WORDS {
                self.filter.clear_bits(bucket, word, bits);
            }
        }
    }

    fn word(&self, BucketOf(direction, bucket): BucketOf, way: u32) -> (&SharedArray, u32, usize) {
        let array = match direction {
            Direction::Request => &self.table,
            Direction::Reply => &self.replies,
        };
        (array, bucket, way as usize % WAYS)
    }
}

/// A family's pinned maps of flows, which are not in the memory of the process until they are
/// [mapped](Self::map).
#[derive(Debug)]
pub struct FlowMaps<A> {
    seed: FlowSeed,
    table: OwnedFd,
    replies: OwnedFd,
    filter: OwnedFd,
    address: PhantomData<fn(A)>,
}

impl<A: FlowAddress> FlowMaps<A> {
    /// Opens the pinned maps.
    ///
    /// # Errors
    /// [`PinError`] if one is missing or of another layout.
    pub fn open(pins: &Pins) -> Result<Self, PinError> {
        Ok(Self {
            seed: opened(pins, SEED, |map| MappedArray::readable(map)?.load(0))?,
            table: pins.open(A::TABLE)?,
            replies: pins.open(A::REPLIES)?,
            filter: pins.open(A::FILTER)?,
            address: PhantomData,
        })
    }

    /// The maps that `map` finds by their names.
    ///
    /// # Errors
    /// Those of the maps; one is missing.
    pub fn of(map: &dyn Fn(&str) -> Option<OwnedFd>) -> io::Result<Self> {
        let found = |name: &str| {
            let missing = || io::Error::new(io::ErrorKind::NotFound, format!("no map {name}"));
            map(name).ok_or_else(missing)
        };
        Ok(Self {
            seed: MappedArray::readable(found(SEED)?)?.load(0)?,
            table: found(A::TABLE)?,
            replies: found(A::REPLIES)?,
            filter: found(A::FILTER)?,
            address: PhantomData,
        })
    }

    /// The table, mapped into memory.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn map(&self, is_writable: bool) -> io::Result<FlowTable<A>> {
        let array = |map: &OwnedFd, size| SharedArray::new(map.as_fd(), size, is_writable);
        let table = array(&self.table, size_of::<FlowBucket<A>>())?;
        let replies = array(&self.replies, size_of::<Bucket>())?;
        let filter = array(&self.filter, size_of::<FlowFilter>())?;
        Ok(FlowTable::new(self.seed, [table, replies, filter]))
    }
}

impl<A: FlowAddress> Memory<A> for FlowTable<A> {
    type Bucket = BucketOf;
    type Entry = u32;

    fn seed(&self) -> Option<&FlowSeed> {
        Some(&self.seed)
    }

    fn requests(&self, bucket: u32) -> Option<BucketOf> {
        (bucket < self.table.entries()).then_some(BucketOf(Direction::Request, bucket))
    }

    fn replies(&self, bucket: u32) -> Option<BucketOf> {
        (bucket < self.replies.entries()).then_some(BucketOf(Direction::Reply, bucket))
    }

    fn load(&self, bucket: BucketOf, way: u32) -> u64 {
        let (array, bucket, way) = self.word(bucket, way);
        array.load(bucket, way).unwrap_or_default()
    }

    fn swap(&self, bucket: BucketOf, way: u32, old: u64, new: u64) -> bool {
        let (array, bucket, way) = self.word(bucket, way);
        array.compare_and_swap(bucket, way, old, new)
    }

    fn filter_word(&self, bucket: u32, word: u32) -> u64 {
        self.filter.load(bucket, word as usize % FILTER_WORDS).unwrap_or(u64::MAX)
    }

    fn set_filter_bits(&self, bucket: u32, word: u32, bits: u64) {
        self.filter.set_bits(bucket, word as usize % FILTER_WORDS, bits);
    }

    fn entry(&self, place: u32) -> Option<u32> {
        (place < self.places()).then_some(place)
    }

    fn is_of(&self, place: u32, direction: Direction, tuple: &Tuple<A>) -> bool {
        self.copied(place).is_some_and(|entry| entry.is_of(direction, tuple))
    }

    fn reply_place(&self, place: u32) -> u32 {
        self.copied(place).unwrap_or_default().reply_place
    }

    fn set_reply_place(&self, place: u32, reply_place: u32) {
        if let Some(entry) = self.copied(place) {
            self.write(place, &FlowEntry { reply_place, ..entry });
        }
    }
}

impl<A: FlowAddress> Flows<A> for FlowTable<A> {
    fn places(&self) -> u32 {
        self.table.entries().saturating_mul(WAYS as u32)
    }

    fn copied(&self, place: u32) -> Option<FlowEntry<A>> {
        let mut entry = FlowEntry::default();
        let words = bytemuck::cast_slice_mut(bytemuck::bytes_of_mut(&mut entry));
        self.table.copy(place / WAYS as u32, first_word::<A>(place), words).then_some(entry)
    }

    fn write(&self, place: u32, entry: &FlowEntry<A>) {
        let words = bytemuck::cast_slice(bytemuck::bytes_of(entry));
        self.table.fill(place / WAYS as u32, first_word::<A>(place), words);
    }
}

/// The first word of the entry at a place in its [`FlowBucket`].
const fn first_word<A>(place: u32) -> usize {
    (size_of::<Bucket>() + place as usize % WAYS * size_of::<FlowEntry<A>>()) / size_of::<u64>()
}

/// Whether the seed is for the numbers of entries that the other maps have; `map` finds a map by its
/// name.
pub fn fits_seed<'a>(map: impl Fn(&'static str) -> Option<&'a OwnedFd>) -> bool {
    let entries = |name| Some(lb_sys::map_info(map(name)?.as_fd()).ok()?.max_entries);
    let seed = || -> Option<FlowSeed> {
        let seed = map(SEED)?.try_clone().ok()?;
        MappedArray::readable(seed).ok()?.load(0).ok()
    };
    let families = [
        [Address4::TABLE, Address4::REPLIES, Address4::FILTER],
        [Address6::TABLE, Address6::REPLIES, Address6::FILTER],
    ];
    seed().is_some_and(|seed| {
        seed.buckets.iter().zip(families).all(|(buckets, names)| {
            let wanted = [*buckets, buckets.saturating_mul(REPLY_ROOM), *buckets];
            names.map(entries) == wanted.map(Some)
        })
    })
}

/// A new seed for tables with so many buckets, by family.
///
/// # Errors
/// Those of getrandom(2).
pub fn seed(buckets: [u32; 2]) -> io::Result<FlowSeed> {
    let mut seed = FlowSeed { buckets, ..FlowSeed::default() };
    getrandom::fill(bytemuck::bytes_of_mut(&mut seed.factors))?;
    Ok(seed)
}

/// Writes a new seed into the map `map`, for new tables with so many buckets each. No program may
/// have seen them.
///
/// # Errors
/// Those of getrandom(2) and of the map.
pub fn write_seed(map: OwnedFd, buckets: [u32; 2]) -> io::Result<()> {
    MappedArray::writable(map)?.store(0, &seed(buckets)?)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::Ipv4Addr;

    use lb_common::{
        abi::{
            address::Be16,
            flow::{ANSWERED, Action, CONFIRMED, Flow},
            settings::Timeouts,
        },
        balance::track,
    };

    use super::*;

    pub(crate) const TIMEOUTS: Timeouts = Timeouts {
        tcp_syn: 60,
        tcp_established: 1000,
        tcp_half_closed: 500,
        tcp_fin_one_way: 120,
        tcp_closing: 120,
        tcp_reset: 110,
        udp: 30,
        udp_stream: 180,
    };

    /// The key of the request of a client with this port.
    pub(crate) fn key(port: u16, protocol: u8) -> FlowKey<Address4> {
        let (source, destination) = (Ipv4Addr::new(10, 1, 0, 9), Ipv4Addr::new(10, 96, 0, 1));
        let (source_port, destination_port) = (Be16::new(port), Be16::new(80));
        let (source, destination) = (source.into(), destination.into());
        let tuple = Tuple { source, destination, source_port, destination_port };
        FlowKey { tuple, protocol: protocol.into() }
    }

    /// The flow of that client, whose backend has another address.
    pub(crate) fn flow_of(key: &FlowKey<Address4>, state: u8, last_seen: u32) -> NewFlow<Address4> {
        let mut rewrite = key.tuple;
        rewrite.destination = Ipv4Addr::new(10, 1, 0, 2).into();
        let flow = Flow { rewrite, action: Action::REQUEST, state, last_seen, ..Flow::default() };
        let mut new = NewFlow::default();
        (new.flow, new.protected, new.reply_action) = (flow, 60, Action::REPLY);
        new.reply_key.set_reverse(&rewrite, key.protocol);
        new
    }

    /// Inserts that flow.
    pub(crate) fn add<T: Flows<Address4>>(
        table: &T,
        key: &FlowKey<Address4>,
        state: u8,
        last_seen: u32,
    ) -> Result<(), InsertError> {
        let mut new = flow_of(key, state, last_seen);
        table.insert(key, &mut new, &track::lifetimes(&TIMEOUTS))
    }

    #[test]
    fn a_flow_is_found_by_both_directions_until_it_is_removed() {
        let table = FlowTable::<Address4>::anonymous(64).unwrap();
        let (tcp, udp) = (key(1000, TCP), key(1000, UDP));
        add(&table, &tcp, ANSWERED | CONFIRMED, 7).unwrap();
        assert_eq!(add(&table, &tcp, 0, 7), Err(InsertError::Exists));
        add(&table, &udp, 0, 7).unwrap();
        let found = table.find(&tcp, Direction::Request).unwrap();
        let reply = flow_of(&tcp, 0, 0).reply_key;
        assert_eq!(table.find(&reply, Direction::Reply), Some(found));
        assert_eq!((found.protocol(), found.class()), (TCP, Class::Established));
        assert_eq!((found.word.time(), found.entry.request), (7, tcp.tuple));
        assert_eq!(table.live().count(), 2);
        assert!(table.remove_unchanged(&found));
        assert!(!table.remove_unchanged(&found), "it is gone");
        assert_eq!(table.find(&tcp, Direction::Request), None);
        assert_eq!(table.find(&reply, Direction::Reply), None);
        assert!(!flow_table::may_have_reply(&table, &reply), "its reply word is cleared");
        assert_eq!(table.live().next().map(|flow| flow.protocol()), Some(UDP));
    }

    #[test]
    fn a_flow_with_a_new_packet_is_not_removed() {
        let table = FlowTable::<Address4>::anonymous(8).unwrap();
        add(&table, &key(1, TCP), 0, 7).unwrap();
        let read = table.live().next().unwrap();
        assert!(flow_table::note(&table, &read.found(), 0, ANSWERED, 8));
        assert!(!table.remove_unchanged(&read));
        assert_eq!(table.live().count(), 1);
    }

    #[test]
    fn a_table_takes_whole_buckets() {
        assert_eq!([0, 1, 8, 9, 65_536].map(buckets), [1, 1, 1, 2, 8192]);
    }

    #[test]
    fn a_flow_expires_by_the_timeout_of_its_state_and_protocol() {
        let lifetimes = track::lifetimes(&TIMEOUTS);
        let rows = [
            (ANSWERED | CONFIRMED, 1000),
            (0, 60),
            (IS_UDP, 30),
            (IS_UDP | lb_common::abi::flow::STREAM, 180),
        ];
        for (state, timeout) in rows {
            let word = RequestWord::default().claimed(1).live(state, 5);
            assert_eq!(lifetime(word, &lifetimes), timeout);
            assert!(!is_expired(word, 5 + timeout, &lifetimes), "{state}");
            assert!(is_expired(word, 6 + timeout, &lifetimes), "{state}");
            assert!(!is_expired(word, 4, &lifetimes), "it was seen later");
        }
    }

    #[test]
    fn times_are_seconds_once_the_settings_are_programmed() {
        let settings = Settings { ticks_per_second: 250, time_shift: 4, ..Settings::default() };
        assert_eq!(seconds(settings.times(64), &settings), Some(64));
        assert_eq!(seconds(5, &Settings::default()), None);
    }
}
