//! Translates a fragment that has no ports.

use aya_ebpf::programs::TcContext;
use lb_common::{
    abi::flow::Tuple,
    packet::{IP_OFFSET, Packet},
};

use crate::{
    icmp_error::{difference, store},
    rewrite::Rewrite,
};

/// Gives a fragment the addresses of `new`. The transport checksum is in the first fragment and was
/// updated there.
#[inline(never)]
pub fn apply<F: Rewrite>(
    context: &TcContext,
    packet: &Packet<F>,
    new: &Tuple<F::Address>,
) -> Option<()> {
    let both = 2 * size_of::<F::Address>() as u32;
    let mut flags = 0;
    if let Some(at) = F::HEADER_CHECKSUM {
        let sum = difference(&raw const packet.tuple().source, &raw const new.source, both, 0);
        context.l3_csum_replace(IP_OFFSET + at, 0, sum, 0).ok()?;
    } else {
        // An IPv6 header has no checksum that offsets the change of addresses in the device's sum
        // over the whole frame (CHECKSUM_COMPLETE).
        flags = RECOMPUTE_CHECKSUM;
    }
    store(context, F::ADDRESSES, &raw const new.source, both, flags)
}

/// BPF_F_RECOMPUTE_CSUM.
const RECOMPUTE_CHECKSUM: u64 = 1;
