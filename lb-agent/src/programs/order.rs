//! The order of lb's programs and those of others on one hook.
//!
//! Beside kube-proxy, the programs of others see requests before they are translated, where packets
//! come in, and answers after they are, where packets go out. So lb's program is the last one at
//! ingress and the first one at egress.

use super::{
    clsact::{Filter, PRIORITY},
    hook::Direction,
};

/// The ids of the tcx programs that should be on the other side of lb's, `own`. `all` are the
/// programs of the hook in the order in which they run.
pub(super) fn misplaced_programs(direction: Direction, all: &[u32], own: u32) -> Vec<u32> {
    let Some(position) = all.iter().position(|id| *id == own) else { return Vec::new() };
    match direction {
        Direction::Ingress => all[position + 1..].to_vec(),
        Direction::Egress => all[..position].to_vec(),
    }
}

/// The filters that should be on the other side of lb's program. tcx programs run before filters.
pub(super) fn misplaced_filters(
    direction: Direction,
    all: Vec<Filter>,
    is_by_tcx: bool,
) -> Vec<Filter> {
    let is_misplaced = |filter: &Filter| match direction {
        Direction::Ingress => is_by_tcx || filter.priority > PRIORITY,
        Direction::Egress => !is_by_tcx && filter.priority < PRIORITY,
    };
    all.into_iter().filter(is_misplaced).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_of_others_belong_in_front_at_ingress_and_behind_at_egress() {
        let rows: [(Direction, &[u32], &[u32]); 7] = [
            (Direction::Ingress, &[7], &[]),
            (Direction::Ingress, &[1, 2, 7], &[]),
            (Direction::Ingress, &[1, 7, 2, 3], &[2, 3]),
            (Direction::Egress, &[7, 1, 2], &[]),
            (Direction::Egress, &[1, 2, 7, 3], &[1, 2]),
            (Direction::Egress, &[1, 2], &[]),
            (Direction::Ingress, &[], &[]),
        ];
        for (direction, all, expected) in rows {
            assert_eq!(misplaced_programs(direction, all, 7), expected, "{direction:?} {all:?}");
        }
    }

    #[test]
    fn filters_of_others_are_misplaced_by_their_priority_or_behind_tcx() {
        let filter = |priority| Filter { priority, name: "bpf".to_owned() };
        let all = || vec![filter(1), filter(49_152)];
        for (direction, is_by_tcx, expected) in [
            (Direction::Ingress, false, &[49_152][..]),
            (Direction::Egress, false, &[1]),
            (Direction::Ingress, true, &[1, 49_152]),
            (Direction::Egress, true, &[]),
        ] {
            let found = misplaced_filters(direction, all(), is_by_tcx);
            let found: Vec<u16> = found.iter().map(|filter| filter.priority).collect();
            assert_eq!(found, expected, "{direction:?}, by tcx: {is_by_tcx}");
        }
    }
}
