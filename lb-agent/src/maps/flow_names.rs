//! The maps of the table of flows: their names, and how many elements they have.

use lb_common::abi::{
    address::{Address, Address4, Address6},
    flow_table::WAYS,
};

/// A family's maps of flows.
pub trait FlowAddress: Address {
    /// FLOW_TABLE.
    const TABLE: &'static str;
    /// FLOW_REPLIES.
    const REPLIES: &'static str;
    /// FLOW_FILTER.
    const FILTER: &'static str;
}

impl FlowAddress for Address4 {
    const TABLE: &'static str = "FLOW_TABLE4";
    const REPLIES: &'static str = "FLOW_REPLIES4";
    const FILTER: &'static str = "FLOW_FILTER4";
}

impl FlowAddress for Address6 {
    const TABLE: &'static str = "FLOW_TABLE6";
    const REPLIES: &'static str = "FLOW_REPLIES6";
    const FILTER: &'static str = "FLOW_FILTER6";
}

/// The map that has the seed of both families' tables.
pub const SEED: &str = "FLOW_SEED";

/// The maps that a seed is for. They are made together: an entry is of no use with another seed or
/// another number of buckets.
pub const MAPS: [&str; 7] = [
    SEED,
    Address4::TABLE,
    Address4::REPLIES,
    Address4::FILTER,
    Address6::TABLE,
    Address6::REPLIES,
    Address6::FILTER,
];

/// How many buckets a table for so many flows has.
pub const fn buckets(flows: u32) -> u32 {
    if flows == 0 { 1 } else { flows.div_ceil(WAYS as u32) }
}
