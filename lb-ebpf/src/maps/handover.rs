//! The maps and constants of programs that serve while maps are taken over: those of the agent
//! before, and how its entries are converted.
//!
//! The maps that are declared here with the layouts of this release are replaced by those of the
//! agent before when the programs are loaded. Only `tables/handover.rs` looks into them.

use aya_ebpf::{
    Global,
    btf_maps::{Array, LruHashMap, PerCpuArray},
    macros::btf_map,
};
use lb_common::abi::{
    address::{Address4, Address6},
    conversion::{ConversionWords, LARGEST_KEY, LARGEST_VALUE, WORDS},
    flow::{Flow, FlowKey},
    flow_table::{Bucket, FlowBucket, FlowFilter, FlowSeed},
    fragment::{Fragment, FragmentKey},
    socket::{DatagramKey, Peer},
};

/// BPF_F_MMAPABLE.
const MAPPED: usize = 0x400;

/// FLOWS4 of an agent that had hash maps of flows, one entry for each direction.
#[btf_map]
pub static PREVIOUS_FLOWS4: LruHashMap<FlowKey<Address4>, Flow<Address4>, 1> = LruHashMap::new();
/// FLOWS6 of such an agent.
#[btf_map]
pub static PREVIOUS_FLOWS6: LruHashMap<FlowKey<Address6>, Flow<Address6>, 1> = LruHashMap::new();
/// EMBRYONIC4 of such an agent: TCP handshakes that are not complete.
#[btf_map]
pub static PREVIOUS_EMBRYONIC4: LruHashMap<FlowKey<Address4>, Flow<Address4>, 1> =
    LruHashMap::new();
/// EMBRYONIC6 of such an agent.
#[btf_map]
pub static PREVIOUS_EMBRYONIC6: LruHashMap<FlowKey<Address6>, Flow<Address6>, 1> =
    LruHashMap::new();
/// FLOW_SEED of an agent whose table had another size; so are the six maps that follow.
#[btf_map]
pub static PREVIOUS_SEED: Array<FlowSeed, 1, MAPPED> = Array::new();
/// FLOW_TABLE4 of the agent before.
#[btf_map]
pub static PREVIOUS_TABLE4: Array<FlowBucket<Address4>, 1, MAPPED> = Array::new();
/// FLOW_TABLE6 of the agent before.
#[btf_map]
pub static PREVIOUS_TABLE6: Array<FlowBucket<Address6>, 1, MAPPED> = Array::new();
/// FLOW_REPLIES4 of the agent before.
#[btf_map]
pub static PREVIOUS_REPLIES4: Array<Bucket, 1, MAPPED> = Array::new();
/// FLOW_REPLIES6 of the agent before.
#[btf_map]
pub static PREVIOUS_REPLIES6: Array<Bucket, 1, MAPPED> = Array::new();
/// FLOW_FILTER4 of the agent before.
#[btf_map]
pub static PREVIOUS_FILTER4: Array<FlowFilter, 1, MAPPED> = Array::new();
/// FLOW_FILTER6 of the agent before.
#[btf_map]
pub static PREVIOUS_FILTER6: Array<FlowFilter, 1, MAPPED> = Array::new();
/// FRAGMENTS4 of the agent before.
#[btf_map]
pub static PREVIOUS_FRAGMENTS4: LruHashMap<FragmentKey<Address4>, Fragment, 1> = LruHashMap::new();
/// FRAGMENTS6 of the agent before.
#[btf_map]
pub static PREVIOUS_FRAGMENTS6: LruHashMap<FragmentKey<Address6>, Fragment, 1> = LruHashMap::new();
/// DATAGRAM_PEERS of the agent before.
#[btf_map]
pub static PREVIOUS_PEERS: LruHashMap<DatagramKey, Peer, 1> = LruHashMap::new();
/// 0: flows are in the maps before; 1: new ones are inserted into the maps of this agent. The agent
/// changes it once the programs that knew the maps before alone are replaced at every hook.
#[btf_map]
pub static HANDOVER: Array<u32, 1, MAPPED> = Array::new();
/// Working memory for conversions. Nothing in it outlives a run, and no two runs of tc programs
/// overlap on a CPU; programs of sockets do not use it.
#[btf_map]
pub static ROOM: PerCpuArray<Room, 1> = PerCpuArray::new();

/// Working memory for conversions.
#[repr(C)]
pub struct Room {
    /// A key with the layout of the map before.
    pub key: [u64; Self::KEY],
    /// A value with the layout of the map before.
    pub value: [u64; Self::VALUE],
    /// A value with the layout of this release.
    pub copy: [u64; Self::VALUE],
}

impl Room {
    const KEY: usize = LARGEST_KEY / 8;
    const VALUE: usize = LARGEST_VALUE / 8;
}

/// Where the flows of the agent before are: [`conversion::SAME`](lb_common::abi::conversion),
/// `IN_HASHES` or `IN_TABLE`.
#[unsafe(no_mangle)]
pub static FLOWS_BEFORE: Global<u32> = Global::new(0);
/// How entries of FRAGMENTS4 are converted.
#[unsafe(no_mangle)]
pub static CONVERT_FRAGMENTS4: Global<ConversionWords> = Global::new([0; WORDS]);
/// How entries of FRAGMENTS6 are converted.
#[unsafe(no_mangle)]
pub static CONVERT_FRAGMENTS6: Global<ConversionWords> = Global::new([0; WORDS]);
/// How entries of DATAGRAM_PEERS are converted.
#[unsafe(no_mangle)]
pub static CONVERT_PEERS: Global<ConversionWords> = Global::new([0; WORDS]);
