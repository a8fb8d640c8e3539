//! The layout of every map: keys and values, one file per map family.
//!
//! It is not a place for logic. All types are `repr(C)`, free of padding and of
//! values that some bit pattern would make invalid, so that whatever a map holds
//! may be read.

pub mod address;
pub mod affinity;
pub mod backend;
pub mod counter;
pub mod flow;
pub mod fragment;
pub mod frontend;
pub mod ip;
pub mod range;
pub mod service;
pub mod settings;
pub mod socket;
pub mod traffic;

/// Version of the layout, part of the path that maps are pinned under
/// (`<bpf-dir>/v<ABI_VERSION>/<MAP>`): a change of any type here bumps it.
pub const ABI_VERSION: u32 = 3;
