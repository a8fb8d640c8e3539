//! What tests are written in: scenarios, manifests, frontends, expectations.

pub mod config_map;
pub mod expectations;
pub mod frontends;
pub mod manifests;
mod programmed;
pub mod scenario;

/// The earlier name of [`scenario`], for the tools that still use it.
pub mod world {
    pub use super::scenario::{PORT, Scenario as World, TARGET, expect};
}
