//! The interfaces, addresses and routes of the node.

pub mod error;
pub mod follow;
pub mod interfaces;
mod messages;
pub mod survey;
