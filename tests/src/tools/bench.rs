//! `lb-bench datapath`: what the programs cost, packet by packet.
//!
//! A packet is given to the real program by `BPF_PROG_TEST_RUN`, through a wrapper that puts
//! it back into its first state, picks the next flow and tail-calls the program; the wrapper
//! with an empty program is measured turn about and taken off. COUNTERS must say afterwards
//! that every single packet met the expected end, or the figure is void. What the program
//! returns, and the frame that it leaves, are looked at for some packets run one by one. The
//! floors, which say what the helpers cost that a program cannot do without, come from the
//! same run.
//!
//! Limits are those of docs/performance.md. A limit grows with the floor of its figure, as far
//! as that floor is slower here than on the reference machine; it never shrinks.
//!
//! It is no measurement of throughput: no device, no stack, one processor.

#[path = "../../bench-ebpf/src/abi.rs"]
pub mod abi;
pub mod connects;
pub mod datapath;
pub mod floors;
pub mod flows;
pub mod frames;
pub mod harness;
pub mod lanes;
pub mod lookups;
pub mod namespace;
pub mod outside;
pub mod programs;
pub mod report;
pub mod stats;
pub mod tables;
