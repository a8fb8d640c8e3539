//! How programs convert entries of a map that is taken over: a load-time constant for each such
//! map, which the agent writes and `lb-ebpf/src/tables/handover.rs` reads.
//!
//! A step copies 1, 2, 4 or 8 bytes. It is one word: the offset in the source, the offset in the
//! result, the number of bytes, a byte each; 0 ends the steps.

/// The conversion of a map, as words in host byte order; all zero if the map stays the same one.
pub type ConversionWords = [u32; WORDS];

/// The position of the word that says which maps are moved: a set of [`MOVED_TABLE`] and
/// [`MOVED_EMBRYONIC`].
pub const MOVED: usize = 0;
/// FLOWS, FRAGMENTS or DATAGRAM_PEERS is moved.
pub const MOVED_TABLE: u32 = 1;
/// EMBRYONIC is moved, which shares its conversion with FLOWS.
pub const MOVED_EMBRYONIC: u32 = 2;
/// The position of the offset of the state in the layout before, bytes.
pub const STATE: usize = 1;
/// The position of the offset of the time of the last packet in the layout before, bytes.
pub const LAST_SEEN: usize = 2;
/// The position of the offset of the next hop in the layout before, bytes, plus
/// [`HAS_NEXT_HOP`]; 0 if that layout has none.
pub const NEXT_HOP: usize = 3;
/// The first step that makes a key of the layout before.
pub const KEY: usize = 4;
/// The first step that makes a value of this release.
pub const OWN: usize = KEY + KEY_STEPS;
/// The first step that makes a value of the layout before.
pub const BEFORE: usize = OWN + VALUE_STEPS;
/// The number of words.
pub const WORDS: usize = BEFORE + VALUE_STEPS;

/// The most steps that make a key.
pub const KEY_STEPS: usize = 16;
/// The most steps that make a value.
pub const VALUE_STEPS: usize = 24;
/// The layout before has a next hop.
pub const HAS_NEXT_HOP: u32 = 256;

/// The largest key of a layout before that the programs have room for, bytes.
pub const LARGEST_KEY: usize = 64;
/// The largest value of a layout before that the programs have room for, bytes.
pub const LARGEST_VALUE: usize = 128;
