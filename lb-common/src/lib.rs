//! The parts that lb's eBPF programs and its agent share: the layout of every map ([`abi`]), the
//! parser of packets ([`packet`]) and the decision on each packet ([`balance`]).
//!
//! Nothing here allocates, does I/O, reads a clock or writes to a packet. Time, random numbers and
//! state come in through [`balance::Tables`]; the decision goes out as a [`balance::Verdict`].
#![no_std]
#![deny(unsafe_code)]

pub mod abi;
pub mod balance;
pub mod flow_table;
pub mod packet;
