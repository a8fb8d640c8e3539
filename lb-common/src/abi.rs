//! The layout of every map: keys and values, one file for each family of maps.
//!
//! There is no logic here. Every type is `repr(C)`, has no padding, and is valid for every bit
//! pattern, so that any bytes in a map can be read as the type.

pub mod address;
pub mod affinity;
pub mod backend;
pub mod conversion;
pub mod counter;
pub mod flow;
pub mod flow_table;
pub mod fragment;
pub mod frontend;
pub mod ip;
pub mod layout;
pub mod range;
pub mod service;
pub mod settings;
pub mod socket;
pub mod source;
pub mod traffic;

/// The version of the layout as a whole. Each map is pinned as `<bpf-dir>/maps/<MAP>@<VERSION>`, with
/// a version of its own. Every change of a type in this module needs another version; appending a hook or a reason does not (see
/// [`counter`]).
pub const ABI_VERSION: u32 = 5;
