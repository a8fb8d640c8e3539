//! What tests are written in: scenarios, manifests, frontends, expectations.

pub mod config_map;
pub mod fronts;
pub mod manifests;
mod programmed;
pub mod rows;
pub mod world;
