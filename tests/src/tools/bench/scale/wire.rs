//! What the processes of a network namespace have received, and the connections that they hold:
//! the kernel's own counters, so that nothing stands between a client and the API server.

use std::fs;
use std::net::SocketAddrV4;

use anyhow::{Context, Result};

use crate::harness::netns::topology::namespace::Netns;

/// Counters of a network namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Wire {
    /// Bytes that its devices have received, headers included; not over the loopback device.
    pub received: u64,
    /// Connections that its processes have opened or tried to open.
    pub opened: u64,
}

impl Wire {
    /// The counters now.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn of(namespace: &Netns) -> Result<Self> {
        namespace.run(|| {
            let received = parse_received(&read("dev")?);
            let opened = parse_opened(&read("snmp")?).context("snmp has no ActiveOpens")?;
            Ok(Self { received, opened })
        })
    }

    /// What came after `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self { received: self.received - before.received, opened: self.opened - before.opened }
    }
}

/// How many connections to a server are established.
///
/// # Errors
/// The namespace cannot be entered.
pub fn established(namespace: &Netns, server: SocketAddrV4) -> Result<usize> {
    namespace.run(|| Ok(parse_established(&read("tcp")?, server)))
}

/// A file of the calling thread's namespace.
fn read(name: &str) -> Result<String> {
    let path = format!("/proc/thread-self/net/{name}");
    fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
}

fn parse_received(dev: &str) -> u64 {
    let devices = dev.lines().filter_map(|line| line.split_once(':'));
    let others = devices.filter(|(name, _)| name.trim() != "lo");
    others.filter_map(|(_, values)| values.split_whitespace().next()?.parse::<u64>().ok()).sum()
}

/// The values of a protocol are in the line after their names.
fn parse_opened(snmp: &str) -> Option<u64> {
    let mut lines = snmp.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let at = lines.next()?.split(' ').position(|name| name == "ActiveOpens")?;
    lines.next()?.split(' ').nth(at)?.parse().ok()
}

fn parse_established(tcp: &str, server: SocketAddrV4) -> usize {
    const ESTABLISHED: &str = "01";
    let address = u32::from_ne_bytes(server.ip().octets());
    let wanted = format!("{address:08X}:{:04X}", server.port());
    let ends = tcp.lines().filter(|line| {
        let mut fields = line.split_whitespace().skip(2);
        fields.next() == Some(&wanted) && fields.next() == Some(ESTABLISHED)
    });
    ends.count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found() {
        let dev = "Inter-| Receive\n face |bytes\n    lo: 9 1 0\n  eth0: 70 1 0\n wg0:5 1\n";
        assert_eq!(parse_received(dev), 75);
        let snmp = "Ip: A B\nIp: 1 2\nTcp: RtoMin ActiveOpens PassiveOpens\nTcp: 200 3 4\n";
        assert_eq!(parse_opened(snmp), Some(3));
    }

    #[test]
    fn connections_to_the_server_alone_count_and_only_if_they_are_established() {
        let server: SocketAddrV4 = "172.18.0.1:6443".parse().unwrap();
        let word = format!("{:08X}", u32::from_ne_bytes(server.ip().octets()));
        let line = |remote: &str, state: &str| format!("   0: 0B0012AC:C001 {remote} {state} 0\n");
        let table = [
            "  sl  local_address rem_address   st\n".to_owned(),
            line(&format!("{word}:192B"), "01"),
            line(&format!("{word}:192B"), "06"),
            line(&format!("{word}:192C"), "01"),
            line("0100007F:192B", "01"),
        ];
        assert_eq!(parse_established(&table.concat(), server), 1);
    }
}
