//! tests

pub mod controlplane;
