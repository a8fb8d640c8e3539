//! The interfaces, addresses and routes of the node, and which programs belong on them.

pub mod error;
pub mod follow;
pub mod interfaces;
mod messages;
pub mod survey;
