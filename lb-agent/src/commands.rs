//! What `lb-agent` does beside `run`: one module for each command.

pub mod check;
pub mod cleanup;
pub mod drain;
pub mod explain;
pub mod get;
