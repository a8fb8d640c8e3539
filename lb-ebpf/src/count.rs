//! One counter for every exit, and what each service port has carried or turned away.

use aya_ebpf::bindings::BPF_NOEXIST;
use lb_common::abi::{
    counter::{Hook, Reason},
    traffic::DropKey,
};

use crate::maps::{COUNTERS, DROPS, TRAFFIC};

/// Notes why a program ends.
#[inline(always)]
pub fn count(hook: Hook, reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(hook.counter(reason)) {
        // SAFETY: a per-CPU entry; a program is not interrupted by another one of the
        // same CPU that counts there, or at worst loses a count.
        unsafe { *counter += 1 };
    }
}

/// Notes what became of a packet of `length` bytes that the service port of index `service`
/// has carried or turned away; nothing for other reasons. What is carried costs no call.
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

/// Notes why a service port has turned away a packet or a call.
#[inline(never)]
fn count_rejected(service: u32, reason: Reason) {
    let key = DropKey { service, reason: reason as u32 };
    match DROPS.get_ptr_mut(&key) {
        // SAFETY: as above.
        Some(count) => unsafe { *count += 1 },
        // A full map forgets what was counted longest ago.
        None => drop(DROPS.insert(&key, &1, BPF_NOEXIST as u64)),
    }
}
