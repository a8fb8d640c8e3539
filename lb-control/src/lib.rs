//! What the agent decides: `snapshot -> desired -> plan -> execute`.
//!
//! Objects of the cluster come in as [events](model::event), writes of maps go out through
//! the trait [`Dataplane`](dataplane::Dataplane). Every decision is a function of its
//! arguments: this crate reads no clock, no file and no socket, and the time is passed to
//! it. `lb-agent` is the shell around it.
#![forbid(unsafe_code)]

pub mod controller;
pub mod dataplane;
pub mod desired;
pub mod execute;
pub mod ids;
pub mod model;
pub mod options;
pub mod plan;
pub mod snapshot;
mod work;
