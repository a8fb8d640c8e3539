//! What tests are written in: scenarios, manifests, frontends, expectations.

pub mod config_map;
pub mod expectations;
pub mod frontends;
pub mod manifests;
mod programmed;
pub mod scenario;
