//! The programs that measure those of lb: wrappers, which put a packet back into its
//! first state and then tail-call a target, and targets that cost what one step costs.
//!
//! A wrapper never returns by itself but when something is wrong; then the target's
//! verdicts do not add up and the measurement is void.
#![no_std]
#![no_main]

mod abi;

use aya_ebpf::{
    bindings::{BPF_ANY, TC_ACT_SHOT, TC_ACT_UNSPEC},
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray},
    helpers::{
        bpf_get_prandom_u32, bpf_ktime_get_ns,
        generated::{bpf_jiffies64, bpf_skb_change_tail},
    },
    macros::{btf_map, cgroup_sock_addr, classifier},
    programs::{SockAddrContext, TcContext},
};
use lb_common::abi::{
    address::{Address4, Be16},
    flow::{Flow, FlowKey, Tuple},
    frontend::TCP,
};

use crate::abi::{Lane, MAX_TARGETS, address_bits, port_bits};

/// What to do. Written by `lb-bench`.
#[btf_map]
pub static LANE: Array<Lane, 1> = Array::new();
/// How many packets the wrappers have made. Written by the wrappers.
#[btf_map]
pub static RUNS: PerCpuArray<u64, 1> = PerCpuArray::new();
/// The programs to measure. Written by `lb-bench`.
#[btf_map]
pub static TARGETS: ProgramArray<MAX_TARGETS> = ProgramArray::new();

/// One entry for each flow. Written by `lb-bench`.
#[btf_map]
pub static HASH: HashMap<FlowKey<Address4>, Flow<Address4>, 65536> = HashMap::new();
/// As many entries as the table of handshakes. Written by `insert_16k`.
#[btf_map]
pub static LRU_16K: LruHashMap<FlowKey<Address4>, Flow<Address4>, 16384> = LruHashMap::new();
/// As many entries as the table of flows. Written by `lb-bench` and `insert_256k`.
#[btf_map]
pub static LRU_256K: LruHashMap<FlowKey<Address4>, Flow<Address4>, 262144> = LruHashMap::new();
/// Room for a million flows. Written by `lb-bench` and `insert_1m`.
#[btf_map]
pub static LRU_1M: LruHashMap<FlowKey<Address4>, Flow<Address4>, 2101248> = LruHashMap::new();

const ETHERNET: usize = 14;
const CHECKSUM_OF_TCP4: usize = ETHERNET + 20 + 16;
const WORDS4: usize = 10;
const WORDS6: usize = abi::MAX_WORDS;

/// The source of an IPv4 packet is rotated.
#[classifier]
pub fn request4(context: TcContext) -> i32 {
    wrap::<WORDS4, 3, 5, true>(&context)
}

/// The destination of an IPv4 packet is rotated.
#[classifier]
pub fn reply4(context: TcContext) -> i32 {
    wrap::<WORDS4, 4, 5, false>(&context)
}

/// The source of an IPv6 packet is rotated.
#[classifier]
pub fn request6(context: TcContext) -> i32 {
    wrap::<WORDS6, 5, 10, true>(&context)
}

/// The destination of an IPv6 packet is rotated.
#[classifier]
pub fn reply6(context: TcContext) -> i32 {
    wrap::<WORDS6, 9, 10, false>(&context)
}

/// Changes nothing before the target runs.
#[classifier]
pub fn bare(context: TcContext) -> i32 {
    let Some(lane) = LANE.get(0) else { return TC_ACT_SHOT };
    // SAFETY: the wrapper ends here either way.
    unsafe { TARGETS.tail_call(&context, lane.target) };
    TC_ACT_SHOT
}

/// Every field is stored with the width that the target loads it with: a load that spans
/// two recent stores would stall, which packets from a device never do.
#[inline(always)]
fn wrap<const WORDS: usize, const ADDRESS: usize, const PORTS: usize, const SOURCE: bool>(
    context: &TcContext,
) -> i32 {
    let (Some(lane), Some(runs)) = (LANE.get(0), RUNS.get_ptr_mut(0)) else { return TC_ACT_SHOT };
    if context.len() != lane.length {
        // SAFETY: the context is the kernel's.
        unsafe { bpf_skb_change_tail(context.skb.skb, lane.length, 0) };
    }
    let start = context.data();
    if start + ETHERNET + WORDS * 4 > context.data_end() {
        return TC_ACT_SHOT;
    }
    // SAFETY: this CPU's entry.
    let run = unsafe {
        let run = *runs;
        *runs = run + 1;
        run
    };
    let flow = run as u32 & lane.mask;
    let ports = port_bits(flow) as u32;
    let mut index = 0;
    while index < 3 {
        put(start + index * 4, lane.ethernet[index]);
        index += 1;
    }
    put(start + 12, lane.ethernet[3] as u16);
    index = 0;
    while index < WORDS {
        let word = lane.words[index];
        let word = if index == ADDRESS {
            word ^ address_bits(flow)
        } else if index == PORTS {
            word ^ if SOURCE { ports } else { ports << 16 }
        } else {
            word
        };
        put(start + ETHERNET + index * 4, word);
        index += 1;
    }
    // SAFETY: the wrapper ends here either way.
    unsafe { TARGETS.tail_call(context, lane.target) };
    TC_ACT_SHOT
}

#[inline(always)]
fn put<T>(at: usize, value: T) {
    // SAFETY: `wrap` checked that the headers lie in the frame.
    unsafe { core::ptr::write_volatile(at as *mut T, value) };
}

/// What everything is measured against.
#[classifier]
pub fn empty(_context: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// Reads the flow of the packet, as every floor below that needs a key.
#[classifier]
pub fn key(context: TcContext) -> i32 {
    let Some(key) = flow_key(&context) else { return TC_ACT_SHOT };
    keep(&key);
    TC_ACT_UNSPEC
}

/// A look-up in an array.
#[classifier]
pub fn array(_context: TcContext) -> i32 {
    let Some(runs) = RUNS.get_ptr(0) else { return TC_ACT_SHOT };
    // SAFETY: this CPU's entry.
    keep(&unsafe { *runs });
    TC_ACT_UNSPEC
}

/// A hit in a hash.
#[classifier]
pub fn hash(context: TcContext) -> i32 {
    let Some(key) = flow_key(&context) else { return TC_ACT_SHOT };
    found(HASH.get_ptr(&key))
}

/// A hit in an LRU of the size of the table of flows.
#[classifier]
pub fn lru_256k(context: TcContext) -> i32 {
    let Some(key) = flow_key(&context) else { return TC_ACT_SHOT };
    found(LRU_256K.get_ptr(&key))
}

/// A hit in an LRU of a million flows.
#[classifier]
pub fn lru_1m(context: TcContext) -> i32 {
    let Some(key) = flow_key(&context) else { return TC_ACT_SHOT };
    found(LRU_1M.get_ptr(&key))
}

/// A miss in an LRU of the size of the table of flows.
#[classifier]
pub fn miss_256k(context: TcContext) -> i32 {
    let Some(key) = flow_key(&context) else { return TC_ACT_SHOT };
    missed(LRU_256K.get_ptr(&key))
}

/// A miss in an LRU of a million flows.
#[classifier]
pub fn miss_1m(context: TcContext) -> i32 {
    let Some(key) = flow_key(&context) else { return TC_ACT_SHOT };
    missed(LRU_1M.get_ptr(&key))
}

/// An insertion into a small LRU that is full.
#[classifier]
pub fn insert_16k(context: TcContext) -> i32 {
    let Some(key) = flow_key(&context) else { return TC_ACT_SHOT };
    added(LRU_16K.insert(&key, &Flow::default(), BPF_ANY as u64))
}

/// An insertion into an LRU of the size of the table of flows.
#[classifier]
pub fn insert_256k(context: TcContext) -> i32 {
    let Some(key) = flow_key(&context) else { return TC_ACT_SHOT };
    added(LRU_256K.insert(&key, &Flow::default(), BPF_ANY as u64))
}

/// An insertion into an LRU of a million flows.
#[classifier]
pub fn insert_1m(context: TcContext) -> i32 {
    let Some(key) = flow_key(&context) else { return TC_ACT_SHOT };
    added(LRU_1M.insert(&key, &Flow::default(), BPF_ANY as u64))
}

/// A clock of nanoseconds.
#[classifier]
pub fn ktime(_context: TcContext) -> i32 {
    // SAFETY: no preconditions.
    keep(&unsafe { bpf_ktime_get_ns() });
    TC_ACT_UNSPEC
}

/// The clock of ticks.
#[classifier]
pub fn jiffies(_context: TcContext) -> i32 {
    // SAFETY: no preconditions.
    keep(&unsafe { bpf_jiffies64() });
    TC_ACT_UNSPEC
}

/// A random number.
#[classifier]
pub fn random(_context: TcContext) -> i32 {
    // SAFETY: no preconditions.
    keep(&unsafe { bpf_get_prandom_u32() });
    TC_ACT_UNSPEC
}

/// A change of a TCP checksum.
#[classifier]
pub fn checksum(context: TcContext) -> i32 {
    match context.l4_csum_replace(CHECKSUM_OF_TCP4, 0, 0x1234_5678, 0) {
        Ok(()) => TC_ACT_UNSPEC,
        Err(_) => TC_ACT_SHOT,
    }
}

/// connect(): what the kernel spends before and after any program.
#[cgroup_sock_addr(connect4)]
pub fn empty_connect4(_context: SockAddrContext) -> i32 {
    1
}

#[inline(always)]
fn flow_key(context: &TcContext) -> Option<FlowKey<Address4>> {
    let start = context.data();
    if start + ETHERNET + WORDS4 * 4 > context.data_end() {
        return None;
    }
    let word = |index: usize| {
        // SAFETY: in bounds, as just checked.
        unsafe { *((start + ETHERNET + index * 4) as *const u32) }
    };
    let ports = word(5);
    Some(FlowKey {
        tuple: Tuple {
            source: Address4 { be32: word(3) },
            destination: Address4 { be32: word(4) },
            source_port: Be16 { be16: ports as u16 },
            destination_port: Be16 { be16: (ports >> 16) as u16 },
        },
        protocol: TCP as u32,
    })
}

#[inline(always)]
fn found(entry: Option<*const Flow<Address4>>) -> i32 {
    match entry {
        Some(flow) => {
            // SAFETY: the look-up of this run found it.
            keep(&unsafe { (*flow).last_seen });
            TC_ACT_UNSPEC
        }
        None => TC_ACT_SHOT,
    }
}

#[inline(always)]
fn missed(entry: Option<*const Flow<Address4>>) -> i32 {
    if entry.is_none() { TC_ACT_UNSPEC } else { TC_ACT_SHOT }
}

#[inline(always)]
fn added(result: Result<(), i32>) -> i32 {
    if result.is_ok() { TC_ACT_UNSPEC } else { TC_ACT_SHOT }
}

/// Makes the compiler work out `value`.
#[inline(always)]
fn keep<T: Copy>(value: &T) {
    let mut place = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: a local.
    unsafe { core::ptr::write_volatile(place.as_mut_ptr(), *value) };
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // SAFETY: the verifier refuses any program in which this can be reached.
    unsafe { core::hint::unreachable_unchecked() }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
