//! What a process uses, by `/proc`.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

/// The memory of a process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Memory {
    /// Resident now.
    pub resident: u64,
    /// Of that, what no file or map is behind.
    pub anonymous: u64,
    /// The most that was ever resident.
    pub peak: u64,
}

/// The memory of a process now.
///
/// # Errors
/// There is no such process.
pub fn memory(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    parse_memory(&status).with_context(|| format!("{path} has no memory"))
}

fn parse_memory(status: &str) -> Option<Memory> {
    let of = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        let kilobytes: u64 =
            line.trim_start_matches(':').split_whitespace().next()?.parse().ok()?;
        Some(kilobytes * 1024)
    };
    Some(Memory { resident: of("VmRSS")?, anonymous: of("RssAnon")?, peak: of("VmHWM")? })
}

/// The CPU time of a process so far, in steps of a hundredth of a second.
///
/// # Errors
/// There is no such process.
pub fn cpu(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    parse_cpu(&stat).with_context(|| format!("{path} has no times"))
}

fn parse_cpu(stat: &str) -> Option<Duration> {
    // The name may have spaces and parentheses. utime and stime are fields 14 and 15.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_times_are_found() {
        let status = "Name:\tx\nVmHWM:\t  30 kB\nVmRSS:\t  20 kB\nRssAnon:\t   5 kB\n";
        let memory = Memory { resident: 20 << 10, anonymous: 5 << 10, peak: 30 << 10 };
        assert_eq!(parse_memory(status), Some(memory));
        let stat = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 150 25 0 0 20";
        assert_eq!(parse_cpu(stat), Some(Duration::from_millis(1750)));
    }
}
