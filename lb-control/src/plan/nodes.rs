//! The addresses of all nodes: encapsulated packets are accepted from these only, and clients
//! may have asked any of these for a node port.

use std::{collections::BTreeSet, net::IpAddr};

use super::{Draft, NO_OWNER, Op, Write, family_index};

/// What NODES4 and NODES6 hold.
#[derive(Debug)]
pub(super) struct HeldNodes {
    held: BTreeSet<IpAddr>,
    limits: [u32; 2],
}

impl HeldNodes {
    pub(super) fn new(held: impl IntoIterator<Item = IpAddr>, limits: [u32; 2]) -> Self {
        Self { held: held.into_iter().collect(), limits }
    }

    /// Plans that the maps hold the wanted addresses, the first ones if not all fit, and
    /// returns how many do not fit. Unwanted addresses are deleted last, unless their room is
    /// needed.
    pub(super) fn plan(&mut self, draft: &mut Draft, wanted: &BTreeSet<IpAddr>) -> usize {
        let op = |write| Op { owner: NO_OWNER, write };
        let gone: Vec<IpAddr> = self.held.difference(wanted).copied().collect();
        let is_short =
            self.counts_with(wanted).iter().zip(self.limits).any(|(n, limit)| *n > limit);
        let phase = if is_short { &mut draft.withdraw } else { &mut draft.retire };
        phase.extend(gone.iter().map(|ip| op(Write::DeleteNode(*ip))));
        self.held.retain(|ip| wanted.contains(ip));
        let mut counts = self.counts_with(&BTreeSet::new());
        let mut left_out = 0;
        for ip in wanted {
            let family = family_index(*ip);
            if self.held.contains(ip) {
                continue;
            }
            if counts[family] >= self.limits[family] {
                left_out += 1;
                continue;
            }
            counts[family] += 1;
            self.held.insert(*ip);
            draft.withdraw.push(op(Write::InsertNode(*ip)));
        }
        left_out
    }

    /// How many addresses of each family there would be with `more`.
    fn counts_with(&self, more: &BTreeSet<IpAddr>) -> [u32; 2] {
        let mut counts = [0; 2];
        self.held.union(more).for_each(|ip| counts[family_index(*ip)] += 1);
        counts
    }
}
