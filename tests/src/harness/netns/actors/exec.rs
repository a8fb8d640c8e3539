//! Runs the system's network tools, with errors that show the command and what it said.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Runs a program in the network namespace of the calling thread and returns its output.
///
/// # Errors
/// It cannot be started or its exit status is not 0.
pub(crate) fn tool(program: &str, arguments: &[&str], input: &str) -> Result<String> {
    let shown = || format!("{program} {}", arguments.join(" "));
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", shown()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that fails before it has read everything says why on stderr.
        stdin.write_all(input.as_bytes()).ok();
    }
    let output = child.wait_with_output().with_context(shown)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let input = if input.is_empty() { String::new() } else { format!("\ninput:\n{input}") };
        bail!("`{}` failed with {}: {}{input}", shown(), output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs lines of `ip` commands in the network namespace of the calling thread.
///
/// # Errors
/// The first line that fails.
pub(crate) fn ip_batch(lines: &[String]) -> Result<()> {
    let mut input = lines.join("\n");
    input.push('\n');
    tool("ip", &["-batch", "-"], &input).map(drop)
}

/// Writes below /proc/sys/net of the calling thread's network namespace; the key has slashes.
///
/// # Errors
/// No such key, or a value it refuses.
pub(crate) fn sysctl(key: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/{key}");
    std::fs::write(&path, value).with_context(|| format!("cannot write {value} to {path}"))
}

/// Has packets that leave by a device of the calling thread's namespace carry finished
/// checksums.
///
/// # Errors
/// No such device, or one that cannot do it.
pub(in crate::harness::netns) fn disable_tx_checksum(device: &str) -> Result<()> {
    const ETHTOOL_STXCSUM: u32 = 0x17;
    ethtool(device, ETHTOOL_STXCSUM, 0).context("cannot switch off tx checksum offload")
}

/// Has a veth of the calling thread's namespace take in what XDP of its peer sends: the
/// kernel polls it only with GRO, or with an XDP program of its own.
///
/// # Errors
/// No such device, or one that cannot do it.
pub(in crate::harness::netns) fn enable_gro(device: &str) -> Result<()> {
    const ETHTOOL_SGRO: u32 = 0x2c;
    ethtool(device, ETHTOOL_SGRO, 1).context("cannot switch on GRO")
}

fn ethtool(device: &str, command: u32, value: u32) -> Result<()> {
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    let fd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // `struct ethtool_value`.
    let mut value = [command, value];
    let mut name = [0; libc::IFNAMSIZ];
    if device.len() >= name.len() {
        bail!("device name {device} is too long");
    }
    for (to, from) in name.iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    let mut request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: value.as_mut_ptr().cast() },
    };
    // SAFETY: `request` is a whole ifreq whose data points to an ethtool_value; both live
    // until the call returns.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if done != 0 {
        let error = std::io::Error::last_os_error();
        bail!("{device}: {error}");
    }
    Ok(())
}
