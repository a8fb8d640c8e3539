//! What devices are asked to do for the kernel.

use anyhow::Result;

use crate::harness::netns::actors::exec::{disable_tx_checksum, enable_gro, ip_batch};
use crate::harness::netns::topology::namespace::Netns;

/// Has what leaves by a device carry finished checksums, and be cut into segments before.
///
/// # Errors
/// No such device, or one that cannot do it.
pub fn finish_before(netns: &Netns, device: &str) -> Result<()> {
    netns.run(|| disable_tx_checksum(device))
}

/// Has a veth merge the segments that it receives (GRO).
///
/// # Errors
/// As [`finish_before`].
pub fn merge(netns: &Netns, device: &str) -> Result<()> {
    netns.run(|| enable_gro(device))
}

/// Gives devices another MTU.
///
/// # Errors
/// No such device, or one that cannot do it.
pub fn set_mtu(netns: &Netns, devices: &[&str], mtu: u16) -> Result<()> {
    let lines = devices.iter().map(|device| format!("link set {device} mtu {mtu}"));
    let lines: Vec<_> = lines.collect();
    netns.run(|| ip_batch(&lines))
}
