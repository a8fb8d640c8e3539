//! How programs convert entries of a map that is taken over: a load-time constant for each such
//! map, which the agent writes and `lb-ebpf/src/tables/handover.rs` reads.
//!
//! A step copies 1, 2, 4 or 8 bytes. It is one word: the offset in the source, the offset in the
//! result, the number of bytes, a byte each; 0 ends the steps.

/// The conversion of a map, as words in host byte order; all zero if the map stays the same one.
pub type ConversionWords = [u32; WORDS];

/// Flows are in the maps of this agent, which are those of the agent before.
pub const SAME: u32 = 0;
/// Flows are in FLOWS and EMBRYONIC: hash maps that releases up to 0.1.0 had.
pub const IN_HASHES: u32 = 1;
/// Flows are in a table of another size.
pub const IN_TABLE: u32 = 2;

/// The position of the word that says whether the map is moved.
pub const MOVED: usize = 0;
/// The first step that makes a key of the layout before.
pub const KEY: usize = 1;
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

/// The largest key of a layout before that the programs have room for, bytes.
pub const LARGEST_KEY: usize = 64;
/// The largest value of a layout before that the programs have room for, bytes.
pub const LARGEST_VALUE: usize = 128;
