//! Clocks that std does not ask about.

use std::{io, time::Duration};

/// The resolution of CLOCK_MONOTONIC_COARSE: one tick of the kernel.
///
/// # Errors
/// Those of clock_getres(2).
pub fn coarse_clock_resolution() -> io::Result<Duration> {
    let mut resolution = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec to `resolution`.
    let result = unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &mut resolution) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::new(resolution.tv_sec as u64, resolution.tv_nsec as u32))
}
