//! The timeouts of flows on this node, and its kernel's range of local ports.

use std::{fs, path::Path, time::Duration};

use lb_common::abi::settings::Timeouts;

/// The first and the last port that the kernel assigns to sockets of the caller's network namespace
/// (`net.ipv4.ip_local_port_range`, which applies to IPv6 too).
pub fn local_ports() -> (u16, u16) {
    const DEFAULT: (u16, u16) = (32_768, 60_999);
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ports = text.split_whitespace().map_while(|text| text.parse().ok());
    ports.next().zip(ports.next()).unwrap_or(DEFAULT)
}

/// The timeouts of flows, in ticks. On a node with conntrack, those of established and half-closed
/// TCP and of UDP are those of conntrack.
pub fn timeouts(ticks_per_second: u32) -> Timeouts {
    let setting = |name: &str| {
        let path = Path::new("/proc/sys/net/netfilter").join(name);
        let seconds = fs::read_to_string(path).ok()?.trim().parse().ok()?;
        Some(Duration::from_secs(seconds))
    };
    timeouts_from(
        ticks_per_second,
        &Conntrack {
            established: setting("nf_conntrack_tcp_timeout_established"),
            half_closed: setting("nf_conntrack_tcp_timeout_close_wait"),
            udp: setting("nf_conntrack_udp_timeout"),
            udp_stream: setting("nf_conntrack_udp_timeout_stream"),
        },
    )
}

/// The timeouts of the node's conntrack; `None` if it has none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Conntrack {
    pub(crate) established: Option<Duration>,
    pub(crate) half_closed: Option<Duration>,
    pub(crate) udp: Option<Duration>,
    pub(crate) udp_stream: Option<Duration>,
}

/// The kernel's default for a half-closed connection is a minute. kube-proxy raises it to an hour,
/// because a client that has sent its FIN may wait that long for the response.
pub(crate) fn timeouts_from(ticks_per_second: u32, conntrack: &Conntrack) -> Timeouts {
    const HOUR: Duration = Duration::from_secs(3600);
    let ticks = |timeout: Duration| {
        u32::try_from(timeout.as_secs().saturating_mul(ticks_per_second.into()))
            .unwrap_or(LONGEST)
            .min(LONGEST)
    };
    let seconds = |seconds| ticks(Duration::from_secs(seconds));
    Timeouts {
        tcp_syn: seconds(60),
        tcp_established: ticks(conntrack.established.unwrap_or(24 * HOUR)),
        tcp_half_closed: ticks(conntrack.half_closed.unwrap_or(HOUR).max(HOUR)),
        tcp_fin_one_way: seconds(120),
        tcp_closing: seconds(60),
        tcp_reset: seconds(120),
        udp: conntrack.udp.map_or(seconds(30), ticks),
        udp_stream: conntrack.udp_stream.map_or(seconds(120), ticks),
    }
}

/// The longest timeout: ticks are 32-bit numbers that wrap, and the sweep waits for twice the
/// timeout.
pub const LONGEST: u32 = 1 << 29;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_those_of_conntrack_if_it_has_some() {
        let none = timeouts_from(250, &Conntrack::default());
        assert_eq!((none.tcp_established, none.tcp_half_closed), (86_400 * 250, 3_600 * 250));
        assert_eq!((none.tcp_syn, none.tcp_closing), (60 * 250, 60 * 250));
        assert_eq!((none.udp, none.udp_stream), (30 * 250, 120 * 250));
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let (udp, udp_stream) = (seconds(40), seconds(600));
        let (established, half_closed) = (seconds(500), seconds(60));
        let set = Conntrack { established, half_closed, udp, udp_stream };
        let set = timeouts_from(100, &set);
        assert_eq!((set.tcp_established, set.tcp_half_closed), (50_000, 360_000));
        assert_eq!((set.udp, set.udp_stream), (4_000, 60_000));
        let endless = Conntrack { established: seconds(u64::MAX), ..Conntrack::default() };
        let endless = timeouts_from(1000, &endless);
        assert_eq!(endless.tcp_established, LONGEST);
    }
}
