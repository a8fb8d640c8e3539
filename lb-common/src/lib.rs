//! ABI and datapath core.
#![no_std]
