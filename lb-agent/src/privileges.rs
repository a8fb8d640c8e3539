//! What this process may do, and why the kernel refuses it something.
//!
//! It reads `/proc/self/status` and asks the kernel to load a program of two instructions. An error
//! names one cause and its remedy.

use std::{fmt, fs, io};

/// The capabilities that an agent cannot do without, as bits of capabilities(7).
pub const NEEDED: [Capability; 3] = [Capability::NetAdmin, Capability::Perfmon, Capability::Bpf];

/// A capability that the agent asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// Attaches programs to interfaces, and reads the tables of connection tracking.
    NetAdmin,
    /// Mounts the bpffs; only `run --init-only` does, where the node has none.
    SysAdmin,
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
}

impl Privileges {
    /// Those of the calling process.
    pub fn own() -> Self {
        Self::of_status(&fs::read_to_string("/proc/self/status").unwrap_or_default())
    }

    fn of_status(status: &str) -> Self {
        let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let effective = field("CapEff:").and_then(|text| u64::from_str_radix(text, 16).ok());
        Self {
            effective: effective.unwrap_or_default(),
            is_filtered: field("Seccomp:").is_some_and(|mode| mode != "0"),
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
        if self.is_filtered { Refusal::Seccomp } else { Refusal::Module }
    }
}

/// Checks that this process may do what an agent does with programs and maps.
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
        for (privileges, text) in [
            (of(0, 2), "missing CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF: run as root"),
            (of(all & !(1 << 38), 0), "missing CAP_PERFMON: run as root"),
            (of(all, 2), "a seccomp filter refuses bpf(2)"),
            (of(all, 0), "the kernel refuses bpf(2) although"),
            (of(admin, 0), "the kernel refuses bpf(2) although"),
        ] {
            let said = privileges.refusal().to_string();
            assert!(said.starts_with(text), "{said}");
        }
    }
}
