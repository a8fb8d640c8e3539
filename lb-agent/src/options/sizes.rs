//! The capacities of the maps.

use std::fs;

/// The capacities of the maps, in entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// `--max-services`.
    pub services: u32,
    /// `--max-backends`.
    pub backends: u32,
    /// `--max-slots`.
    pub slots: u32,
    /// `--max-flows`: of each family.
    pub flows: u32,
}

/// `--max-flows`, unless it is given: so many connections as the kernel gives conntrack on a node
/// with this memory (`nf_conntrack_init_start`).
pub fn default_flows() -> u32 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    flows_of(memory(&text))
}

/// The bytes of memory that /proc/meminfo says the node has.
fn memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

fn flows_of(memory: Option<u64>) -> u32 {
    const GIBIBYTE: u64 = 1 << 30;
    match memory {
        Some(bytes) if bytes <= GIBIBYTE => 8_192,
        Some(bytes) if bytes > 4 * GIBIBYTE => 262_144,
        _ => 65_536,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_with_more_memory_has_room_for_more_flows() {
        let rows = [
            ("MemTotal:         512000 kB\n", 8_192),
            ("MemTotal:        1048576 kB\n", 8_192),
            ("MemTotal:        2097152 kB\nMemFree: 1 kB\n", 65_536),
            ("MemFree: 1 kB\nMemTotal:        4194304 kB\n", 65_536),
            ("MemTotal:       16384000 kB\n", 262_144),
            ("", 65_536),
        ];
        for (meminfo, flows) in rows {
            assert_eq!(flows_of(memory(meminfo)), flows, "{meminfo}");
        }
    }
}
