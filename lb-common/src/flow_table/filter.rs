//! FLOW_FILTER: what there is to find for the packets of a client, by its address, port and protocol.
//!
//! Each bucket of FLOW_TABLE has 64 cells of two bits there, and a hash of the client chooses the cell.
//! If it is empty, no flow has the client, so one load tells almost every packet of no Service that no
//! flow can be meant.
//!
//! Bits are set by insertions and are not cleared with their flow. So there are two copies of all
//! cells. Programs look into one of them, and set bits in both. The agent's sweep clears the other one,
//! enters every live flow, and tells the programs to look there. No bit that is needed gets lost: a
//! program sets its bits again once its flow is live, and a flow that became live before the copy was
//! cleared is entered by the agent.

use crate::abi::{address::Address, flow_table::FILTER_WORDS};

use super::{Hash, Memory};

/// A flow has this client: its replies, if they are to the client itself, are looked for at home, and its
/// requests may be found.
pub const HOME: u64 = 1;
/// A flow whose replies have this destination is to be found by its word in FLOW_REPLIES.
pub const AWAY: u64 = 2;

/// Where a cell is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cell {
    bucket: u32,
    /// Which word of a copy.
    word: u32,
    /// Where in the word its bits begin.
    shift: u32,
}

/// The words of one of the two copies of a bucket's cells.
const COPY_WORDS: u32 = FILTER_WORDS as u32 / 2;

impl Cell {
    /// The cell of a client whose home has this hash, in a table with so many buckets. The part of the
    /// product that does not choose the bucket chooses the cell.
    #[inline(always)]
    const fn of(home: u32, buckets: u32) -> Self {
        const CELLS: u32 = COPY_WORDS * u64::BITS / 2;
        let product = home as u64 * buckets as u64;
        let cell = ((product as u32) >> (u32::BITS - CELLS.ilog2())) & (CELLS - 1);
        Self { bucket: (product >> 32) as u32, word: cell / 32, shift: cell % 32 * 2 }
    }
}

/// The bits of the client's cell, [`HOME`] and [`AWAY`], in the copy that is in use.
#[inline(always)]
pub fn read<A: Address, M: Memory<A>>(memory: &M, hash: Hash) -> u64 {
    let Some(seed) = memory.seed() else { return HOME | AWAY };
    let cell = Cell::of(hash.home, seed.buckets::<A>());
    let copy = seed.filter::<A>() & 1;
    memory.filter_word(cell.bucket, copy * COPY_WORDS + cell.word) >> cell.shift & (HOME | AWAY)
}

/// The bits of the client's cell in either copy.
#[inline(always)]
pub(super) fn read_both<A: Address, M: Memory<A>>(memory: &M, hash: Hash) -> u64 {
    let Some(seed) = memory.seed() else { return HOME | AWAY };
    let cell = Cell::of(hash.home, seed.buckets::<A>());
    let both = memory.filter_word(cell.bucket, cell.word)
        | memory.filter_word(cell.bucket, COPY_WORDS + cell.word);
    both >> cell.shift & (HOME | AWAY)
}

/// Sets bits of the client's cell in both copies.
#[inline(always)]
pub(super) fn enter<A: Address, M: Memory<A>>(memory: &M, hash: Hash, bits: u64) {
    let Some(seed) = memory.seed() else { return };
    let cell = Cell::of(hash.home, seed.buckets::<A>());
    let bits = bits << cell.shift;
    let mut copy = 0;
    while copy < 2 {
        let word = copy * COPY_WORDS + cell.word;
        // Most bits are there already: to set one takes the cache line from the other CPUs.
        if memory.filter_word(cell.bucket, word) & bits != bits {
            memory.set_filter_bits(cell.bucket, word, bits);
        }
        copy += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_of_every_bucket_is_used() {
        const BUCKETS: u32 = 3;
        let cell = |home| Cell::of(home, BUCKETS);
        let step = u32::MAX / (BUCKETS * 64);
        let cells: std::collections::BTreeSet<_> = (0..BUCKETS * 64)
            .map(|number| cell(number * step + step / 2))
            .map(|cell| (cell.bucket, cell.word, cell.shift))
            .collect();
        assert_eq!(cells.len(), 3 * 64);
        let last = cells.last().copied();
        assert_eq!(last, Some((2, COPY_WORDS - 1, 62)));
    }
}
