//! The kernel's tick.

use std::{io, os::fd::BorrowedFd, time::Duration};

use super::bpf::test_run;

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

/// A packet that BPF_PROG_TEST_RUN accepts for every program type: an Ethernet header and a
/// payload.
pub const SHORTEST_PACKET: [u8; 64] = [0; 64];

/// Jiffies per second (CONFIG_HZ): the resolution of the coarse clocks is one tick.
///
/// # Errors
/// Those of clock_getres(2), or InvalidData for a resolution that cannot be a tick.
pub fn ticks_per_second() -> io::Result<u32> {
    let resolution = coarse_clock_resolution()?;
    let nanoseconds = resolution.as_nanos();
    if nanoseconds == 0 || nanoseconds > 1_000_000_000 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the resolution of CLOCK_MONOTONIC_COARSE is {nanoseconds} ns: not a tick"),
        ));
    }
    Ok(((1_000_000_000 + nanoseconds / 2) / nanoseconds) as u32)
}

/// The low 32 bits of jiffies, read by the program `clock`.
///
/// # Errors
/// Those of BPF_PROG_TEST_RUN.
pub fn ticks_now(clock: BorrowedFd<'_>) -> io::Result<u32> {
    test_run(clock, &SHORTEST_PACKET)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tick_is_a_common_config_hz() {
        assert!([100, 250, 300, 1000].contains(&ticks_per_second().unwrap()));
    }
}
