//! The service prefixes: every ClusterIP, load balancer's address and external IP is in one of
//! them. The programs look up any other destination only as a node port.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lb_common::abi::{
    address::Prefix,
    settings::{FamilySettings, MAX_PREFIXES, Settings},
};

use crate::model::IpFamily;

/// The service prefixes in the settings, of both families.
pub fn covered(settings: &Settings) -> Vec<IpNet> {
    fn prefixes<A: Copy>(family: &FamilySettings<A>) -> impl Iterator<Item = Prefix<A>> {
        family.service_prefixes.into_iter().take(family.service_prefix_count as usize)
    }
    let ipv4 = prefixes(&settings.ipv4).filter_map(|Prefix { address, mask }| {
        Ipv4Net::with_netmask(address.into(), mask.into()).ok().map(IpNet::V4)
    });
    let ipv6 = prefixes(&settings.ipv6).filter_map(|Prefix { address, mask }| {
        Ipv6Net::with_netmask(address.into(), mask.into()).ok().map(IpNet::V6)
    });
    ipv4.chain(ipv6).collect()
}

/// The service prefixes of one family; ServiceCIDRs come first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePrefixes {
    /// All prefixes, at most [`MAX_PREFIXES`].
    pub prefixes: Vec<IpNet>,
    /// How many of them are ServiceCIDRs.
    pub service_cidrs: usize,
}

/// Chooses the prefixes of a family: the ServiceCIDRs exactly, and as few further addresses as
/// possible that include `addresses` and the prefixes that were `covered` before.
pub fn choose(
    service_cidrs: &[IpNet],
    addresses: &[IpAddr],
    covered: &[IpNet],
    family: IpFamily,
) -> ServicePrefixes {
    let of_family = |net: &IpNet| IpFamily::of(net.addr()) == family;
    let own = service_cidrs.iter().copied().filter(of_family).collect();
    let mut prefixes: Vec<IpNet> = IpNet::aggregate(&own);
    prefixes.sort_unstable();
    let is_within = |net: &IpNet| prefixes.iter().any(|prefix| prefix.contains(net));
    let wanted = addresses.iter().map(|ip| IpNet::from(*ip)).chain(covered.iter().copied());
    let mut outside: Vec<IpNet> = wanted.filter(|net| of_family(net) && !is_within(net)).collect();
    // If there are more ServiceCIDRs than fit, the last ones are only covered, not exact.
    let room = if outside.is_empty() { MAX_PREFIXES } else { MAX_PREFIXES - 1 };
    if prefixes.len() > room {
        outside.extend(prefixes.drain(MAX_PREFIXES - 1..));
    }
    let service_cidrs = prefixes.len();
    let outside = IpNet::aggregate(&outside);
    prefixes.extend(IpNet::aggregate(&cover(outside, MAX_PREFIXES - service_cidrs)));
    ServicePrefixes { prefixes, service_cidrs }
}

/// At most `count` prefixes that cover `nets`: the sorted list is split where neighbours have
/// the fewest leading bits in common.
fn cover(mut nets: Vec<IpNet>, count: usize) -> Vec<IpNet> {
    nets.sort_unstable();
    nets.dedup();
    let mut gaps: Vec<(u8, usize)> =
        nets.windows(2).enumerate().map(|(at, pair)| (common(pair[0], pair[1]), at + 1)).collect();
    gaps.sort_unstable();
    let mut cuts: Vec<usize> =
        gaps.iter().take(count.saturating_sub(1)).map(|(_, at)| *at).collect();
    cuts.extend([0, nets.len()]);
    cuts.sort_unstable();
    let group = |pair: &[usize]| {
        let group = &nets[pair[0]..pair[1]];
        let (first, last) = (group.first()?, group.last()?);
        IpNet::new(first.addr(), common(*first, *last)).ok().map(|net| net.trunc())
    };
    cuts.windows(2).filter_map(group).collect()
}

/// The number of leading bits that two prefixes of one family have in common.
fn common(a: IpNet, b: IpNet) -> u8 {
    let bits = |net: IpNet| match net {
        IpNet::V4(net) => u128::from(Ipv4Addr::to_bits(Ipv4Net::network(&net))) << 96,
        IpNet::V6(net) => Ipv6Addr::to_bits(Ipv6Net::network(&net)),
    };
    let equal = (bits(a) ^ bits(b)).leading_zeros() as u8;
    equal.min(a.prefix_len()).min(b.prefix_len())
}

#[cfg(test)]
mod tests;
