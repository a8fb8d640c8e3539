//! The pinned maps: where they are, and how the agent opens, reads and writes them.

pub mod bpffs;
pub mod devices;
pub mod kernel;
pub mod lock;
pub mod mapped;
pub mod pins;
pub mod read;
pub mod sweep;
pub mod timeouts;
pub mod traffic;
