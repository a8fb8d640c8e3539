//! What tests of the datapath are made of: packets, worlds, tables without a kernel, and
//! the rows of behaviour that every interpreter of the datapath must show.
//!
//! The rows ([`cases`]) know nothing of who runs them: they talk to a [`scene::Lab`], of
//! which [`host`] is one and the loaded programs are another. A row that passes in one
//! and fails in another shows a bug in an adapter.

#![forbid(unsafe_code)]

mod bytes;
pub mod cases;
pub mod family;
pub mod frame;
pub mod host;
pub mod scene;
pub mod tables;
pub mod tunnel;
pub mod world;

#[cfg(test)]
mod tests;
