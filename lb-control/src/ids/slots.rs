//! Blocks of SLOTS. Sizes are powers of two and a block starts at a multiple of its size, so
//! that neighbouring free blocks can be merged, and a range found in the maps tells where its
//! block is.

use std::collections::BTreeSet;

use super::Quarantine;

/// A block of slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Block {
    /// The first slot.
    pub start: u32,
    /// The size is two to the power of this.
    pub order: u8,
}

impl Block {
    /// How many slots.
    pub fn capacity(self) -> u32 {
        1 << self.order
    }
}

/// The order of the smallest block that holds `length` slots.
pub fn order_of(length: u32) -> u8 {
    length.max(1).next_power_of_two().trailing_zeros() as u8
}

/// The order of a block that holds `length` slots and a quarter more, so that a set can grow
/// before it has to move.
pub fn roomy_order_of(length: u32) -> u8 {
    order_of(length.saturating_add(length.div_ceil(4)))
}

const ORDERS: usize = 31;

/// The free blocks.
#[derive(Debug)]
pub struct Blocks {
    free: [BTreeSet<u32>; ORDERS],
    quarantine: Quarantine<Block>,
}

impl Blocks {
    /// The slots below `limit`, all free.
    pub fn new(limit: u32) -> Self {
        let mut blocks = Self {
            free: std::array::from_fn(|_| BTreeSet::new()),
            quarantine: Quarantine::default(),
        };
        let mut start = 0;
        for order in (0..ORDERS).rev() {
            if limit & (1 << order) != 0 {
                blocks.free[order].insert(start);
                start += 1 << order;
            }
        }
        blocks
    }

    /// How many slots are free.
    pub fn available(&self) -> usize {
        self.free.iter().enumerate().map(|(order, blocks)| blocks.len() << order).sum()
    }

    /// How many slots the largest free block has.
    pub fn largest(&self) -> usize {
        let largest = self.free.iter().rposition(|blocks| !blocks.is_empty());
        largest.map_or(0, |order| 1 << order)
    }

    /// Allocates the first free block of an order, cut from a larger one if necessary.
    pub fn allocate(&mut self, order: u8) -> Option<Block> {
        let order = usize::from(order);
        let found = (order..ORDERS).find(|order| !self.free[*order].is_empty())?;
        let start = self.free[found].pop_first()?;
        for order in order..found {
            self.free[order].insert(start + (1 << order));
        }
        Some(Block { start, order: order as u8 })
    }

    /// Allocates this very block; false if a part of it is in use already.
    pub fn reserve(&mut self, block: Block) -> bool {
        let start_at = |order: usize| block.start & !((1u32 << order) - 1);
        if block.order as usize >= ORDERS || start_at(block.order.into()) != block.start {
            return false;
        }
        let mut holders = usize::from(block.order)..ORDERS;
        let Some(found) = holders.find(|order| self.free[*order].contains(&start_at(*order)))
        else {
            return false;
        };
        self.free[found].remove(&start_at(found));
        for order in usize::from(block.order)..found {
            let half = start_at(order);
            self.free[order].insert(half ^ (1 << order));
        }
        true
    }

    /// Frees a block that packets may still read, once the grace period is over.
    pub fn free_after_grace(&mut self, block: Block) {
        self.quarantine.add(block);
    }

    /// Frees a block that no packet ever saw.
    pub fn free_at_once(&mut self, block: Block) {
        let (mut start, mut order) = (block.start, usize::from(block.order));
        while order + 1 < ORDERS && self.free[order].remove(&(start ^ (1 << order))) {
            start &= !(1 << order);
            order += 1;
        }
        self.free[order].insert(start);
    }

    /// Puts the free slots below `end` into quarantine, because they may have been in use
    /// until just now.
    pub fn quarantine_below(&mut self, end: u32) {
        for order in (0..ORDERS).rev() {
            let free = &mut self.free[order];
            let above = free.split_off(&end);
            for start in std::mem::replace(free, above) {
                if order == 0 || start + (1 << order) <= end {
                    self.quarantine.add(Block { start, order: order as u8 });
                } else {
                    self.free[order - 1].extend([start, start + (1 << (order - 1))]);
                }
            }
        }
    }

    /// Makes the blocks available whose grace period is over, and returns whether there were
    /// any.
    pub fn reclaim(&mut self, now: u64, grace: u64) -> bool {
        let due = self.quarantine.expire(now, grace);
        due.iter().for_each(|block| self.free_at_once(*block));
        !due.is_empty()
    }

    /// When the next block may become available, if any is waiting.
    pub fn next_due(&self, now: u64, grace: u64) -> Option<u64> {
        self.quarantine.next_due(now, grace)
    }
}
