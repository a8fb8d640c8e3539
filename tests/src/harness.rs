//! What tests are made of: clusters of network namespaces, clients and servers in them, a real
//! API server, and the loaded programs.

pub mod controlplane;
pub mod echo;

pub mod flows;
pub mod kernel;
pub mod netns;
pub mod programs;
pub mod real;
pub mod verify;
pub mod wait;
