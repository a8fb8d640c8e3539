//! The commands of `lb-agent` other than `run`, one module each.

pub mod attached;
pub mod bench;
pub mod check;
pub mod cleanup;
pub mod documents;
pub mod drain;
pub mod explain;
pub mod get;
pub mod ready;
pub mod status;
pub mod sysdump;
