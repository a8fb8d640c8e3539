//! Loads the programs and attaches them to their hooks.

pub mod cgroup;
pub mod clsact;
pub mod features;
pub mod hook;
pub mod links;
pub mod load;
pub mod names;
mod order;
pub mod prepare;
pub mod tc;
pub mod xdp;
