//! The kernel's connection tracking (nf_conntrack): its sysctls, its table and its source ports.

pub mod ports;
pub mod sysctls;
pub mod table;
