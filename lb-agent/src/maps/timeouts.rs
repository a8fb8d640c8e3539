//! The timeouts of flows on this node, and its kernel's range of local ports.

use std::{fs, path::Path, time::Duration};

use lb_common::abi::{
    flow_table::TIMES,
    settings::{Settings, Timeouts},
};

/// The first and the last port that the kernel assigns to sockets of the caller's network namespace
/// (`net.ipv4.ip_local_port_range`, which applies to IPv6 too).
pub fn local_ports() -> (u16, u16) {
    const DEFAULT: (u16, u16) = (32_768, 60_999);
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ports = text.split_whitespace().map_while(|text| text.parse().ok());
    ports.next().zip(ports.next()).unwrap_or(DEFAULT)
}

/// The timeouts of flows, in the unit of [`Settings::time_shift`]. On a node with conntrack, those of
/// established, half-closed and closed TCP and of UDP are those of conntrack.
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
            time_wait: setting("nf_conntrack_tcp_timeout_time_wait"),
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
    pub(crate) time_wait: Option<Duration>,
    pub(crate) udp: Option<Duration>,
    pub(crate) udp_stream: Option<Duration>,
}

/// The kernel's default for a half-closed connection is a minute. kube-proxy raises it to an hour,
/// because a client that has sent its FIN may wait that long for the response.
pub(crate) fn timeouts_from(ticks_per_second: u32, conntrack: &Conntrack) -> Timeouts {
    const HOUR: Duration = Duration::from_secs(3600);
    let shift = Settings::time_shift_of(ticks_per_second);
    let times = |timeout: Duration| {
        let ticks = timeout.as_secs().saturating_mul(ticks_per_second.into());
        u32::try_from(ticks >> shift).unwrap_or(LONGEST).min(LONGEST)
    };
    let seconds = |seconds| times(Duration::from_secs(seconds));
    Timeouts {
        tcp_syn: seconds(60),
        tcp_established: times(conntrack.established.unwrap_or(24 * HOUR)),
        tcp_half_closed: times(conntrack.half_closed.unwrap_or(HOUR).max(HOUR)),
        tcp_fin_one_way: seconds(120),
        // So long the ports rest: those of the side that closed first are in TIME_WAIT.
        tcp_closing: conntrack.time_wait.map_or(seconds(120), times),
        tcp_reset: seconds(120),
        udp: conntrack.udp.map_or(seconds(30), times),
        udp_stream: conntrack.udp_stream.map_or(seconds(120), times),
    }
}

/// The longest timeout, more than five days: half of all times look like the future, and the sweep
/// needs time to find what is past its timeout before that.
pub const LONGEST: u32 = TIMES / 2 - TIMES / 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_those_of_conntrack_if_it_has_some() {
        let times = |seconds: u32| (seconds * 250) >> 4;
        let none = timeouts_from(250, &Conntrack::default());
        assert_eq!((none.tcp_established, none.tcp_half_closed), (times(86_400), times(3_600)));
        assert_eq!((none.tcp_syn, none.tcp_closing), (times(60), times(120)));
        assert_eq!((none.udp, none.udp_stream), (times(30), times(120)));
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let (udp, udp_stream, time_wait) = (seconds(40), seconds(600), seconds(30));
        let (established, half_closed) = (seconds(500), seconds(60));
        let set = Conntrack { established, half_closed, time_wait, udp, udp_stream };
        let set = timeouts_from(100, &set);
        let times = |seconds: u32| (seconds * 100) >> 3;
        assert_eq!((set.tcp_established, set.tcp_half_closed), (times(500), times(3600)));
        assert_eq!((set.udp, set.udp_stream, set.tcp_closing), (times(40), times(600), times(30)));
    }

    #[test]
    fn the_kernel_s_default_of_five_days_is_kept_and_more_is_cut() {
        for ticks in [100, 250, 300, 1000] {
            let timeout = |seconds| {
                let established = Some(Duration::from_secs(seconds));
                let set = Conntrack { established, ..Conntrack::default() };
                timeouts_from(ticks, &set).tcp_established
            };
            let five_days = timeout(5 * 86_400);
            assert!(five_days < LONGEST, "{ticks}");
            assert_eq!(timeout(u64::MAX), LONGEST, "{ticks}");
        }
    }
}
