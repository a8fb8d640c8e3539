//! Packets: raw frames, captures, HTTP, tunnels, L3 devices, offloads, and the rules and programs of others.

pub mod capture;
pub mod foreign;
pub mod http;
pub mod ipip;
pub(crate) mod netfilter;
pub mod offload;
pub mod raw;
pub mod tun;
