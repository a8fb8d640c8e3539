//! `lb-bench datapath`: what the programs cost, packet by packet; `lb-bench faults`: see [`faults`];
//! `lb-bench traffic`: see [`traffic`]; `lb-bench scale`: see [`scale`]; `lb-bench listing`: see
//! [`listing`].
//!
//! `BPF_PROG_TEST_RUN` gives each packet to a wrapper, which restores the packet, picks the next
//! flow and tail-calls the real program. The wrapper with an empty program is measured in turn
//! and subtracted. COUNTERS must say afterwards that every packet ended as expected; otherwise
//! the figure is void. Some packets are run one by one, and the verdict and the resulting frame
//! are compared. The floors, which are the cost of the helpers that a program cannot do
//! without, come from the same run.
//!
//! Limits are those of docs/performance.md. A limit grows with the floor of its figure, as far
//! as that floor is slower here than on the reference machine; it never shrinks.
//!
//! The datapath bench does not measure throughput: there is one processor, and neither a device nor a stack.

#[path = "../../bench-ebpf/src/abi.rs"]
pub mod abi;
pub mod connects;
pub mod datapath;
pub mod faults;
pub mod floors;
pub mod flows;
pub mod frames;
pub mod harness;
pub mod lanes;
pub mod listing;
pub mod lookups;
pub mod namespace;
pub mod outside;
pub mod plot;
pub mod programs;
pub mod report;
pub mod scale;
pub mod stats;
pub mod tables;
pub mod traffic;
