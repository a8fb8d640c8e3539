//! A pod that sends from any address.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lb_common::abi::address::{Address4, Be16, Ipv4};
use lb_common::balance::Endpoint;
use lb_testing::frame::Frame;

use crate::harness::netns::topology::node::{Node, Pod};
use crate::harness::netns::traffic::capture::{Sender, link_address};

/// A pod's packet socket.
pub(super) struct Harm {
    sender: Sender,
    /// The MAC of the node's end of the pod's link.
    router: [u8; 6],
}

impl Harm {
    /// Of a pod on this node.
    ///
    /// # Errors
    /// No privileges.
    pub(super) fn of(pod: &Pod, node: &Node) -> Result<Self> {
        let router = link_address(node.netns(), pod.host_device())?;
        Ok(Self { sender: Sender::on(pod.netns(), "eth0")?, router })
    }

    /// Sends a packet of this protocol, and with these flags of TCP.
    ///
    /// # Errors
    /// Those of send(2).
    pub(super) fn send(
        &self,
        protocol: u8,
        flags: u8,
        from: Endpoint<Address4>,
        to: Endpoint<Address4>,
    ) -> Result<()> {
        let mut frame = Frame::<Ipv4>::of(protocol, from, to, flags).bytes();
        frame[..6].copy_from_slice(&self.router);
        self.sender.send(&frame).context("cannot send from the pod")
    }

    /// Sends so many packets in `time` at most, each from another [`forged`] source. Returns how many
    /// were sent: fewer if the machine does not manage more, or once `stop` is set.
    ///
    /// # Errors
    /// As [`Harm::send`].
    pub(super) fn flood(
        &self,
        (protocol, flags): (u8, u8),
        to: Endpoint<Address4>,
        (packets, time): (u64, Duration),
        stop: &AtomicBool,
    ) -> Result<u64> {
        let start = Instant::now();
        let mut sent = 0;
        while sent < packets && start.elapsed() < time && !stop.load(Ordering::Relaxed) {
            let part = start.elapsed().as_secs_f64() / time.as_secs_f64();
            let due = (part * packets as f64) as u64;
            // In portions, so that the end is noticed.
            let end = due.min(sent + PORTION);
            while sent < end {
                self.send(protocol, flags, forged(sent), to)?;
                sent += 1;
            }
            if sent >= due {
                thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(sent)
    }
}

/// How many packets are sent before the clock is read again.
const PORTION: u64 = 256;

/// The source number `number` of two thousand million: an address of the cluster's pods that no pod has,
/// because a proxy may give other clients an address of its node, whose ports end before a table is full.
pub(super) fn forged(number: u64) -> Endpoint<Address4> {
    // An odd factor: no two numbers below 2^31 give the same address and port.
    let mixed = (number as u32).wrapping_mul(0x9e37_79b1) & (u32::MAX >> 1);
    let address = Ipv4Addr::new(10, 244, 128 | (mixed >> 24) as u8, (mixed >> 16) as u8);
    endpoint(address, (mixed as u16).max(1))
}

/// The end of a flow.
pub(super) fn endpoint(address: Ipv4Addr, port: u16) -> Endpoint<Address4> {
    Endpoint { address: address.into(), port: Be16::new(port) }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn forged_sources_differ_and_are_no_pod_s() {
        let of = |number| {
            let Endpoint { address, port } = forged(number);
            (Ipv4Addr::from(address), port.get())
        };
        let all: HashSet<_> = (0..100_000).map(of).collect();
        assert!(all.len() > 99_990, "{}", all.len());
        let is_meant = |address: &Ipv4Addr| {
            let [a, b, c, _] = address.octets();
            [a, b] == [10, 244] && c >= 128
        };
        assert!(all.iter().all(|(address, port)| is_meant(address) && *port > 0));
    }
}
