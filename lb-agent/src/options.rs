//! The types of the values that flags and configuration files set.

pub mod modes;
pub mod sizes;
pub mod values;
