//! What this kernel can do and how its clock runs.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    time::Duration,
};

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use lb_common::abi::settings::Timeouts;

use super::{attach::has_tcx, sys};

/// What this kernel can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// `bpf_set_retval` in connect-time hooks (about 6.1).
    pub has_set_retval: bool,
    /// `bpf_get_netns_cookie` in connect-time hooks (5.7).
    pub has_netns_cookie: bool,
    /// BPF_F_IPV6 of `bpf_l4_csum_replace` (6.16 and stable releases since).
    pub has_csum_ipv6: bool,
    /// tcx (6.6).
    pub has_tcx: bool,
}

/// Asks the kernel what it can do. Needs CAP_BPF; without it nothing is there.
pub fn features() -> Features {
    let has = |helper| is_helper_supported(ProgramType::CgroupSockAddr, helper).unwrap_or_default();
    Features {
        has_set_retval: has(BpfHelper::BPF_FUNC_set_retval),
        has_netns_cookie: has(BpfHelper::BPF_FUNC_get_netns_cookie),
        has_csum_ipv6: has_csum_ipv6().unwrap_or_default(),
        has_tcx: has_tcx(),
    }
}

/// `bpf_l4_csum_replace` says EINVAL to a flag that it does not know, and EFAULT to an
/// offset that no packet has only if it knows the flags.
fn has_csum_ipv6() -> io::Result<bool> {
    const BPF_F_IPV6: i32 = 1 << 7;
    const NO_OFFSET: i32 = 0x1_0000;
    let set = |register: u64, value: i32| 0xb7 | register << 8 | u64::from(value as u32) << 32;
    let call = |helper: BpfHelper| 0x85 | (helper as u64) << 32;
    let program = sys::load_classifier(&[
        set(2, NO_OFFSET),
        set(3, 0),
        set(4, 0),
        set(5, BPF_F_IPV6),
        call(BpfHelper::BPF_FUNC_l4_csum_replace),
        0x95,
    ])?;
    let returned = sys::test_run(program.as_fd(), &SHORTEST)?;
    Ok(returned as i32 == -libc::EFAULT)
}

/// The shortest packet that BPF_PROG_TEST_RUN takes of whatever kind: an Ethernet header
/// and something behind it.
const SHORTEST: [u8; 64] = [0; 64];

/// Jiffies per second (CONFIG_HZ): the resolution of the coarse clocks is one tick.
///
/// # Errors
/// Those of clock_getres(2), or InvalidData for a resolution that no tick has.
pub fn ticks_per_second() -> io::Result<u32> {
    let resolution = sys::coarse_clock_resolution()?;
    let nanoseconds = resolution.as_nanos();
    if nanoseconds == 0 || nanoseconds > 1_000_000_000 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a tick of {nanoseconds} ns"),
        ));
    }
    Ok(((1_000_000_000 + nanoseconds / 2) / nanoseconds) as u32)
}

/// The low 32 bits of jiffies now, by the program `clock`.
///
/// # Errors
/// Those of BPF_PROG_TEST_RUN.
pub fn ticks_now(clock: BorrowedFd<'_>) -> io::Result<u32> {
    sys::test_run(clock, &SHORTEST)
}

/// The first and the last port that the kernel gives to sockets of the caller's network
/// namespace (`net.ipv4.ip_local_port_range`, which holds for IPv6 too).
pub fn local_ports() -> (u16, u16) {
    const DEFAULT: (u16, u16) = (32_768, 60_999);
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ports = text.split_whitespace().map_while(|text| text.parse().ok());
    ports.next().zip(ports.next()).unwrap_or(DEFAULT)
}

/// How long flows live on this node, in ticks: TCP timeouts of a node that knows
/// connection tracking are the node's.
pub fn timeouts(ticks_per_second: u32) -> Timeouts {
    let setting = |name: &str| {
        let path = Path::new("/proc/sys/net/netfilter").join(name);
        let seconds = fs::read_to_string(path).ok()?.trim().parse().ok()?;
        Some(Duration::from_secs(seconds))
    };
    timeouts_from(
        ticks_per_second,
        setting("nf_conntrack_tcp_timeout_established"),
        setting("nf_conntrack_tcp_timeout_close_wait"),
    )
}

/// The kernel's own default for a half-closed connection is a minute, kube-proxy raises
/// it to an hour: a client that has sent its FIN may wait for the answer that long.
fn timeouts_from(
    ticks_per_second: u32,
    established: Option<Duration>,
    half_closed: Option<Duration>,
) -> Timeouts {
    const HOUR: Duration = Duration::from_secs(3600);
    let ticks = |timeout: Duration| {
        u32::try_from(timeout.as_secs().saturating_mul(ticks_per_second.into()))
            .unwrap_or(LONGEST)
            .min(LONGEST)
    };
    let seconds = |seconds| ticks(Duration::from_secs(seconds));
    Timeouts {
        tcp_syn: seconds(60),
        tcp_established: ticks(established.unwrap_or(24 * HOUR)),
        tcp_half_closed: ticks(half_closed.unwrap_or(HOUR).max(HOUR)),
        tcp_fin_one_way: seconds(120),
        tcp_closing: seconds(30),
        udp: seconds(30),
        udp_answered: seconds(180),
    }
}

/// Ticks are compared as 32-bit numbers that wrap around, and the sweep waits for twice
/// the timeout.
pub const LONGEST: u32 = 1 << 29;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tick_is_one_that_kernels_have() {
        assert!([100, 250, 300, 1000].contains(&ticks_per_second().unwrap()));
    }

    #[test]
    fn timeouts_are_the_node_s_where_it_has_some() {
        let none = timeouts_from(250, None, None);
        assert_eq!((none.tcp_established, none.tcp_half_closed), (86_400 * 250, 3_600 * 250));
        assert_eq!((none.tcp_syn, none.tcp_closing), (60 * 250, 30 * 250));
        assert_eq!((none.udp, none.udp_answered), (30 * 250, 180 * 250));
        let set = timeouts_from(100, Some(Duration::from_secs(500)), Some(Duration::from_secs(60)));
        assert_eq!((set.tcp_established, set.tcp_half_closed), (50_000, 360_000));
        let endless = timeouts_from(1000, Some(Duration::from_secs(u64::MAX)), None);
        assert_eq!(endless.tcp_established, LONGEST);
    }
}
