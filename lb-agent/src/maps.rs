//! The pinned maps: where they are, and how the agent opens, reads and writes them.

pub mod bpffs;
pub mod carry;
pub mod devices;
pub mod fill;
mod flow_names;
pub mod flow_table;
pub mod former;
pub mod handover;
pub mod kept;
pub mod kernel;
pub mod layouts;
pub mod lock;
pub mod mapped;
pub mod memory;
pub mod pins;
pub mod read;
pub mod source_ports;
pub mod sources;
pub mod sweep;
pub mod timeouts;
pub mod traffic;
