//! What this process may do, and why the kernel refuses it something.
//!
//! It reads `/proc/self/status` and asks the kernel to load a program of two instructions. An error
//! names one cause and its remedy.

use std::{fmt, fs, io};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The capabilities that an agent cannot do without, as bits of capabilities(7).
pub const NEEDED: [Capability; 3] = [Capability::NetAdmin, Capability::Perfmon, Capability::Bpf];

/// A capability that the agent asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// Attaches programs to interfaces, and reads the tables of connection tracking.
    NetAdmin,
    /// Mounts the bpffs; only `run --init-only` does, where the node has none.
    SysAdmin,
    /// Raises the limit of locked memory, which counts maps before Linux 5.11.
    SysResource,
    /// Loads programs that the verifier would else reject: they compare pointers.
    Perfmon,
    /// Makes maps, loads programs, opens pins.
    Bpf,
}

impl Capability {
    fn bit(self) -> u32 {
        match self {
            Self::NetAdmin => 12,
            Self::SysAdmin => 21,
            Self::SysResource => 24,
            Self::Perfmon => 38,
            Self::Bpf => 39,
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::NetAdmin => "CAP_NET_ADMIN",
            Self::SysAdmin => "CAP_SYS_ADMIN",
            Self::SysResource => "CAP_SYS_RESOURCE",
            Self::Perfmon => "CAP_PERFMON",
            Self::Bpf => "CAP_BPF",
        })
    }
}

/// The rights of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Privileges {
    effective: u64,
    is_filtered: bool,
    /// The limit of locked memory in bytes, if the kernel counts maps against it and the process
    /// cannot raise it.
    locked_memory: Option<u64>,
}

impl Privileges {
    /// Those of the calling process.
    pub fn own() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mut own = Self::of_status(&status);
        if counts_locked_memory() && !own.has(Capability::SysResource) {
            let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map(|(_, hard)| hard);
            own.locked_memory = limit.ok().filter(|limit| *limit != libc::RLIM_INFINITY);
        }
        own
    }

    fn of_status(status: &str) -> Self {
        let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let effective = field("CapEff:").and_then(|text| u64::from_str_radix(text, 16).ok());
        Self {
            effective: effective.unwrap_or_default(),
            is_filtered: field("Seccomp:").is_some_and(|mode| mode != "0"),
            locked_memory: None,
        }
    }

    /// Whether the process has `capability`. CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON.
    pub fn has(self, capability: Capability) -> bool {
        let bit = |capability: Capability| self.effective & 1 << capability.bit() != 0;
        bit(capability)
            || matches!(capability, Capability::Bpf | Capability::Perfmon)
                && bit(Capability::SysAdmin)
    }

    /// Why the kernel refuses bpf(2) to this process.
    pub fn refusal(self) -> Refusal {
        let missing: Vec<_> = NEEDED.into_iter().filter(|needed| !self.has(*needed)).collect();
        if !missing.is_empty() {
            return Refusal::Capabilities { missing };
        }
        match self.locked_memory {
            Some(limit) => Refusal::LockedMemory { limit },
            None if self.is_filtered => Refusal::Seccomp,
            None => Refusal::Module,
        }
    }
}

/// Whether the memory of maps and programs counts as locked memory on this kernel.
fn counts_locked_memory() -> bool {
    is_before_5_11(&fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default())
}

fn is_before_5_11(release: &str) -> bool {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    let mut number = || numbers.next().and_then(|digits| digits.parse::<u32>().ok());
    matches!((number(), number()), (Some(major), Some(minor)) if (major, minor) < (5, 11))
}

/// Checks that this process may do what an agent does with programs and maps. It raises the limit of
/// locked memory first, because the maps of an earlier agent count as this one's: the kernel counts
/// the memory of a user (`bpf_charge_memlock`).
///
/// # Errors
/// [`Refusal`].
pub fn require() -> Result<(), Refusal> {
    /// `r0 = 0; exit`.
    const NOTHING: [u64; 2] = [0xb7, 0x95];
    let own = Privileges::own();
    if NEEDED.into_iter().any(|needed| !own.has(needed)) {
        return Err(own.refusal());
    }
    if counts_locked_memory() {
        // Without CAP_SYS_RESOURCE the limit stays, and may suffice.
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, libc::RLIM_INFINITY, libc::RLIM_INFINITY);
    }
    match lb_sys::load_classifier(&NOTHING) {
        Err(error) if is_refusal(&error) => Err(own.refusal()),
        _ => Ok(()),
    }
}

/// Whether the error is that of a process that may not call bpf(2). Filters answer with either.
pub fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS))
}

/// Why the kernel refuses bpf(2).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The process lacks capabilities.
    #[error(
        "missing {}: run as root, or add them to capabilities.add in the securityContext of the pod",
        missing.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    Capabilities {
        /// Those that it lacks.
        missing: Vec<Capability>,
    },
    /// Maps count as locked memory, and there is not enough of it.
    #[error(
        "at most {limit} bytes may be locked, which is too little for the maps on Linux before \
         5.11: add CAP_SYS_RESOURCE to the pod, or raise LimitMEMLOCK of the container runtime"
    )]
    LockedMemory {
        /// The limit.
        limit: u64,
    },
    /// A filter of system calls.
    #[error(
        "a seccomp filter refuses bpf(2) although the capabilities are there: RuntimeDefault \
         allows it from containerd 1.6.9 and Docker 23 on; with an older one set \
         seccompProfile.type to Unconfined for the pod"
    )]
    Seccomp,
    /// Neither: a security module or the lockdown of the kernel.
    #[error(
        "the kernel refuses bpf(2) although the capabilities are there: a security module \
         (SELinux, AppArmor) or kernel lockdown does, and its log (dmesg, audit) says which rule"
    )]
    Module,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(effective: u64, seccomp: u32) -> Privileges {
        Privileges::of_status(&format!("CapEff:\t{effective:016x}\nSeccomp:\t{seccomp}\n"))
    }

    #[test]
    fn the_cause_of_a_refusal_is_named() {
        let all = NEEDED.iter().fold(0, |all, needed| all | 1 << needed.bit());
        let admin = 1u64 << Capability::NetAdmin.bit() | 1 << Capability::SysAdmin.bit();
        let limited = Privileges { locked_memory: Some(65_536), ..of(all, 2) };
        for (privileges, text) in [
            (of(0, 2), "missing CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF: run as root"),
            (of(all & !(1 << 38), 0), "missing CAP_PERFMON: run as root"),
            (of(all, 2), "a seccomp filter refuses bpf(2)"),
            (of(all, 0), "the kernel refuses bpf(2) although"),
            (of(admin, 0), "the kernel refuses bpf(2) although"),
            (limited, "at most 65536 bytes may be locked"),
        ] {
            let said = privileges.refusal().to_string();
            assert!(said.starts_with(text), "{said}");
        }
    }

    #[test]
    fn maps_are_locked_memory_before_5_11() {
        for (release, counts) in [("5.10.0-30-amd64", true), ("5.11.1", false), ("6.1.0", false)] {
            assert_eq!(is_before_5_11(release), counts, "{release}");
        }
    }
}
