//! The layouts of maps as text, which agents leave in the kernel beside their maps, and conversion
//! of entries from one layout to another by the names of fields.

pub mod convert;
pub mod description;
pub mod pinned;
#[cfg(test)]
mod tests;
