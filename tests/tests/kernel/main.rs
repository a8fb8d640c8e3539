//! The loaded programs, run on frames through `BPF_PROG_TEST_RUN`, and the agent's maps and
//! hooks in the kernel.

mod attach;
mod flows;
mod frames;
mod maps;
mod next_hop;
mod sandbox;
