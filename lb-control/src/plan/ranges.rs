//! The source ranges of service ports, and how full their maps are.

use ipnet::IpNet;

use super::{Draft, Op, Write, family_index, held::HeldPort};

/// How full RANGES4 and RANGES6 are. A plan deletes ranges last: until it is done they take
/// room.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    pub(crate) counts: [usize; 2],
    pub(crate) limits: [u32; 2],
    /// How many the draft deletes.
    pub(crate) leaving: [usize; 2],
    /// Whether ranges were deleted since the planner last looked.
    pub(crate) has_more_room: bool,
}

impl Ranges {
    /// Plans that a port has the wanted ranges; both lists are in order.
    pub(crate) fn plan(&mut self, draft: &mut Draft, port: &mut HeldPort, wanted: &[IpNet]) {
        if port.ranges == wanted {
            return;
        }
        for range in wanted.iter().filter(|range| port.ranges.binary_search(range).is_err()) {
            self.counts[family_index(range.addr())] += 1;
            draft.stage.push(Op { owner: port.index, write: Write::InsertRange(*range) });
        }
        let held = std::mem::replace(&mut port.ranges, wanted.to_vec());
        let gone: Vec<_> =
            held.into_iter().filter(|range| wanted.binary_search(range).is_err()).collect();
        self.delete(&mut draft.retire, port.index, &gone);
    }

    /// Plans that ranges are deleted, in the given phase.
    pub(crate) fn delete(&mut self, phase: &mut Vec<Op>, owner: u32, ranges: &[IpNet]) {
        for range in ranges {
            self.leaving[family_index(range.addr())] += 1;
            phase.push(Op { owner, write: Write::DeleteRange(*range) });
        }
    }

    /// Ends a plan: the ranges that it deletes no longer take room.
    pub(crate) fn commit(&mut self) {
        for (count, leaving) in self.counts.iter_mut().zip(&mut self.leaving) {
            self.has_more_room |= *leaving > 0;
            *count -= std::mem::take(leaving);
        }
    }
}
