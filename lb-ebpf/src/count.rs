//! One counter for every exit.

use lb_common::abi::counter::{Hook, Reason};

use crate::maps::COUNTERS;

/// Notes why a program ends.
#[inline(always)]
pub fn count(hook: Hook, reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(hook.counter(reason)) {
        // SAFETY: a per-CPU entry; a program is not interrupted by another one of the
        // same CPU that counts there, or at worst loses a count.
        unsafe { *counter += 1 };
    }
}
