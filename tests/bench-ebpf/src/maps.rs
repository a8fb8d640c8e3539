//! The maps of the wrappers and of the steps.

use aya_ebpf::{
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray},
    macros::btf_map,
};
use lb_common::abi::{
    address::{Address4, Address6},
    flow::{Flow, FlowKey},
};

use crate::abi::{Lane, MAX_TARGETS};

/// The packet to restore and the target to run. Written by `lb-bench`.
#[btf_map]
pub static LANE: Array<Lane, 1> = Array::new();
/// How many packets the wrappers have restored. Written by the wrappers.
#[btf_map]
pub static RUNS: PerCpuArray<u64, 1> = PerCpuArray::new();
/// The tc programs to measure. Written by `lb-bench`.
#[btf_map]
pub static TARGETS: ProgramArray<MAX_TARGETS> = ProgramArray::new();
/// The XDP programs to measure. Written by `lb-bench`.
#[btf_map]
pub static XDP_TARGETS: ProgramArray<MAX_TARGETS> = ProgramArray::new();

/// A map of flows like those of lb.
type Flows<A, const ENTRIES: usize> = LruHashMap<FlowKey<A>, Flow<A>, ENTRIES>;

/// One flow. Written by `lb-bench`.
#[btf_map]
pub static HASH4: HashMap<FlowKey<Address4>, Flow<Address4>, 65536> = HashMap::new();
/// Like FLOWS4; `lb-bench` sets its size. Written by `lb-bench` and `insert4`.
#[btf_map]
pub static LRU4: Flows<Address4, 262144> = LruHashMap::new();
/// Like FLOWS6; `lb-bench` sets its size. Written by `lb-bench` and `insert6`.
#[btf_map]
pub static LRU6: Flows<Address6, 262144> = LruHashMap::new();
/// Like EMBRYONIC4. Written by `insert_small4`.
#[btf_map]
pub static SMALL_LRU4: Flows<Address4, 16384> = LruHashMap::new();
/// Like EMBRYONIC6. Written by `insert_small6`.
#[btf_map]
pub static SMALL_LRU6: Flows<Address6, 16384> = LruHashMap::new();
