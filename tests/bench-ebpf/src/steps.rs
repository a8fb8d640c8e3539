//! Single steps, one for each target.

use aya_ebpf::{
    EbpfContext,
    bindings::{
        BPF_F_ADJ_ROOM_FIXED_GSO, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
        bpf_fib_lookup as FibLookup, xdp_action,
    },
    helpers::generated::{bpf_fib_lookup, bpf_jiffies64, bpf_xdp_adjust_head},
    programs::{TcContext, XdpContext},
};
use lb_common::{
    abi::{
        address::{Address4, Address6, Be16, Family, Ipv4, Ipv6},
        flow::{Action, Flow, FlowKey, Tuple},
        frontend::TCP,
    },
    balance::{Known, NewFlow, Search},
    packet::IP_OFFSET,
};

use crate::{
    flows::{self, FlowMaps, Own},
    maps::{SCRATCH4, SCRATCH6, SETTINGS},
};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Where a family's packets have their addresses.
pub trait Layout: Family {
    /// Words of the IP header before the source.
    const SOURCE: usize;
    /// Words of an address.
    const LENGTH: usize;

    /// The address whose words `word` reads.
    fn address(word: impl Fn(usize) -> u32) -> Self::Address;
    /// Fills in the fields of a packet that a route look-up needs.
    fn ask(lookup: &mut FibLookup, tuple: &Tuple<Self::Address>);
}

impl Layout for Ipv4 {
    const SOURCE: usize = 3;
    const LENGTH: usize = 1;

    #[inline(always)]
    fn address(word: impl Fn(usize) -> u32) -> Address4 {
        Address4 { be32: word(0) }
    }

    #[inline(always)]
    fn ask(lookup: &mut FibLookup, tuple: &Tuple<Address4>) {
        lookup.family = AF_INET;
        lookup.__bindgen_anon_3.ipv4_src = tuple.source.be32;
        lookup.__bindgen_anon_4.ipv4_dst = tuple.destination.be32;
    }
}

impl Layout for Ipv6 {
    const SOURCE: usize = 2;
    const LENGTH: usize = 4;

    #[inline(always)]
    fn address(word: impl Fn(usize) -> u32) -> Address6 {
        Address6 { be32: [word(0), word(1), word(2), word(3)] }
    }

    #[inline(always)]
    fn ask(lookup: &mut FibLookup, tuple: &Tuple<Address6>) {
        lookup.family = AF_INET6;
        lookup.__bindgen_anon_3.ipv6_src = tuple.source.be32;
        lookup.__bindgen_anon_4.ipv6_dst = tuple.destination.be32;
    }
}

/// Runs a step with the flow of the packet. The step returns whether it succeeded.
#[inline(always)]
pub fn with_key<F: Layout>(
    context: &TcContext,
    step: impl FnOnce(&FlowKey<F::Address>) -> bool,
) -> i32 {
    let (start, ports) = (context.data() + IP_OFFSET, F::SOURCE + 2 * F::LENGTH);
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

/// The working memory of the steps of the table, in a map because the stack is small.
#[repr(C)]
pub struct Scratch<A> {
    found: Known<A>,
    new: NewFlow<A>,
}

/// A family whose table can be searched.
pub trait Table: Layout + FlowMaps {
    /// The working memory of this CPU.
    fn scratch() -> Option<*mut Scratch<Self::Address>>;
}

impl Table for Ipv4 {
    #[inline(always)]
    fn scratch() -> Option<*mut Scratch<Address4>> {
        SCRATCH4.get_ptr_mut(0)
    }
}

impl Table for Ipv6 {
    #[inline(always)]
    fn scratch() -> Option<*mut Scratch<Address6>> {
        SCRATCH6.get_ptr_mut(0)
    }
}

/// Whether the table has a flow whose requests arrive as `key` says.
#[inline(always)]
pub fn is_known<F: Table>(key: &FlowKey<F::Address>) -> bool {
    let Some(scratch) = F::scratch() else { return false };
    // SAFETY: this CPU's entry, which nothing else refers to.
    let scratch = unsafe { &mut *scratch };
    flows::find::<F, Own>(key, Search::Requests, &mut scratch.found)
}

/// Inserts a flow whose requests arrive as `key` says, and whose replies come from another port.
/// Returns whether it was inserted.
#[inline(always)]
pub fn enroll<F: Table>(key: &FlowKey<F::Address>) -> bool {
    let (Some(scratch), Some(settings)) = (F::scratch(), SETTINGS.get(0)) else { return false };
    // SAFETY: as above.
    let new = unsafe { &mut (*scratch).new };
    new.flow.rewrite.set(&key.tuple);
    new.flow.rewrite.destination_port = Be16::new(8080);
    new.flow.action = Action::REQUEST;
    // SAFETY: no preconditions.
    new.flow.last_seen = settings.time(unsafe { bpf_jiffies64() } as u32);
    new.reply_key.set_reverse(&new.flow.rewrite, key.protocol);
    new.reply_action = Action::REPLY;
    <F as FlowMaps<Own>>::insert(key, new, settings) == 0
}

#[inline(always)]
pub fn open<F: Layout>(
    context: &TcContext,
    is_new: impl Fn(&FlowKey<F::Address>) -> bool,
    insert: impl Fn(&FlowKey<F::Address>) -> bool,
) -> i32 {
    with_key::<F>(context, |key| {
        if !is_new(key) {
            return false;
        }
        let mut pair = FlowKey::default();
        pair.set_reverse(&key.tuple, key.protocol);
        insert(key) && insert(&pair)
    })
}

/// Whether the kernel has a route for the packet, and knows the neighbour.
#[inline(always)]
pub fn is_routed<F: Layout>(context: &TcContext, key: &FlowKey<F::Address>) -> bool {
    // SAFETY: plain numbers, for which zero is valid.
    let mut lookup: FibLookup = unsafe { core::mem::zeroed() };
    F::ask(&mut lookup, &key.tuple);
    // SAFETY: the context is the kernel's, the parameters are of the size given.
    unsafe {
        lookup.ifindex = (*context.skb.skb).ifindex;
        let size = size_of::<FibLookup>() as i32;
        bpf_fib_lookup(context.as_ptr(), &raw mut lookup, size, 0) == 0
    }
}

/// Makes room in a socket buffer behind its Ethernet header. The kernel refuses to do so twice.
/// `encapsulation` is BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 or _IPV6.
#[inline(always)]
pub fn make_room(context: &TcContext, bytes: i32, encapsulation: u64) -> i32 {
    match context.adjust_room(
        bytes,
        BPF_ADJ_ROOM_MAC,
        BPF_F_ADJ_ROOM_FIXED_GSO as u64 | encapsulation,
    ) {
        Ok(()) => TC_ACT_UNSPEC,
        Err(_) => TC_ACT_SHOT,
    }
}

/// Makes room in front of a bare frame.
#[inline(always)]
pub fn make_room_xdp(context: &XdpContext, bytes: i32) -> u32 {
    // SAFETY: the context is the kernel's.
    match unsafe { bpf_xdp_adjust_head(context.ctx, -bytes) } {
        0 => xdp_action::XDP_PASS,
        _ => xdp_action::XDP_ABORTED,
    }
}

#[inline(always)]
pub fn read<A>(entry: Option<*const Flow<A>>) -> bool {
    let Some(flow) = entry else { return false };
    // SAFETY: the look-up of this run found it.
    keep(&unsafe { (*flow).last_seen });
    true
}

/// Makes the compiler compute `value`.
#[inline(always)]
pub fn keep<T: Copy>(value: &T) {
    let mut place = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: a local.
    unsafe { core::ptr::write_volatile(place.as_mut_ptr(), *value) };
}
