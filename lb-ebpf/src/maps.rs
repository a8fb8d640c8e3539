//! Every map, with its writer. Sizes are defaults: the agent sets them when it loads the programs.

use aya_ebpf::{
    Global,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, LruPerCpuHashMap, PerCpuArray, SkStorage},
    macros::btf_map,
};
use lb_common::abi::{
    address::{Address4, Address6, Ipv4, Ipv6},
    affinity::{Affinity, AffinityKey},
    backend::Backend,
    counter,
    flow_table::{self, Bucket, FlowBucket, FlowFilter, FlowSeed},
    fragment::{Fragment, FragmentKey},
    frontend::{Frontend, FrontendKey},
    range::Range,
    service::{Name, Service, Slot},
    settings::{Device, MAX_DEVICES, SettingsPair},
    socket::{
        CONNECTED_BUCKETS, ConnectedBucket, ConnectedPeer, DatagramKey, MAX_EXCLUDED_CGROUPS, Peer,
    },
    traffic::{DirectFlows, DropKey, Traffic},
};
use lb_common::packet::answer::MAX_QUOTE_WORDS;

use crate::scratch::Scratch;

#[cfg(feature = "handover")]
pub mod handover;

/// BPF_F_MMAPABLE: the agent stores into the map without a system call.
const MAPPED: usize = 0x400;
/// BPF_F_NO_PREALLOC: memory is allocated for each entry when it is inserted.
const ON_DEMAND: usize = 1;

/// What clients connect to, IPv4. Written by the agent.
#[btf_map]
pub static FRONTENDS4: HashMap<FrontendKey<Address4>, Frontend, 65536, ON_DEMAND> = HashMap::new();
/// What clients connect to, IPv6. Written by the agent.
#[btf_map]
pub static FRONTENDS6: HashMap<FrontendKey<Address6>, Frontend, 65536, ON_DEMAND> = HashMap::new();
/// Service ports of both families. Written by the agent.
#[btf_map]
pub static SERVICES: Array<Service, 32768, MAPPED> = Array::new();
/// The names of SERVICES' entries, for the tools. Written by the agent.
#[btf_map]
pub static NAMES: Array<Name, 32768, MAPPED> = Array::new();
/// Backends of service ports, by id. Written by the agent.
#[btf_map]
pub static SLOTS: Array<Slot, 1048576, MAPPED> = Array::new();
/// Backends, IPv4. Written by the agent.
#[btf_map]
pub static BACKENDS4: Array<Backend<Address4>, 262144, MAPPED> = Array::new();
/// Backends, IPv6. Written by the agent.
#[btf_map]
pub static BACKENDS6: Array<Backend<Address6>, 262144, MAPPED> = Array::new();
/// Source ranges of the load balancers' addresses that have them, IPv4. Written by the agent.
#[btf_map]
pub static RANGES4: LpmTrie<Range<Address4>, u32, 16384> = LpmTrie::new();
/// Source ranges of the load balancers' addresses that have them, IPv6. Written by the agent.
#[btf_map]
pub static RANGES6: LpmTrie<Range<Address6>, u32, 16384> = LpmTrie::new();
/// Source addresses by the route that packets leave by, IPv4. Written by the agent.
#[btf_map]
pub static SOURCES4: LpmTrie<Address4, Address4, 16384> = LpmTrie::new();
/// Source addresses by the route that packets leave by, IPv6. Written by the agent.
#[btf_map]
pub static SOURCES6: LpmTrie<Address6, Address6, 16384> = LpmTrie::new();
/// Addresses of the cluster's nodes, IPv4; the value is always 1. Written by the agent.
#[btf_map]
pub static NODES4: HashMap<Address4, u32, 16384, ON_DEMAND> = HashMap::new();
/// Addresses of the cluster's nodes, IPv6; the value is always 1. Written by the agent.
#[btf_map]
pub static NODES6: HashMap<Address6, u32, 16384, ON_DEMAND> = HashMap::new();
/// The configuration of this node. Written by the agent.
#[btf_map]
pub static SETTINGS: Array<SettingsPair, 1, MAPPED> = Array::new();
/// External devices. Written by the agent.
#[btf_map]
pub static DEVICES: Array<Device, { MAX_DEVICES as usize }, MAPPED> = Array::new();

/// What the buckets of flows depend on. Written by the agent before any program is loaded; later its
/// sweep changes which copy of the filter is in use.
#[btf_map]
pub static FLOW_SEED: Array<FlowSeed, 1, MAPPED> = Array::new();
/// Flows, IPv4. Written by the programs and by the agent's sweep, see `docs/flow-table.md`; so are the
/// five maps that follow.
#[btf_map]
pub static FLOW_TABLE4: Array<FlowBucket<Address4>, 32768, MAPPED> = Array::new();
/// Flows, IPv6.
#[btf_map]
pub static FLOW_TABLE6: Array<FlowBucket<Address6>, 32768, MAPPED> = Array::new();
/// The places of flows that their replies do not find at home, IPv4.
#[btf_map]
pub static FLOW_REPLIES4: Array<Bucket, 65536, MAPPED> = Array::new();
/// The places of flows that their replies do not find at home, IPv6.
#[btf_map]
pub static FLOW_REPLIES6: Array<Bucket, 65536, MAPPED> = Array::new();
/// What there is to find for the packets of a client, IPv4.
#[btf_map]
pub static FLOW_FILTER4: Array<FlowFilter, 32768, MAPPED> = Array::new();
/// What there is to find for the packets of a client, IPv6.
#[btf_map]
pub static FLOW_FILTER6: Array<FlowFilter, 32768, MAPPED> = Array::new();
/// How many flows were inserted, and how many made room for them, by class. Written by the programs.
#[btf_map]
pub static FLOW_EVENTS: PerCpuArray<u64, { flow_table::EVENTS }> = PerCpuArray::new();
/// Whether there are flows of clients that talk to backends themselves. Written by the programs, and by
/// the agent's sweep once there are none.
#[btf_map]
pub static DIRECT_FLOWS: Array<DirectFlows, 1, MAPPED> = Array::new();
/// Ports of fragmented datagrams, IPv4. Written by the programs.
#[btf_map]
pub static FRAGMENTS4: LruHashMap<FragmentKey<Address4>, Fragment, 16384> = LruHashMap::new();
/// Ports of fragmented datagrams, IPv6. Written by the programs.
#[btf_map]
pub static FRAGMENTS6: LruHashMap<FragmentKey<Address6>, Fragment, 16384> = LruHashMap::new();
/// Session affinity of both families. Written by the programs; the agent's sweep deletes expired
/// entries.
#[btf_map]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity, 65536> = LruHashMap::new();

/// Peers that connected sockets asked for. Written by the programs, which free the place of a socket
/// that is closed.
#[btf_map]
pub static CONNECTED_PEERS: Array<ConnectedBucket, { CONNECTED_BUCKETS as usize }, MAPPED> =
    Array::new();
/// The same for sockets that find no place in [`CONNECTED_PEERS`]: dearer, because the kernel
/// allocates each entry. The kernel removes an entry with its socket.
#[btf_map]
pub static SOCKETS: SkStorage<ConnectedPeer> = SkStorage::new();
/// Peers that datagram sockets asked for. Written by the programs.
#[btf_map]
pub static DATAGRAM_PEERS: LruHashMap<DatagramKey, Peer, 65536> = LruHashMap::new();

/// Counts of the reasons for which programs ended. Written by the programs.
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { counter::COUNTERS as usize }> = PerCpuArray::new();
/// Packets that service ports translated. Written by the programs; the agent clears an entry when
/// its index gets another meaning.
#[btf_map]
pub static TRAFFIC: PerCpuArray<Traffic, 32768> = PerCpuArray::new();
/// Packets and calls that service ports rejected, by reason. Written by the programs; the agent
/// removes entries when their index gets another meaning.
#[btf_map]
pub static DROPS: LruPerCpuHashMap<DropKey, u64, 4096> = LruPerCpuHashMap::new();
/// Working memory of a program, IPv4, which the stack is too small for. Nothing in it outlives a
/// run, and no two runs of tc programs overlap on a CPU.
#[btf_map]
pub static SCRATCH4: PerCpuArray<Scratch<Ipv4>, 1> = PerCpuArray::new();
/// Working memory of a program, IPv6.
#[btf_map]
pub static SCRATCH6: PerCpuArray<Scratch<Ipv6>, 1> = PerCpuArray::new();
/// The start of a packet, from its IP header on, that an ICMP error will quote.
#[btf_map]
pub static QUOTE: PerCpuArray<[u32; MAX_QUOTE_WORDS], 1> = PerCpuArray::new();

/// The cookie of the node's own network namespace; 0 = not known.
#[unsafe(no_mangle)]
pub static NODE_COOKIE: Global<u64> = Global::new(0);
/// 1: connect-time hooks translate only sockets of that network namespace.
#[unsafe(no_mangle)]
pub static ONLY_NODE: Global<u32> = Global::new(0);
/// 1: connect-time hooks translate UDP too.
#[unsafe(no_mangle)]
pub static SOCKET_LB_UDP: Global<u32> = Global::new(0);
/// The number of cgroups in [`EXCLUDED_CGROUPS`].
#[unsafe(no_mangle)]
pub static EXCLUDED_COUNT: Global<u32> = Global::new(0);
/// Ids of cgroups whose processes' calls are not translated at connect time; their packets are.
#[unsafe(no_mangle)]
pub static EXCLUDED_CGROUPS: Global<[u64; MAX_EXCLUDED_CGROUPS]> =
    Global::new([0; MAX_EXCLUDED_CGROUPS]);
/// 1: the kernel has `bpf_set_retval` for the connect-time hooks (6.1).
#[unsafe(no_mangle)]
pub static HAS_SET_RETVAL: Global<u32> = Global::new(0);
/// 1: the kernel has `bpf_get_netns_cookie` for the connect-time hooks (5.7).
#[unsafe(no_mangle)]
pub static HAS_NETNS_COOKIE: Global<u32> = Global::new(0);
/// 1: `bpf_l4_csum_replace` knows BPF_F_IPV6 (6.16).
#[unsafe(no_mangle)]
pub static HAS_CSUM_IPV6: Global<u32> = Global::new(0);
