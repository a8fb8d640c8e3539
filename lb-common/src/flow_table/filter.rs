//! FLOW_FILTER: what there is to find for the packets of a client, by its address, port and protocol.
//!
//! Each bucket of FLOW_TABLE has 64 cells there, and a hash of the client chooses the cell. If it is empty,
//! no flow has the client, so one load tells almost every packet of no Service that no flow can be meant.
//!
//! Bits are set by insertions and are not cleared with their flow. So a cell has its two bits twice, side
//! by side. Programs look into one of these copies, and set bits in both at once. The agent's sweep
//! clears the other one, enters every live flow, and tells the programs to look there. No bit that is
//! needed gets lost: a program sets its bits again once its flow is live, and a flow that became live
//! before the copy was cleared is entered by the agent.

use crate::abi::{
    address::Address,
    flow_table::{FILTER_WORDS, FlowSeed},
};

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
    word: u32,
    /// Where in the word its bits begin: those of the first copy, then those of the second.
    shift: u32,
}

/// The bits of a cell in one copy.
const COPY_BITS: u32 = 2;
/// The bits of a cell.
const CELL_BITS: u32 = 2 * COPY_BITS;
/// The cells of a word.
const CELLS: u32 = u64::BITS / CELL_BITS;

/// In every word of FLOW_FILTER, the bits of one copy, 0 or 1.
pub const fn bits_of_copy(copy: u32) -> u64 {
    let of_first = (HOME | AWAY) * (u64::MAX / ((1 << CELL_BITS) - 1));
    of_first << (copy % 2 * COPY_BITS)
}

impl Cell {
    /// The cell of a client whose home has this hash, in a table with so many buckets. The part of the
    /// product that does not choose the bucket chooses the cell.
    #[inline(always)]
    const fn of(home: u32, buckets: u32) -> Self {
        const OF_BUCKET: u32 = CELLS * FILTER_WORDS as u32;
        let product = home as u64 * buckets as u64;
        let cell = (product as u32) >> (u32::BITS - OF_BUCKET.ilog2());
        Self {
            bucket: (product >> u32::BITS) as u32,
            word: cell / CELLS,
            shift: cell % CELLS * CELL_BITS,
        }
    }
}

/// The bits of the client's cell, [`HOME`] and [`AWAY`], in the copy that is in use.
#[inline(always)]
pub fn read<A: Address, M: Memory<A>>(memory: &M, hash: Hash) -> u64 {
    let Some(seed) = memory.seed() else { return HOME | AWAY };
    let copy = seed.filter::<A>() & 1;
    load(memory, hash, seed) >> (copy * COPY_BITS) & (HOME | AWAY)
}

/// The bits of the client's cell in either copy.
#[inline(always)]
pub(super) fn read_both<A: Address, M: Memory<A>>(memory: &M, hash: Hash) -> u64 {
    let Some(seed) = memory.seed() else { return HOME | AWAY };
    let cell = load(memory, hash, seed);
    (cell | cell >> COPY_BITS) & (HOME | AWAY)
}

/// The client's cell, in the lowest bits.
#[inline(always)]
fn load<A: Address, M: Memory<A>>(memory: &M, hash: Hash, seed: &FlowSeed) -> u64 {
    let Cell { bucket, word, shift } = Cell::of(hash.home, seed.buckets::<A>());
    memory.filter_word(bucket, word) >> shift
}

/// Sets bits of the client's cell in both copies.
#[inline(always)]
pub(super) fn enter<A: Address, M: Memory<A>>(memory: &M, hash: Hash, bits: u64) {
    let Some(seed) = memory.seed() else { return };
    let Cell { bucket, word, shift } = Cell::of(hash.home, seed.buckets::<A>());
    let bits = (bits | bits << COPY_BITS) << shift;
    // To set bits takes the cache line from the other CPUs.
    if memory.filter_word(bucket, word) & bits != bits {
        memory.set_filter_bits(bucket, word, bits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_of_every_bucket_is_used() {
        const BUCKETS: u32 = 3;
        const ALL: u32 = BUCKETS * 64;
        let mut is_used = [false; ALL as usize];
        for number in 0..ALL {
            let step = u32::MAX / ALL;
            let Cell { bucket, word, shift } = Cell::of(number * step + step / 2, BUCKETS);
            is_used[(bucket * 64 + word * CELLS + shift / CELL_BITS) as usize] = true;
        }
        assert_eq!(is_used, [true; ALL as usize]);
    }

    #[test]
    fn the_copies_share_no_bit() {
        assert_eq!([0, 1].map(bits_of_copy), [0x3333_3333_3333_3333, 0xcccc_cccc_cccc_cccc]);
    }
}
