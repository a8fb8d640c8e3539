//! The loaded programs, run on frames through `BPF_PROG_TEST_RUN`.

mod dataplane;
mod frames;
mod next_hop;
