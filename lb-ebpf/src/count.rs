//! Counters: one for every exit of a program, and the packets that each service port translated or
//! rejected.

use aya_ebpf::bindings::BPF_NOEXIST;
use lb_common::abi::{
    counter::{Hook, Reason},
    traffic::DropKey,
};

use crate::maps::{COUNTERS, DROPS, TRAFFIC};

/// Counts the reason for which a program ends.
#[inline(always)]
pub fn count(hook: Hook, reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(hook.counter(reason)) {
        // SAFETY: a per-CPU entry. No other program on this CPU interrupts this one and counts
        // there; at worst a count is lost.
        unsafe { *counter += 1 };
    }
}

/// Counts a packet of `length` bytes (with its Ethernet header), or a call, in TRAFFIC or DROPS if
/// the service port with the index `service` translated or rejected it; nothing for other reasons.
/// A translated packet costs no function call.
#[inline(always)]
pub fn count_service(service: u32, reason: Reason, length: u32) {
    let bit = 1u64 << (reason as u32 & 63);
    if bit & Reason::TRANSLATED != 0 {
        if let Some(traffic) = TRAFFIC.get_ptr_mut(service) {
            // SAFETY: as above.
            unsafe {
                (*traffic).packets += 1;
                (*traffic).bytes += length as u64;
            }
        }
    } else if bit & Reason::REJECTED != 0 {
        count_rejected(service, reason);
    }
}

/// Counts a packet or call that a service port rejected.
#[inline(never)]
fn count_rejected(service: u32, reason: Reason) {
    let key = DropKey { service, reason: reason as u32 };
    match DROPS.get_ptr_mut(&key) {
        // SAFETY: as above.
        Some(count) => unsafe { *count += 1 },
        // A full map evicts the entry that was counted longest ago.
        None => drop(DROPS.insert(&key, &1, BPF_NOEXIST as u64)),
    }
}
