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
    address::{Address4, Address6, Be16, Family, Ipv4, Ipv6},
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

/// A map of flows as those of the programs are.
type Flows<A, const ENTRIES: usize> = LruHashMap<FlowKey<A>, Flow<A>, ENTRIES>;

/// One flow. Written by `lb-bench`.
#[btf_map]
pub static HASH4: HashMap<FlowKey<Address4>, Flow<Address4>, 65536> = HashMap::new();
/// As FLOWS4, whose size `lb-bench` gives it. Written by `lb-bench` and `insert4`.
#[btf_map]
pub static LRU4: Flows<Address4, 262144> = LruHashMap::new();
/// As FLOWS6, whose size `lb-bench` gives it. Written by `lb-bench` and `insert6`.
#[btf_map]
pub static LRU6: Flows<Address6, 262144> = LruHashMap::new();
/// As EMBRYONIC4. Written by `insert_small4`.
#[btf_map]
pub static SMALL_LRU4: Flows<Address4, 16384> = LruHashMap::new();
/// As EMBRYONIC6. Written by `insert_small6`.
#[btf_map]
pub static SMALL_LRU6: Flows<Address6, 16384> = LruHashMap::new();

const ANY: u64 = BPF_ANY as u64;
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
    let flow = lane.first.wrapping_add(run as u32) & lane.mask;
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

/// Reads the flow of an IPv4 packet, as every floor below that needs a key.
#[classifier]
pub fn key4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |_| true)
}

/// Reads the flow of an IPv6 packet.
#[classifier]
pub fn key6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |_| true)
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
pub fn hash4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| HASH4.get_ptr(key).is_some())
}

/// A hit in an LRU.
#[classifier]
pub fn hit4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| LRU4.get_ptr(key).is_some())
}

/// A hit in an LRU.
#[classifier]
pub fn hit6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |key| LRU6.get_ptr(key).is_some())
}

/// A hit in an LRU, and a load of what was found.
#[classifier]
pub fn read4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| read(LRU4.get_ptr(key)))
}

/// A hit in an LRU, and a load of what was found.
#[classifier]
pub fn read6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |key| read(LRU6.get_ptr(key)))
}

/// A miss in an LRU.
#[classifier]
pub fn miss4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| LRU4.get_ptr(key).is_none())
}

/// A miss in an LRU.
#[classifier]
pub fn miss6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |key| LRU6.get_ptr(key).is_none())
}

/// An insertion into an LRU, which is full once this has run for a while.
#[classifier]
pub fn insert4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| LRU4.insert(key, &Flow::default(), ANY).is_ok())
}

/// An insertion into an LRU, which is full once this has run for a while.
#[classifier]
pub fn insert6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |key| LRU6.insert(key, &Flow::default(), ANY).is_ok())
}

/// An insertion into a small LRU that is full.
#[classifier]
pub fn insert_small4(context: TcContext) -> i32 {
    with_key::<Ipv4>(&context, |key| SMALL_LRU4.insert(key, &Flow::default(), ANY).is_ok())
}

/// An insertion into a small LRU that is full.
#[classifier]
pub fn insert_small6(context: TcContext) -> i32 {
    with_key::<Ipv6>(&context, |key| SMALL_LRU6.insert(key, &Flow::default(), ANY).is_ok())
}

/// The least that a new flow takes: a miss, and both directions into a large LRU.
#[classifier]
pub fn open4(context: TcContext) -> i32 {
    open::<Ipv4>(
        &context,
        |key| LRU4.get_ptr(key).is_none(),
        |key| LRU4.insert(key, &Flow::default(), ANY).is_ok(),
    )
}

/// The same of IPv6.
#[classifier]
pub fn open6(context: TcContext) -> i32 {
    open::<Ipv6>(
        &context,
        |key| LRU6.get_ptr(key).is_none(),
        |key| LRU6.insert(key, &Flow::default(), ANY).is_ok(),
    )
}

/// The least that a new TCP flow takes: both directions go into a small LRU.
#[classifier]
pub fn open_small4(context: TcContext) -> i32 {
    open::<Ipv4>(
        &context,
        |key| LRU4.get_ptr(key).is_none(),
        |key| SMALL_LRU4.insert(key, &Flow::default(), ANY).is_ok(),
    )
}

/// The same of IPv6.
#[classifier]
pub fn open_small6(context: TcContext) -> i32 {
    open::<Ipv6>(
        &context,
        |key| LRU6.get_ptr(key).is_none(),
        |key| SMALL_LRU6.insert(key, &Flow::default(), ANY).is_ok(),
    )
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

/// The same of an IPv6 socket.
#[cgroup_sock_addr(connect6)]
pub fn empty_connect6(_context: SockAddrContext) -> i32 {
    1
}

/// Where a family's packets have their addresses.
trait Layout: Family {
    /// Words of the IP header before the source.
    const SOURCE: usize;
    /// Words of an address.
    const LENGTH: usize;

    /// The address whose words `word` reads.
    fn address(word: impl Fn(usize) -> u32) -> Self::Address;
}

impl Layout for Ipv4 {
    const SOURCE: usize = 3;
    const LENGTH: usize = 1;

    #[inline(always)]
    fn address(word: impl Fn(usize) -> u32) -> Address4 {
        Address4 { be32: word(0) }
    }
}

impl Layout for Ipv6 {
    const SOURCE: usize = 2;
    const LENGTH: usize = 4;

    #[inline(always)]
    fn address(word: impl Fn(usize) -> u32) -> Address6 {
        Address6 { be32: [word(0), word(1), word(2), word(3)] }
    }
}

/// Takes the step, which says whether it went as it should, with the flow of the packet.
#[inline(always)]
fn with_key<F: Layout>(
    context: &TcContext,
    step: impl FnOnce(&FlowKey<F::Address>) -> bool,
) -> i32 {
    let (start, ports) = (context.data() + ETHERNET, F::SOURCE + 2 * F::LENGTH);
    if start + (ports + 1) * 4 > context.data_end() {
        return TC_ACT_SHOT;
    }
    let word = |index: usize| {
        // SAFETY: in bounds, as just checked.
        unsafe { *((start + index * 4) as *const u32) }
    };
    let key = FlowKey {
        tuple: Tuple {
            source: F::address(|index| word(F::SOURCE + index)),
            destination: F::address(|index| word(F::SOURCE + F::LENGTH + index)),
            source_port: Be16 { be16: word(ports) as u16 },
            destination_port: Be16 { be16: (word(ports) >> 16) as u16 },
        },
        protocol: TCP as u32,
    };
    keep(&&key);
    if step(&key) { TC_ACT_UNSPEC } else { TC_ACT_SHOT }
}

#[inline(always)]
fn open<F: Layout>(
    context: &TcContext,
    is_new: impl Fn(&FlowKey<F::Address>) -> bool,
    insert: impl Fn(&FlowKey<F::Address>) -> bool,
) -> i32 {
    with_key::<F>(context, |key| {
        if !is_new(key) {
            return false;
        }
        let mut pair = FlowKey::default();
        pair.set_pair(&key.tuple, key.protocol);
        insert(key) && insert(&pair)
    })
}

#[inline(always)]
fn read<A>(entry: Option<*const Flow<A>>) -> bool {
    let Some(flow) = entry else { return false };
    // SAFETY: the look-up of this run found it.
    keep(&unsafe { (*flow).last_seen });
    true
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
