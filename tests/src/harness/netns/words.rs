//! What tests are written in: scenarios, manifests, frontends, expectations.

pub mod config_map;
pub mod expectations;
pub mod fronts;
pub mod manifests;
mod programmed;
pub mod scenario;

/// The earlier name of [`scenario`], for the tools that still use it.
pub mod world {
    pub use super::scenario::{PORT, SMALL_MAPS, Scenario as World, TARGET, expect};
}

/// The earlier name of [`expectations`], for the tools that still use it.
pub mod rows {
    pub use super::expectations::Expectations as Rows;
}
