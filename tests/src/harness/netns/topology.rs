//! What a cluster consists of: nodes, pods, the fabric between them, namespaces and cgroups.

pub mod cgroup;
pub mod cluster;
pub mod cni;
pub mod fabric;
pub mod namespace;
pub mod node;
mod overlay;
pub mod plan;
pub(in crate::harness::netns) mod second;
pub(crate) mod stale;
