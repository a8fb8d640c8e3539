//! Programs of their own, each behind a binary in `src/bin`: the benchmark, the demonstration,
//! upstream's end-to-end tests, flow vectors, and what is tried on other kernels.

pub mod bench;
pub mod demo;
pub mod e2e;
pub mod vectors;
pub mod vm;
