//! Reserves the entries that one Service needs, before any op is planned, so that the Service
//! is programmed as a whole or not at all.

use std::collections::HashSet;

use super::{
    family_index,
    frontends::Frontends,
    held::{HeldBackend, HeldPort, Ids, SETS, index_of_family},
    ranges::Ranges,
};
use crate::{
    desired::{DesiredBackend, DesiredPort, FrontendAddress},
    ids::slots::{Block, order_of, roomy_order_of},
};

/// Up to so many slots are always written in place: a new block would not be worth it.
pub(super) const FEW_SLOTS: usize = 8;

/// A desired port, the held one that it continues, and what was reserved for it.
#[derive(Debug)]
pub(super) struct Matched {
    pub(super) held: Option<usize>,
    pub(super) diff: Diff,
    pub(super) blocks: [Option<Block>; 2],
}

/// How the backends of a port change, as positions.
#[derive(Debug, Default)]
pub(super) struct Diff {
    pub(super) added: Vec<usize>,
    pub(super) removed: Vec<usize>,
    pub(super) changed: Vec<(usize, usize)>,
}

/// Compares two lists that are in the order of addresses.
pub(super) fn diff(held: &[HeldBackend], desired: &[DesiredBackend]) -> Diff {
    let mut diff = Diff::default();
    let (mut at, mut to) = (0, 0);
    loop {
        match (held.get(at), desired.get(to)) {
            (None, None) => return diff,
            (Some(old), Some(new)) if old.address() == new.address() => {
                let is_same = (old.sets, old.slotted) == (new.sets, new.sets)
                    && (old.flags, old.node) == (new.flags, new.node);
                if !is_same {
                    diff.changed.push((at, to));
                }
                (at, to) = (at + 1, to + 1);
            }
            (Some(old), new) if new.is_none_or(|new| old.address() < new.address()) => {
                diff.removed.push(at);
                at += 1;
            }
            _ => {
                diff.added.push(to);
                to += 1;
            }
        }
    }
}

/// A map that is full.
#[derive(Debug)]
pub(crate) struct FullMap {
    pub(super) map: &'static str,
    pub(super) limit: u32,
    pub(super) flag: &'static str,
}

/// Reserves everything that a Service needs beyond what it has, or nothing.
pub(crate) fn reserve(
    ids: &mut Ids,
    (frontends, ranges): (&Frontends, &Ranges),
    held: &[HeldPort],
    desired: &[DesiredPort],
) -> Result<Vec<Matched>, FullMap> {
    let mut matched = Vec::with_capacity(desired.len());
    for port in desired {
        let held_at = held.binary_search_by(|held| held.key.cmp(&port.key)).ok();
        let diff = match held_at {
            Some(position) => diff(&held[position].backends, &port.backends),
            None => Diff { added: (0..port.backends.len()).collect(), ..Diff::default() },
        };
        matched.push(Matched { held: held_at, diff, blocks: [None; 2] });
    }
    check_counts(ids, desired, &matched)?;
    for family in [0, 1] {
        check_frontends(frontends, held, desired, family)?;
        check_ranges(ranges, held, desired, &matched, family)?;
    }
    for position in 0..matched.len() {
        let port = matched[position].held.map(|at| &held[at]);
        match reserve_blocks(ids, port, &desired[position], &matched[position].diff) {
            Some(blocks) => matched[position].blocks = blocks,
            None => {
                let taken = matched.iter().flat_map(|matched| matched.blocks).flatten();
                taken.for_each(|block| ids.blocks.free_at_once(block));
                return Err(FullMap {
                    map: "SLOTS",
                    limit: ids.capacity.slots,
                    flag: "--max-slots",
                });
            }
        }
    }
    Ok(matched)
}

/// Fails if the new service ports or backends do not fit.
pub(crate) fn check_counts(
    ids: &Ids,
    desired: &[DesiredPort],
    matched: &[Matched],
) -> Result<(), FullMap> {
    let new_ports = matched.iter().filter(|matched| matched.held.is_none()).count();
    if new_ports > ids.services.available() {
        let limit = ids.capacity.services;
        return Err(FullMap { map: "SERVICES", limit, flag: "--max-services" });
    }
    let capacity = &ids.capacity;
    let backend_maps = [("BACKENDS4", capacity.backends4), ("BACKENDS6", capacity.backends6)];
    for (family, (map, limit)) in backend_maps.into_iter().enumerate() {
        let pairs = desired.iter().zip(matched);
        let of_family = pairs.filter(|(port, _)| index_of_family(port.key.family) == family);
        let added: usize = of_family.map(|(_, matched)| matched.diff.added.len()).sum();
        if added > ids.backends[family].available() {
            return Err(FullMap { map, limit, flag: "--max-backends" });
        }
    }
    Ok(())
}

/// Fails if the new frontends of a family do not fit. Frontends that the Service gives up
/// count as room, because they are deleted first.
pub(crate) fn check_frontends(
    frontends: &Frontends,
    held: &[HeldPort],
    desired: &[DesiredPort],
    family: usize,
) -> Result<(), FullMap> {
    let wanted = || desired.iter().flat_map(|port| &port.frontends).map(|frontend| frontend.at);
    let is_new =
        |at: &FrontendAddress| family_index(at.ip) == family && frontends.owner(at).is_none();
    let new = wanted().filter(is_new).count();
    let lost = || {
        let wanted: HashSet<FrontendAddress> = wanted().collect();
        let owned = held.iter().flat_map(|port| port.frontends.iter().map(|at| (at, port.index)));
        let of_family = owned.filter(|(at, _)| family_index(at.ip) == family);
        let lost = of_family.filter(|(at, index)| frontends.owner(at) == Some(*index));
        lost.filter(|(at, _)| !wanted.contains(at)).count()
    };
    let limit = frontends.limits[family];
    let total = frontends.counts[family] + new;
    if new > 0 && total > limit as usize && total > limit as usize + lost() {
        let map = ["FRONTENDS4", "FRONTENDS6"][family];
        return Err(FullMap { map, limit, flag: "--max-services" });
    }
    Ok(())
}

/// Fails if the new source ranges of a family do not fit. Ranges that the Service gives up
/// still take room, because they are deleted last.
pub(crate) fn check_ranges(
    ranges: &Ranges,
    held: &[HeldPort],
    desired: &[DesiredPort],
    matched: &[Matched],
    family: usize,
) -> Result<(), FullMap> {
    let new = |(port, matched): (&DesiredPort, &Matched)| {
        let held = matched.held.map_or(&[][..], |at| &held[at].ranges);
        if held == &*port.ranges {
            return 0;
        }
        let of_family = port.ranges.iter().filter(|range| family_index(range.addr()) == family);
        of_family.filter(|range| held.binary_search(range).is_err()).count()
    };
    let new: usize = desired.iter().zip(matched).map(new).sum();
    let limit = ranges.limits[family];
    if new > 0 && ranges.counts[family] + new > limit as usize {
        let map = ["RANGES4", "RANGES6"][family];
        return Err(FullMap { map, limit, flag: "--max-services" });
    }
    Ok(())
}

/// Allocates the blocks that the sets of a port must or should move to; none if a set must
/// move and there is no block for it.
pub(crate) fn reserve_blocks(
    ids: &mut Ids,
    held: Option<&HeldPort>,
    desired: &DesiredPort,
    diff: &Diff,
) -> Option<[Option<Block>; 2]> {
    let mut blocks = [None; 2];
    for (number, bit) in SETS.into_iter().enumerate() {
        let is_member = |backend: &&DesiredBackend| backend.sets & bit != 0;
        let length = desired.backends.iter().filter(is_member).count() as u32;
        let block = held.and_then(|held| held.sets[number].block);
        let must = block.map_or(0, Block::capacity) < length;
        if length == 0 || (!must && !should_move(held, desired, diff, number, length)) {
            continue;
        }
        let roomy = ids.blocks.allocate(roomy_order_of(length));
        blocks[number] =
            roomy.or_else(|| if must { ids.blocks.allocate(order_of(length)) } else { None });
        if must && blocks[number].is_none() {
            blocks.into_iter().flatten().for_each(|block| ids.blocks.free_at_once(block));
            return None;
        }
    }
    Some(blocks)
}

/// Whether a set should get a new block although it fits into its old one, because most of
/// it changes, or because it has shrunk to less than a quarter.
pub(crate) fn should_move(
    held: Option<&HeldPort>,
    desired: &DesiredPort,
    diff: &Diff,
    number: usize,
    length: u32,
) -> bool {
    let (Some(held), bit) = (held, SETS[number]) else { return false };
    let joins = diff.added.iter().filter(|at| desired.backends[**at].sets & bit != 0).count();
    let leaves = diff.removed.iter().filter(|at| held.backends[**at].slotted & bit != 0).count();
    let crosses = |(at, to): &&(usize, usize)| {
        (held.backends[*at].slotted ^ desired.backends[*to].sets) & bit != 0
    };
    let crossing = diff.changed.iter().filter(crosses).count();
    let writes = joins.max(leaves) + crossing;
    let is_sparse = held.sets[number]
        .block
        .is_some_and(|block| block.order > roomy_order_of(length) + 1 && block.order > 3);
    writes > FEW_SLOTS.max(length as usize / 2) || (writes > 0 && is_sparse)
}
