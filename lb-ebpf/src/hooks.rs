//! The adapters between the kernel's hooks and the core.

pub mod sock;
pub mod tc;
pub mod xdp;
