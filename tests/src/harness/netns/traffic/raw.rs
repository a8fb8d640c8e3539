//! Packets that no ordinary socket sends: echo requests, strange protocols, TCP out of the blue.
//!
//! They are sent on a thread inside a namespace, so no connect-time hook sees them.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockaddrStorage, connect, recv, send, setsockopt, sockopt};
use nix::sys::time::TimeVal;

use crate::harness::netns::actors::host::Host;

/// A protocol number for experiments (RFC 3692).
pub const EXPERIMENTAL: u8 = 253;
const TCP: u8 = 6;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// What came back for a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// A packet of the same protocol, the answer that was waited for.
    Answered,
    /// An ICMP error, or one of the local stack, as the socket is told.
    Refused(Errno),
    /// Nothing.
    Silence,
}

/// Pings an address once from a host.
///
/// # Errors
/// No privileges for a raw socket.
pub fn ping(host: &Host, to: IpAddr, timeout: Duration) -> Result<Outcome> {
    let (protocol, request, reply) = if to.is_ipv4() { (ICMP, 8, 0) } else { (ICMPV6, 128, 129) };
    let mut packet = vec![request, 0, 0, 0, 0x17, 0x2a, 0, 1];
    packet.extend_from_slice(b"is anybody there");
    let is_reply = move |answer: &[u8]| answer.first() == Some(&reply) && answer[4..8] == PING_ID;
    host.netns().run(|| {
        let socket = open(protocol, to, timeout)?;
        if to.is_ipv4() {
            // The kernel makes the sum of ICMPv6 itself.
            let sum = internet_checksum(&[&packet]).to_be_bytes();
            packet[2..4].copy_from_slice(&sum);
        }
        exchange(&socket, &packet, to, timeout, is_reply)
    })
}

const PING_ID: [u8; 4] = [0x17, 0x2a, 0, 1];

/// Sends a packet of [`EXPERIMENTAL`] from a host.
///
/// # Errors
/// As [`ping`].
pub fn strange_protocol(host: &Host, to: IpAddr, timeout: Duration) -> Result<Outcome> {
    host.netns().run(|| {
        let socket = open(EXPERIMENTAL, to, timeout)?;
        exchange(&socket, b"what is this", to, timeout, |_| true)
    })
}

/// Sends a TCP segment with ACK set and without a connection from a host's own address.
///
/// # Errors
/// As [`ping`].
pub fn tcp_ack(host: &Host, to: SocketAddr, timeout: Duration) -> Result<Outcome> {
    const ACK: u8 = 0x10;
    let from_port: u16 = 40_123;
    let own = host.addresses();
    let mut segment = Vec::new();
    segment.extend(from_port.to_be_bytes());
    segment.extend(to.port().to_be_bytes());
    segment.extend([0, 0, 0x30, 0x39, 0, 0, 0x10, 0x92, 5 << 4, ACK, 0x10, 0, 0, 0, 0, 0]);
    let length = segment.len() as u8;
    let sum = match to.ip() {
        IpAddr::V4(to) => {
            internet_checksum(&[&own.v4.octets(), &to.octets(), &[0, TCP, 0, length], &segment])
        }
        IpAddr::V6(to) => {
            internet_checksum(&[&own.v6.octets(), &to.octets(), &[0, TCP, 0, length], &segment])
        }
    };
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    host.netns().run(|| {
        let socket = open(TCP, to.ip(), timeout)?;
        exchange(&socket, &segment, to.ip(), timeout, |_| true)
    })
}

/// Sends a packet of the same family to `to` in a tunnel (IP in IP), from a host's own address.
///
/// # Errors
/// As [`ping`].
pub fn tunnel(host: &Host, to: IpAddr, packet: &[u8]) -> Result<()> {
    host.netns().run(|| {
        let socket = open(tunnelled(to), to, Duration::from_secs(1))?;
        connect(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(to, 0)))?;
        send(socket.as_raw_fd(), packet, MsgFlags::empty())?;
        Ok(())
    })
}

/// The protocol number of a packet in another one of the family of `address`.
pub(in crate::harness::netns) fn tunnelled(address: IpAddr) -> u8 {
    if address.is_ipv4() { 4 } else { 41 }
}

/// A raw socket that is told of ICMP errors.
fn open(protocol: u8, to: IpAddr, timeout: Duration) -> Result<OwnedFd> {
    let fd = socket(protocol, to)?;
    let timeout = TimeVal::new(timeout.as_secs().try_into()?, timeout.subsec_micros().into());
    setsockopt(&fd, sockopt::ReceiveTimeout, &timeout)?;
    if to.is_ipv4() {
        setsockopt(&fd, sockopt::Ipv4RecvErr, &true)?;
    } else {
        setsockopt(&fd, sockopt::Ipv6RecvErr, &true)?;
    }
    Ok(fd)
}

/// A raw socket for packets of a protocol to and from `peer`'s family.
pub(in crate::harness::netns) fn socket(protocol: u8, peer: IpAddr) -> Result<OwnedFd> {
    let family = if peer.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // nix knows a few protocols only.
    // SAFETY: plain numbers.
    let fd = unsafe {
        libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::c_int::from(protocol))
    };
    if fd < 0 {
        return Err(io::Error::last_os_error()).context("cannot make a raw socket");
    }
    // SAFETY: it was just made and nobody else has it.
    Ok(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) })
}

fn exchange(
    fd: &OwnedFd,
    packet: &[u8],
    to: IpAddr,
    timeout: Duration,
    is_answer: impl Fn(&[u8]) -> bool,
) -> Result<Outcome> {
    let deadline = Instant::now() + timeout;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(to, 0)))?;
    if let Err(error) = send(fd.as_raw_fd(), packet, MsgFlags::empty()) {
        // A program on the way out dropped it.
        return Ok(if error == Errno::ENOBUFS {
            Outcome::Silence
        } else {
            Outcome::Refused(error)
        });
    }
    let mut buffer = [0; 2048];
    while Instant::now() < deadline {
        match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(length) => {
                // A raw IPv4 socket gets the IP header too.
                let start = if to.is_ipv4() { usize::from(buffer[0] & 0xf) * 4 } else { 0 };
                if is_answer(&buffer[start.min(length)..length]) {
                    return Ok(Outcome::Answered);
                }
            }
            Err(Errno::EAGAIN) => return Ok(Outcome::Silence),
            Err(error) => return Ok(Outcome::Refused(error)),
        }
    }
    Ok(Outcome::Silence)
}

/// RFC 1071, over parts of even length.
fn internet_checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 = words
        .map(|word| u32::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_over_data_and_its_sum_is_zero() {
        let data = [0x45, 0, 0, 0x54, 0xb8, 0x61, 0x40, 0, 0x40, 1];
        let sum = internet_checksum(&[&data]);
        assert_eq!(internet_checksum(&[&data, &sum.to_be_bytes()]), 0);
    }
}
