//! What lb reads that others have written, given anything: each target is a function of bytes that
//! panics if a promise about all inputs is broken.
//!
//! It is no place for behaviour: which answer a good input gets is tested beside the code. The
//! inputs in `corpus` run in the tests of this crate, as they are and damaged; `cargo xtask fuzz`
//! looks for others with libFuzzer.

#![forbid(unsafe_code)]

mod configuration;
pub mod corpus;
mod manifests;
mod netlink;
mod packets;

/// A reader, and the name of its directory in `corpus`.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The name.
    pub name: &'static str,
    /// Gives it an input; panics if a promise about all inputs is broken.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: [Target; 4] = [
    Target { name: "manifests", run: manifests::run },
    Target { name: "configuration", run: configuration::run },
    Target { name: "netlink", run: netlink::run },
    Target { name: "packets", run: packets::run },
];

/// The target of this name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|target| target.name == name)
}
