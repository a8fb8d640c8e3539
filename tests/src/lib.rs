//! Tests of lb that need more than one crate, and what they are made of.
//!
//! [`netns`] builds nodes, pods and an outside client from network namespaces; [`echo`] is what
//! runs in them: servers that say which client they saw, and clients that say who answered.
//! [`controlplane`] is a real API server with its controllers. [`programs`] loads the eBPF
//! object, [`flows`] runs the rows of behaviour through it, and [`verify`] tells what the
//! verifier thought of it.
//! [`demo`] shows it all to a newcomer, [`vm`] tries what depends on the kernel on others.
//! [`vectors`] holds lb to the answers of kube-proxy.

pub mod bench;
mod contract;
pub mod controlplane;
pub mod demo;
pub mod echo;
pub mod flows;
pub mod netns;
pub mod programs;
pub mod vectors;
pub mod verify;
pub mod vm;
