//! Values and modes that flags and configuration files choose.

pub mod modes;
pub mod sizes;
pub mod values;
