//! The node agent: `watch -> snapshot -> desired -> plan -> execute`.
//!
//! The middle (`snapshot`, `desired`, `ids`, `plan`) is pure: functions of their
//! arguments, no clock, no I/O. `watch` and `dataplane` are the two shells.

pub mod cli;
pub mod config;
pub mod events;
pub mod health;
pub mod metrics;
pub mod watch;
