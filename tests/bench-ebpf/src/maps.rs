//! The maps of the wrappers and of the steps.

use aya_ebpf::{
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray},
    macros::btf_map,
};
use lb_common::abi::{
    address::{Address4, Address6},
    flow::{Flow, FlowKey},
    flow_table::{self, Bucket, FlowBucket, FlowFilter, FlowSeed},
    settings::Settings,
};

use crate::{
    abi::{Lane, MAX_NUMBERS, MAX_TARGETS},
    steps::Scratch,
};

/// BPF_F_MMAPABLE: `lb-bench` stores into the map without a system call.
const MAPPED: usize = 0x400;

/// The packet to restore and the target to run. Written by `lb-bench`.
#[btf_map]
pub static LANE: Array<Lane, 1> = Array::new();
/// The flows that are known, if there are several: those that fit into the table. Written by
/// `lb-bench`.
#[btf_map]
pub static NUMBERS: Array<u32, MAX_NUMBERS, MAPPED> = Array::new();
/// How many packets the wrappers have restored. Written by the wrappers.
#[btf_map]
pub static RUNS: PerCpuArray<u64, 1> = PerCpuArray::new();
/// The tc programs to measure. Written by `lb-bench`.
#[btf_map]
pub static TARGETS: ProgramArray<MAX_TARGETS> = ProgramArray::new();
/// The XDP programs to measure. Written by `lb-bench`.
#[btf_map]
pub static XDP_TARGETS: ProgramArray<MAX_TARGETS> = ProgramArray::new();

/// An LRU of flows, one entry for each direction.
type Flows<A, const ENTRIES: usize> = LruHashMap<FlowKey<A>, Flow<A>, ENTRIES>;

/// One flow. Written by `lb-bench`.
#[btf_map]
pub static HASH4: HashMap<FlowKey<Address4>, Flow<Address4>, 65536> = HashMap::new();
/// `lb-bench` sets its size. Written by `lb-bench` and `insert4`.
#[btf_map]
pub static LRU4: Flows<Address4, 262144> = LruHashMap::new();
/// `lb-bench` sets its size. Written by `lb-bench` and `insert6`.
#[btf_map]
pub static LRU6: Flows<Address6, 262144> = LruHashMap::new();
/// Written by `insert_small4`.
#[btf_map]
pub static SMALL_LRU4: Flows<Address4, 16384> = LruHashMap::new();
/// Written by `insert_small6`.
#[btf_map]
pub static SMALL_LRU6: Flows<Address6, 16384> = LruHashMap::new();

// A table of flows like lb's. `lb-bench` sets its sizes and puts flows into it.

/// Written by `lb-bench`.
#[btf_map]
pub static FLOW_SEED: Array<FlowSeed, 1, MAPPED> = Array::new();
/// Written by `lb-bench` and `table_insert4`.
#[btf_map]
pub static FLOW_TABLE4: Array<FlowBucket<Address4>, 16384, MAPPED> = Array::new();
/// Written by `lb-bench` and `table_insert6`.
#[btf_map]
pub static FLOW_TABLE6: Array<FlowBucket<Address6>, 16384, MAPPED> = Array::new();
/// Written by `lb-bench` and `table_insert4`.
#[btf_map]
pub static FLOW_REPLIES4: Array<Bucket, 32768, MAPPED> = Array::new();
/// Written by `lb-bench` and `table_insert6`.
#[btf_map]
pub static FLOW_REPLIES6: Array<Bucket, 32768, MAPPED> = Array::new();
/// Written by `lb-bench` and `table_insert4`.
#[btf_map]
pub static FLOW_FILTER4: Array<FlowFilter, 16384, MAPPED> = Array::new();
/// Written by `lb-bench` and `table_insert6`.
#[btf_map]
pub static FLOW_FILTER6: Array<FlowFilter, 16384, MAPPED> = Array::new();
/// Written by `table_insert4` and `table_insert6`.
#[btf_map]
pub static FLOW_EVENTS: PerCpuArray<u64, { flow_table::EVENTS }> = PerCpuArray::new();
/// How long flows live. Written by `lb-bench`.
#[btf_map]
pub static SETTINGS: Array<Settings, 1> = Array::new();
/// The working memory of the steps of the table, IPv4.
#[btf_map]
pub static SCRATCH4: PerCpuArray<Scratch<Address4>, 1> = PerCpuArray::new();
/// The working memory of the steps of the table, IPv6.
#[btf_map]
pub static SCRATCH6: PerCpuArray<Scratch<Address6>, 1> = PerCpuArray::new();
