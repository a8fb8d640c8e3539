//! Processes and threads with few rights, as a container runtime gives them to the agent.
//!
//! A process that is limited here stays root: it has the capabilities that are left, as in a pod.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};

/// The DaemonSet, which says what the agent gets.
const DAEMON_SET: &str = include_str!("../../../../../manifests/base/daemonset.yaml");

/// Names without `CAP_` and bits of capabilities(7).
const BITS: [(&str, u32); 4] = [("NET_ADMIN", 12), ("SYS_ADMIN", 21), ("PERFMON", 38), ("BPF", 39)];

/// The capabilities that the DaemonSet adds for the agent.
///
/// # Errors
/// The DaemonSet adds none, or an unknown one.
pub fn of_manifest() -> Result<Vec<&'static str>> {
    let line = DAEMON_SET.lines().find_map(|line| line.trim().strip_prefix("add: ["));
    let names = line.and_then(|line| line.strip_suffix(']')).context("no capabilities.add")?;
    names
        .split(", ")
        .map(|name| {
            let known = BITS.iter().find(|(known, _)| *known == name);
            known.map(|(known, _)| *known).with_context(|| format!("unknown capability {name}"))
        })
        .collect()
}

/// The set of these capabilities as a number, as `/proc/PID/status` shows it.
pub fn mask(capabilities: &[&str]) -> u64 {
    BITS.iter()
        .filter(|(name, _)| capabilities.contains(name))
        .fold(0, |mask, (_, bit)| mask | 1 << bit)
}

/// Makes the program that `command` starts have at most these capabilities.
pub fn limit(command: &mut Command, capabilities: &[&str]) {
    let mask = mask(capabilities);
    // SAFETY: between fork and exec this makes system calls only.
    unsafe {
        command.pre_exec(move || {
            for bit in (0..64).filter(|bit| mask & 1u64 << bit == 0) {
                match libc::prctl(libc::PR_CAPBSET_DROP, bit, 0, 0, 0) {
                    0 => {}
                    // The first number that is no capability of this kernel.
                    _ if io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) => break,
                    _ => return Err(io::Error::last_os_error()),
                }
            }
            Ok(())
        });
    }
}

/// Makes the program that `command` starts get `error` for the system call `number`, by a seccomp
/// filter as container runtimes make it.
pub fn refuse(command: &mut Command, number: libc::c_long, error: i32) {
    const RETURN_ERRNO: u32 = 0x0005_0000;
    const RETURN_ALLOW: u32 = 0x7fff_0000;
    let instruction = |code, k, jf| libc::sock_filter { code, jt: 0, jf, k };
    let filter = [
        // The number is the first word that a filter sees.
        instruction(0x20, 0, 0),
        instruction(0x15, number as u32, 1),
        instruction(0x06, RETURN_ERRNO | error as u32, 0),
        instruction(0x06, RETURN_ALLOW, 0),
    ];
    // SAFETY: between fork and exec this makes one system call. The kernel reads `len` instructions
    // from `filter`, which is moved into the closure, so that it lives as long.
    unsafe {
        command.pre_exec(move || {
            let program =
                libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
            let mode = libc::SECCOMP_MODE_FILTER;
            match libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
    }
}

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct Header {
    version: u32,
    process: i32,
}

/// `struct __user_cap_data_struct`; two of them make 64 bits.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Runs `work` on a thread that has just these capabilities, and so do threads that it starts.
///
/// # Errors
/// The thread cannot give up its capabilities, or `work` fails.
pub fn with_only<T: Send>(
    capabilities: &[&str],
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    const VERSION_3: u32 = 0x2008_0522;
    let mask = mask(capabilities);
    thread::scope(|scope| {
        let worker = scope.spawn(move || {
            let half = |bits| Data { effective: bits, permitted: bits, inheritable: 0 };
            let data = [half(mask as u32), half((mask >> 32) as u32)];
            let header = Header { version: VERSION_3, process: 0 };
            // SAFETY: the kernel reads a header and, for this version, two elements of data.
            let result = unsafe {
                libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr().cast::<Data>())
            };
            ensure!(result == 0, "capset: {}", io::Error::last_os_error());
            work()
        });
        worker.join().map_err(|_| anyhow!("the thread with few capabilities panicked"))?
    })
}
