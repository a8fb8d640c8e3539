//! Programs of their own, each behind a binary in `src/bin`: the benchmark, the demonstration,
//! flow vectors, and what is tried on other kernels.

pub mod bench;
pub mod demo;
pub mod vectors;
pub mod vm;
