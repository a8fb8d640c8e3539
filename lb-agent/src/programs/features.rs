//! The features of this kernel, found by probes.

use std::{io, os::fd::AsFd};

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use aya_obj::generated::bpf_attach_type::BPF_TCX_INGRESS;
use lb_sys::SHORTEST_PACKET;

/// The features of this kernel.
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

/// Probes the kernel. Needs CAP_BPF; without it every feature counts as missing.
pub fn features() -> Features {
    let has = |helper| is_helper_supported(ProgramType::CgroupSockAddr, helper).unwrap_or_default();
    Features {
        has_set_retval: has(BpfHelper::BPF_FUNC_set_retval),
        has_netns_cookie: has(BpfHelper::BPF_FUNC_get_netns_cookie),
        has_csum_ipv6: has_csum_ipv6().unwrap_or_default(),
        has_tcx: has_tcx(),
    }
}

/// Whether the kernel has tcx.
pub fn has_tcx() -> bool {
    /// The index of the loopback device in every network namespace.
    const LOOPBACK: u32 = 1;
    lb_sys::tcx_query(LOOPBACK, BPF_TCX_INGRESS as u32).is_ok()
}

/// `bpf_l4_csum_replace` fails with EINVAL if a flag is unknown. If it knows the flags, an offset
/// beyond the packet fails with EFAULT.
fn has_csum_ipv6() -> io::Result<bool> {
    const BPF_F_IPV6: i32 = 1 << 7;
    const NO_OFFSET: i32 = 0x1_0000;
    let set = |register: u64, value: i32| 0xb7 | register << 8 | u64::from(value as u32) << 32;
    let call = |helper: BpfHelper| 0x85 | (helper as u64) << 32;
    let program = lb_sys::load_classifier(&[
        set(2, NO_OFFSET),
        set(3, 0),
        set(4, 0),
        set(5, BPF_F_IPV6),
        call(BpfHelper::BPF_FUNC_l4_csum_replace),
        0x95,
    ])?;
    let returned = lb_sys::test_run(program.as_fd(), &SHORTEST_PACKET)?;
    Ok(returned as i32 == -libc::EFAULT)
}
