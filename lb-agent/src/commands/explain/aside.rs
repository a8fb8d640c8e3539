//! A table of flows for reading, with everything that is written to it kept aside.

use std::{cell::RefCell, collections::HashMap};

use lb_common::{
    abi::{
        address::Address,
        flow::Tuple,
        flow_table::{Direction, FlowEntry, FlowSeed, WAYS},
    },
    flow_table::Memory,
};

use crate::maps::flow_table::Flows;

/// The table `below`, as it would be after the writes.
#[derive(Debug)]
pub(super) struct Aside<'a, A, T> {
    below: &'a T,
    words: RefCell<HashMap<(Direction, u32, u32), u64>>,
    /// By bucket and word.
    filter: RefCell<HashMap<(u32, u32), u64>>,
    entries: RefCell<HashMap<u32, FlowEntry<A>>>,
}

impl<'a, A, T> Aside<'a, A, T> {
    /// Without any writes yet.
    pub(super) fn new(below: &'a T) -> Self {
        let (words, filter) = (RefCell::default(), RefCell::default());
        Self { below, words, filter, entries: RefCell::default() }
    }
}

impl<A: Clone, T> Clone for Aside<'_, A, T> {
    fn clone(&self) -> Self {
        let Self { below, words, filter, entries } = self;
        let (words, filter, entries) = (words.clone(), filter.clone(), entries.clone());
        Self { below, words, filter, entries }
    }
}

/// A bucket of one of the two arrays.
#[derive(Clone, Copy, Debug)]
pub(super) struct BucketAside<B> {
    below: B,
    direction: Direction,
    number: u32,
}

impl<B> BucketAside<B> {
    fn key(&self, way: u32) -> (Direction, u32, u32) {
        (self.direction, self.number, way % WAYS as u32)
    }
}

impl<A: Address, T: Flows<A>> Memory<A> for Aside<'_, A, T> {
    type Bucket = BucketAside<T::Bucket>;
    type Entry = u32;

    fn seed(&self) -> Option<&FlowSeed> {
        self.below.seed()
    }

    fn requests(&self, number: u32) -> Option<Self::Bucket> {
        let below = self.below.requests(number)?;
        Some(BucketAside { below, direction: Direction::Request, number })
    }

    fn replies(&self, number: u32) -> Option<Self::Bucket> {
        let below = self.below.replies(number)?;
        Some(BucketAside { below, direction: Direction::Reply, number })
    }

    fn load(&self, bucket: Self::Bucket, way: u32) -> u64 {
        let aside = self.words.borrow().get(&bucket.key(way)).copied();
        aside.unwrap_or_else(|| self.below.load(bucket.below, way))
    }

    fn swap(&self, bucket: Self::Bucket, way: u32, old: u64, new: u64) -> bool {
        let is_old = self.load(bucket, way) == old;
        if is_old {
            self.words.borrow_mut().insert(bucket.key(way), new);
        }
        is_old
    }

    fn filter_word(&self, bucket: u32, word: u32) -> u64 {
        let aside = self.filter.borrow().get(&(bucket, word)).copied().unwrap_or_default();
        aside | self.below.filter_word(bucket, word)
    }

    fn set_filter_bits(&self, bucket: u32, word: u32, bits: u64) {
        *self.filter.borrow_mut().entry((bucket, word)).or_default() |= bits;
    }

    fn entry(&self, place: u32) -> Option<u32> {
        self.below.entry(place)
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

impl<A: Address, T: Flows<A>> Flows<A> for Aside<'_, A, T> {
    fn places(&self) -> u32 {
        self.below.places()
    }

    fn copied(&self, place: u32) -> Option<FlowEntry<A>> {
        let aside = self.entries.borrow().get(&place).copied();
        aside.or_else(|| self.below.copied(place))
    }

    fn write(&self, place: u32, entry: &FlowEntry<A>) {
        self.entries.borrow_mut().insert(place, *entry);
    }
}

#[cfg(test)]
mod tests {
    use lb_common::{abi::frontend::TCP, flow_table::InsertError};

    use super::*;
    use crate::maps::flow_table::{
        FlowTable,
        tests::{add, key},
    };

    #[test]
    fn writes_are_seen_in_the_copy_and_not_below() {
        let below = FlowTable::anonymous(8).unwrap();
        let (known, new) = (key(1, TCP), key(2, TCP));
        add(&below, &known, 0, 0).unwrap();
        let aside = Aside::new(&below);
        add(&aside, &new, 0, 0).unwrap();
        assert_eq!(add(&aside, &known, 0, 0), Err(InsertError::Exists));
        let flow = aside.find(&known, Direction::Request).unwrap();
        assert!(aside.remove_unchanged(&flow));
        let has = |table: &dyn Fn(u16) -> bool| [1, 2].map(table);
        let fork = aside.clone();
        assert!(aside.remove_unchanged(&aside.find(&new, Direction::Request).unwrap()));
        let find = |port| below.find(&key(port, TCP), Direction::Request).is_some();
        assert_eq!(has(&find), [true, false]);
        let find = |port| fork.find(&key(port, TCP), Direction::Request).is_some();
        assert_eq!(has(&find), [false, true]);
        let find = |port| aside.find(&key(port, TCP), Direction::Request).is_some();
        assert_eq!(has(&find), [false, false]);
    }
}
