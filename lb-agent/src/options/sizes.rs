//! The capacities of the maps.

/// The capacities of the maps, in entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// `--max-services`.
    pub services: u32,
    /// `--max-backends`.
    pub backends: u32,
    /// `--max-slots`.
    pub slots: u32,
    /// `--max-flows`.
    pub flows: u32,
}
