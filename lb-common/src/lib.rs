//! What the eBPF programs and the agent of lb share: the layout of every map
//! ([`abi`]), the reading of packets ([`packet`]) and the decisions taken on
//! them ([`balance`]).
//!
//! Nothing here allocates, does I/O, reads a clock or writes to a packet: time,
//! randomness and state come in through [`balance::Tables`], what to do with the
//! packet goes out as a [`balance::Verdict`].
#![no_std]
#![deny(unsafe_code)]

pub mod abi;
pub mod balance;
pub mod packet;
