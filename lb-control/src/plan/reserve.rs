//! Reserves the entries that one Service needs, before any op is planned, so that the Service
//! is programmed as a whole or not at all.

use std::collections::HashSet;

use super::{
    family_index,
    frontends::Frontends,
    held::{BackendNodes, HeldBackend, HeldPort, Ids, SETS, index_of_family},
    ranges::Ranges,
    usage::{Map, Share, Usage},
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
pub(super) fn diff(held: &[HeldBackend], nodes: &BackendNodes, desired: &[DesiredBackend]) -> Diff {
    let mut diff = Diff::default();
    let (mut at, mut to) = (0, 0);
    loop {
        match (held.get(at), desired.get(to)) {
            (None, None) => return diff,
            (Some(old), Some(new)) if old.address() == new.address() => {
                let is_same = (old.sets, old.slotted) == (new.sets, new.sets)
                    && (old.flags, nodes.of(old.id)) == (new.flags, new.node);
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

/// A map without room for what a Service wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoRoom {
    pub(super) map: Map,
    /// How many entries more are wanted; of SLOTS, how many in one block.
    pub(super) needed: usize,
    /// The map has room, but the Service's namespace has its share already.
    pub(super) is_share: bool,
}

/// Reserves everything that a Service needs beyond what it has, or nothing.
pub(crate) fn reserve(
    ids: &mut Ids,
    (frontends, ranges): (&Frontends, &Ranges),
    share: &Share,
    held: &[HeldPort],
    desired: &[DesiredPort],
) -> Result<Vec<Matched>, NoRoom> {
    let mut matched = Vec::with_capacity(desired.len());
    for port in desired {
        let held_at = held.binary_search_by(|held| held.key.cmp(&port.key)).ok();
        let diff = match held_at {
            Some(position) => diff(&held[position].backends, &held[position].nodes, &port.backends),
            None => Diff { added: (0..port.backends.len()).collect(), ..Diff::default() },
        };
        matched.push(Matched { held: held_at, diff, blocks: [None; 2] });
    }
    check_counts(ids, desired, &matched)?;
    for family in [0, 1] {
        check_frontends(frontends, held, desired, family)?;
        check_ranges(ranges, held, desired, &matched, family)?;
    }
    check_share(share, ids, (frontends, ranges), held, desired)?;
    reserve_all_blocks(ids, share, held, desired, &mut matched)?;
    Ok(matched)
}

/// How many entries of a map a Service can get now.
pub(crate) fn free(ids: &Ids, (frontends, ranges): (&Frontends, &Ranges), map: Map) -> usize {
    let rest = |limits: [u32; 2], counts: [usize; 2], family: usize| {
        (limits[family] as usize).saturating_sub(counts[family])
    };
    match map {
        Map::Services => ids.services.available(),
        Map::Backends4 => ids.backends[0].available(),
        Map::Backends6 => ids.backends[1].available(),
        Map::Frontends4 => rest(frontends.limits, frontends.counts, 0),
        Map::Frontends6 => rest(frontends.limits, frontends.counts, 1),
        Map::Ranges4 => rest(ranges.limits, ranges.counts, 0),
        Map::Ranges6 => rest(ranges.limits, ranges.counts, 1),
        Map::Slots => ids.blocks.available(),
    }
}

/// Fails if the namespace would have more than its share of a map; SLOTS come later.
fn check_share(
    share: &Share,
    ids: &Ids,
    maps: (&Frontends, &Ranges),
    held: &[HeldPort],
    desired: &[DesiredPort],
) -> Result<(), NoRoom> {
    let (held, wanted) = (Usage::held(held), Usage::wanted(desired));
    for map in Map::ALL.into_iter().filter(|map| *map != Map::Slots) {
        let growth = wanted.of(map).saturating_sub(held.of(map));
        if !share.allows(map, growth, free(ids, maps, map)) {
            return Err(NoRoom { map, needed: growth, is_share: true });
        }
    }
    Ok(())
}

/// How large the blocks are that a Service gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    /// With room to grow, and for sets that could stay where they are.
    Ample,
    /// As small as can be, and only for sets that must move.
    Least,
}

/// Reserves the blocks of all ports, or none. What could be left out is no reason to refuse a
/// Service whose namespace has its share.
fn reserve_all_blocks(
    ids: &mut Ids,
    share: &Share,
    held: &[HeldPort],
    desired: &[DesiredPort],
    matched: &mut [Matched],
) -> Result<(), NoRoom> {
    match try_all_blocks(ids, share, held, desired, matched, Room::Ample) {
        Err(NoRoom { is_share: true, .. }) => {
            try_all_blocks(ids, share, held, desired, matched, Room::Least)
        }
        result => result,
    }
}

fn try_all_blocks(
    ids: &mut Ids,
    share: &Share,
    held: &[HeldPort],
    desired: &[DesiredPort],
    matched: &mut [Matched],
    room: Room,
) -> Result<(), NoRoom> {
    let free = ids.blocks.available();
    let mut growth = 0;
    let mut result = Ok(());
    for (port, matched) in desired.iter().zip(&mut *matched) {
        let of_port = matched.held.map(|at| &held[at]);
        match reserve_blocks(ids, of_port, port, &matched.diff, room) {
            Ok(blocks) => matched.blocks = blocks,
            Err(needed) => {
                result = Err(NoRoom { map: Map::Slots, needed, is_share: false });
                break;
            }
        }
        for (number, block) in matched.blocks.iter().enumerate() {
            let Some(block) = block else { continue };
            let replaced = of_port.and_then(|port| port.sets.block(number));
            growth += block.capacity() as usize;
            growth = growth.saturating_sub(replaced.map_or(0, |block| block.capacity() as usize));
        }
    }
    if result.is_ok() && !share.allows(Map::Slots, growth, free) {
        result = Err(NoRoom { map: Map::Slots, needed: growth, is_share: true });
    }
    if result.is_err() {
        let taken = matched.iter_mut().flat_map(|matched| &mut matched.blocks);
        for block in taken.filter_map(Option::take) {
            ids.blocks.free_at_once(block);
        }
    }
    result
}

/// Fails if the new service ports or backends do not fit.
fn check_counts(ids: &Ids, desired: &[DesiredPort], matched: &[Matched]) -> Result<(), NoRoom> {
    let new_ports = matched.iter().filter(|matched| matched.held.is_none()).count();
    check_room(Map::Services, new_ports, ids.services.available())?;
    for (family, map) in [Map::Backends4, Map::Backends6].into_iter().enumerate() {
        let pairs = desired.iter().zip(matched);
        let of_family = pairs.filter(|(port, _)| index_of_family(port.key.family) == family);
        let added: usize = of_family.map(|(_, matched)| matched.diff.added.len()).sum();
        check_room(map, added, ids.backends[family].available())?;
    }
    Ok(())
}

fn check_room(map: Map, needed: usize, free: usize) -> Result<(), NoRoom> {
    if needed > free { Err(NoRoom { map, needed, is_share: false }) } else { Ok(()) }
}

/// Fails if the new frontends of a family do not fit. Frontends that the Service gives up
/// count as room, because they are deleted first.
fn check_frontends(
    frontends: &Frontends,
    held: &[HeldPort],
    desired: &[DesiredPort],
    family: usize,
) -> Result<(), NoRoom> {
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
    let free = (frontends.limits[family] as usize).saturating_sub(frontends.counts[family]);
    let map = [Map::Frontends4, Map::Frontends6][family];
    if new > free { check_room(map, new, free + lost()) } else { Ok(()) }
}

/// Fails if the new source ranges of a family do not fit. Ranges that the Service gives up
/// still take room, because they are deleted last.
fn check_ranges(
    ranges: &Ranges,
    held: &[HeldPort],
    desired: &[DesiredPort],
    matched: &[Matched],
    family: usize,
) -> Result<(), NoRoom> {
    let new = |(port, matched): (&DesiredPort, &Matched)| {
        let held = matched.held.map_or(&[][..], |at| &held[at].ranges);
        if held == &*port.ranges {
            return 0;
        }
        let of_family = port.ranges.iter().filter(|range| family_index(range.addr()) == family);
        of_family.filter(|range| held.binary_search(range).is_err()).count()
    };
    let new: usize = desired.iter().zip(matched).map(new).sum();
    let free = (ranges.limits[family] as usize).saturating_sub(ranges.counts[family]);
    check_room([Map::Ranges4, Map::Ranges6][family], new, free)
}

/// Allocates the blocks that the sets of a port must or should move to; if a set must move and
/// there is no block for it, fails with the number of slots that the block needs.
fn reserve_blocks(
    ids: &mut Ids,
    held: Option<&HeldPort>,
    desired: &DesiredPort,
    diff: &Diff,
    room: Room,
) -> Result<[Option<Block>; 2], usize> {
    let mut blocks = [None; 2];
    for (number, bit) in SETS.into_iter().enumerate() {
        let is_member = |backend: &&DesiredBackend| backend.sets & bit != 0;
        let length = desired.backends.iter().filter(is_member).count() as u32;
        let block = held.and_then(|held| held.sets.block(number));
        let must = block.map_or(0, Block::capacity) < length;
        let is_ample = room == Room::Ample;
        let moves = must || (is_ample && should_move(held, desired, diff, number, length));
        if length == 0 || !moves {
            continue;
        }
        let roomy = if is_ample { ids.blocks.allocate(roomy_order_of(length)) } else { None };
        blocks[number] =
            roomy.or_else(|| if must { ids.blocks.allocate(order_of(length)) } else { None });
        if must && blocks[number].is_none() {
            blocks.into_iter().flatten().for_each(|block| ids.blocks.free_at_once(block));
            return Err(1 << order_of(length));
        }
    }
    Ok(blocks)
}

/// Whether a set should get a new block although it fits into its old one, because most of
/// it changes, or because it has shrunk to less than a quarter.
fn should_move(
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
    let is_sparse = held
        .sets
        .block(number)
        .is_some_and(|block| block.order > roomy_order_of(length) + 1 && block.order > 3);
    writes > FEW_SLOTS.max(length as usize / 2) || (writes > 0 && is_sparse)
}
