//! Tests of lb that need more than one crate, and what they are made of. `tests/README.md` says
//! which kind of test belongs where.

#[cfg(test)]
mod checks;
pub mod harness;
pub mod tools;
