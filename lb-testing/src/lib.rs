//! What tests of the datapath are made of: packets, worlds, tables without a kernel, and the
//! behaviour cases that every interpreter of the datapath must pass.
//!
//! A [`case`] plays in a [`scene`] and does not know which [`interpreter`] runs it: the
//! [`host`], or the programs that the tests crate has loaded. A case that passes in one and
//! fails in the other shows a bug in an adapter. `tests/cases.rs` runs them on the host.

#![forbid(unsafe_code)]

pub mod bounds;
mod bytes;
pub mod case;
pub mod cases;
pub mod family;
pub mod flow;
pub mod flow_table;
pub mod frame;
pub mod host;
pub mod interpreter;
pub mod random;
pub mod scene;
pub mod site;
pub mod tables;
pub mod tunnel;
pub mod world;

#[cfg(test)]
mod tests;
