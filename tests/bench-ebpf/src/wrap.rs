//! The wrappers: restore a packet, and run the target.

use aya_ebpf::{
    helpers::generated::{bpf_skb_change_tail, bpf_xdp_adjust_head},
    programs::{TcContext, XdpContext},
};

use lb_common::packet::IP_OFFSET;

use crate::{
    abi::{Lane, address_bits, port_bits},
    maps::{LANE, NUMBERS, RUNS, TARGETS, XDP_TARGETS},
};

/// A packet that a wrapper can restore, and pass to a target for the same layer.
pub trait Wrapped {
    /// The first byte, and behind the last one.
    fn bounds(&self) -> (usize, usize);
    /// Length of the frame, bytes.
    fn length(&self) -> u32;
    /// Restores the length of the frame to that of `lane`: at its end with tc, in front with XDP.
    fn resize(&self, lane: &Lane);
    /// Tail-calls the target. Returns only if there is no such target.
    fn run(&self, target: u32);
}

impl Wrapped for TcContext {
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        self.len()
    }

    #[inline(always)]
    fn resize(&self, lane: &Lane) {
        // SAFETY: the context is the kernel's.
        unsafe { bpf_skb_change_tail(self.skb.skb, lane.length, 0) };
    }

    #[inline(always)]
    fn run(&self, target: u32) {
        // SAFETY: the context is the kernel's. By this lb knows a packet that it has translated.
        unsafe { (*self.skb.skb).tc_index = 0 };
        // SAFETY: the wrapper ends here either way.
        unsafe { TARGETS.tail_call(self, target) }
    }
}

impl Wrapped for XdpContext {
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        (self.data_end() - self.data()) as u32
    }

    #[inline(always)]
    fn resize(&self, lane: &Lane) {
        // The compiler would add the length to a pointer in 32 bits, which the verifier refuses.
        let length = core::hint::black_box(self.length());
        let difference = length.wrapping_sub(lane.length) as i32;
        // SAFETY: the context is the kernel's.
        unsafe { bpf_xdp_adjust_head(self.ctx, difference) };
    }

    #[inline(always)]
    fn run(&self, target: u32) {
        // SAFETY: the wrapper ends here either way.
        unsafe { XDP_TARGETS.tail_call(self, target) }
    }
}

/// Flows take turns in an order that has nothing to do with the order of their insertion: the memory
/// of an LRU is handed out in a row, and the CPU would fetch it ahead. Odd, so that all have a turn.
const SHUFFLE: u32 = 0x9e37_79b1;

/// Every field is stored with the width that the target loads it with: a load that spans
/// two recent stores would stall, which packets from a device never do.
#[inline(always)]
pub fn wrap<
    C: Wrapped,
    const WORDS: usize,
    const ADDRESS: usize,
    const PORTS: usize,
    const SOURCE: bool,
>(
    context: &C,
) {
    let (Some(lane), Some(runs)) = (LANE.get(0), RUNS.get_ptr_mut(0)) else { return };
    if context.length() != lane.length {
        context.resize(lane);
    }
    let (start, end) = context.bounds();
    if start + IP_OFFSET + WORDS * 4 > end {
        return;
    }
    // SAFETY: this CPU's entry.
    let run = unsafe {
        let run = *runs;
        *runs = run + 1;
        run
    };
    let mut flow = lane.first.wrapping_add((run as u32).wrapping_mul(SHUFFLE)) & lane.mask;
    if lane.is_numbered != 0 {
        let Some(number) = NUMBERS.get(flow) else { return };
        flow = *number;
    }
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
        put(start + IP_OFFSET + index * 4, word);
        index += 1;
    }
    context.run(lane.target);
}

#[inline(always)]
fn put<T>(at: usize, value: T) {
    // SAFETY: `wrap` checked that the headers are inside the frame.
    unsafe { core::ptr::write_volatile(at as *mut T, value) };
}
