//! The kernel's connection tracking: its settings, its table and the ports that it uses.

pub mod ports;
pub mod sysctls;
pub mod table;
