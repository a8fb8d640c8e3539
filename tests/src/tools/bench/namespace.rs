//! A private network namespace with a device that leads to another node.

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};
use lb_common::abi::settings::Device;
use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, CpuSet, sched_getaffinity, sched_setaffinity, unshare},
    unistd::Pid,
};

/// The device.
pub const DEVICE: &str = "eth0";
/// Its link-layer address.
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The other node's link-layer address.
pub const OTHER_NODE: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// That of the router to clients outside.
pub const ROUTER: [u8; 6] = [2, 0, 0, 0, 0, 3];

/// The epoch of its routes and neighbours, which do not change.
pub const EPOCH: u32 = 1;
/// Devices that are down; the XDP wrappers are attached to them.
pub const IDLE: [&str; 4] = ["idle0", "idle1", "idle2", "idle3"];

/// Moves the calling thread, and those it starts from now on, into a new network namespace
/// that ends with them, and makes the device: IPv4 and IPv6 routes lead over it to the pods of
/// another node and to clients outside, by neighbours whose link-layer addresses are known.
///
/// # Errors
/// No privileges, or no `ip`.
pub fn enter() -> Result<Device> {
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    for (name, value) in [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")] {
        fs::write(format!("/proc/sys/net/{name}"), value)
            .with_context(|| format!("cannot set net/{name}"))?;
    }
    for line in [
        "link set lo up",
        "link add eth0 address 02:00:00:00:00:01 type veth peer name peer0",
        "link add idle0 type veth peer name idle1",
        "link add idle2 type veth peer name idle3",
        "link set eth0 up",
        "link set peer0 up",
        "addr add 10.18.0.11/16 dev eth0",
        "addr add fd00:10:12::b/64 dev eth0 nodad",
        "neigh add 10.18.0.12 lladdr 02:00:00:00:00:02 dev eth0",
        "neigh add fd00:10:12::c lladdr 02:00:00:00:00:02 dev eth0",
        "neigh add 10.18.0.1 lladdr 02:00:00:00:00:03 dev eth0",
        "neigh add fd00:10:12::1 lladdr 02:00:00:00:00:03 dev eth0",
        "route add 10.245.0.0/16 via 10.18.0.12",
        "route add fd00:10:f5::/64 via fd00:10:12::c",
        "route add 10.34.0.0/15 via 10.18.0.1",
        "route add fd00:10:22::/47 via fd00:10:12::1",
    ] {
        ip(line)?;
    }
    let ifindex = if_nametoindex(DEVICE).context("eth0 has no index")?;
    Ok(Device { ifindex, mac: MAC, flags: 0, mtu: 1500, epoch: EPOCH })
}

/// Moves the calling thread into a new network namespace that leads nowhere: connect() to the
/// pods of another node fails with EHOSTUNREACH, to any other address with ENETUNREACH.
///
/// # Errors
/// No privileges, or no `ip`.
pub fn enter_dead_end() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    for line in [
        "link set lo up",
        "route add unreachable 10.245.0.0/16",
        "route add unreachable fd00:10:f5::/64",
    ] {
        ip(line)?;
    }
    Ok(())
}

fn ip(line: &str) -> Result<()> {
    let family = if line.contains("fd00") { "-6" } else { "-4" };
    let output = Command::new("ip").arg(family).args(line.split(' ')).output();
    let output = output.context("cannot start ip (package iproute2)")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {line}: {}", errors.trim_end());
    Ok(())
}

/// Keeps the calling thread on the processor that it may use with the highest number, and
/// ahead of other processes there, which would empty its caches.
///
/// # Errors
/// As [`last_processor`] and [`keep_to`].
pub fn keep_to_one_processor() -> Result<()> {
    keep_to(last_processor()?)
}

/// The processor with the highest number that the calling thread may use.
///
/// # Errors
/// Those of sched_getaffinity(2).
pub fn last_processor() -> Result<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let last = (0..CpuSet::count()).rev().find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    last.context("no processor")
}

/// Keeps the calling thread, and those that it starts from now on, on this processor and ahead of
/// other processes there.
///
/// # Errors
/// Those of sched_setaffinity(2) and setpriority(2).
pub fn keep_to(processor: usize) -> Result<()> {
    let mut one = CpuSet::new();
    one.set(processor)?;
    sched_setaffinity(Pid::from_raw(0), &one)
        .with_context(|| format!("cannot keep to processor {processor}"))?;
    // SAFETY: takes numbers alone.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
    ensure!(result == 0, "cannot set the priority: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Keeps the calling thread, and the processes that it starts from now on, away from this
/// processor; does nothing where there is no other.
///
/// # Errors
/// Those of sched_setaffinity(2).
pub fn keep_off(processor: usize) -> Result<()> {
    let mut others = sched_getaffinity(Pid::from_raw(0))?;
    others.unset(processor)?;
    if (0..CpuSet::count()).any(|cpu| others.is_set(cpu).unwrap_or(false)) {
        sched_setaffinity(Pid::from_raw(0), &others)
            .with_context(|| format!("cannot keep off processor {processor}"))?;
    }
    Ok(())
}
