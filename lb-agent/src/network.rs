//! The interfaces, addresses and routes of the node, and which programs belong on them.

pub mod dump;
pub mod error;
pub mod follow;
pub mod interfaces;
pub mod messages;
pub mod own_packets;
mod rules;
mod sources;
pub mod survey;
