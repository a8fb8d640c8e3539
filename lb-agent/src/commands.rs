//! The commands of `lb-agent` other than `run`, one module each.

pub mod check;
pub mod cleanup;
pub mod drain;
pub mod explain;
pub mod get;
