//! The ops of one service port, after the entries that they need were
//! [reserved](super::reserve).

use std::net::IpAddr;

use lb_common::abi::service::{Service, SlotRange};

use super::{
    BackendEntry, Draft, Op, Write, free_name,
    held::{BackendNodes, HeldBackend, HeldPort, HeldSet, HeldSets, Ids, SETS, index_of_family},
    name_entry,
    reserve::{Diff, Matched},
};
use crate::{desired::DesiredPort, ids::slots::Block};

/// Flags by which clients get the local set instead of the cluster set.
const LOCAL_POLICIES: u32 = Service::INTERNAL_LOCAL | Service::EXTERNAL_LOCAL;

/// Plans one port; the entries that it needs were reserved.
pub(super) fn plan(
    ids: &mut Ids,
    draft: &mut Draft,
    service: &str,
    held: Option<HeldPort>,
    desired: &DesiredPort,
    matched: Matched,
) -> HeldPort {
    let is_new = held.is_none();
    let mut port = held.unwrap_or_else(|| HeldPort {
        index: allocate_service(ids),
        key: desired.key.clone(),
        entry: Service::default(),
        sets: HeldSets::default(),
        backends: Vec::new(),
        nodes: BackendNodes::default(),
        frontends: Vec::new(),
        ranges: Vec::new(),
    });
    let moves = plan_backends(ids, draft, &mut port, desired, &matched.diff);
    let old = port.entry;
    let mut words = [old.cluster, old.local];
    let mut live_stores = [Vec::new(), Vec::new()];
    for (number, moves) in moves.iter().enumerate() {
        if desired.flags & Service::ADDRESS == 0 {
            let block = matched.blocks[number];
            let set = port.sets.get_mut(number);
            let mut store = |write, is_live| {
                let op = Op { owner: port.index, write };
                if is_live { live_stores[number].push(op) } else { draft.stage.push(op) }
            };
            words[number] = plan_set(ids, set, moves, block, &mut store);
        } else if number == 0 {
            words[0] = SlotRange::new(0, desired.has_backend.into());
        }
    }
    let [cluster, local] = words;
    let (affinity_seconds, flags) = (desired.affinity_seconds, desired.flags);
    port.entry = Service { cluster, local, affinity_seconds, flags };
    if is_new {
        let name = name_entry(service, &port.key);
        for write in [Write::StoreService(port.entry), Write::StoreName(Box::new(name))] {
            draft.stage.push(Op { owner: port.index, write });
        }
    } else {
        publish(draft, &port, old, live_stores);
    }
    port
}

fn allocate_service(ids: &mut Ids) -> u32 {
    ids.services.allocate().map(|(index, _)| index).expect("indices were counted before")
}

/// Which backends get a slot in a set, and which lose theirs.
#[derive(Debug, Default)]
struct Moves {
    joining: Vec<u32>,
    leaving: Vec<u32>,
}

impl Moves {
    fn note(&mut self, bit: u8, id: u32, before: u8, after: u8) {
        match (before & bit != 0, after & bit != 0) {
            (false, true) => self.joining.push(id),
            (true, false) => self.leaving.push(id),
            _ => {}
        }
    }
}

/// Plans the backends that are added, changed and removed.
fn plan_backends(
    ids: &mut Ids,
    draft: &mut Draft,
    port: &mut HeldPort,
    desired: &DesiredPort,
    diff: &Diff,
) -> [Moves; 2] {
    let mut moves = [Moves::default(), Moves::default()];
    let mut note = |id, before, after| {
        for (moves, bit) in moves.iter_mut().zip(SETS) {
            moves.note(bit, id, before, after);
        }
    };
    let index = port.index;
    for (at, to) in &diff.changed {
        let (backend, wanted) = (&mut port.backends[*at], &desired.backends[*to]);
        note(backend.id, backend.slotted, wanted.sets);
        let widened = backend.sets | wanted.sets;
        let held = (backend.sets, backend.flags, port.nodes.of(backend.id));
        if held != (widened, wanted.flags, wanted.node) {
            (backend.sets, backend.flags) = (widened, wanted.flags);
            port.nodes.set(backend.id, wanted.node);
            draft.stage.push(store(backend, wanted.node, index));
        }
        (backend.sets, backend.slotted) = (wanted.sets, wanted.sets);
        if widened != wanted.sets {
            draft.retire.push(store(backend, wanted.node, index));
        }
    }
    let family = index_of_family(desired.key.family);
    for at in &diff.removed {
        let gone = port.backends[*at];
        note(gone.id, gone.slotted, 0);
        draft.retire.push(retire_backend(ids, family, gone, port.nodes.of(gone.id), index));
        port.nodes.set(gone.id, None);
    }
    if !diff.removed.is_empty() {
        let mut removed = diff.removed.iter().peekable();
        let mut at = 0;
        port.backends.retain(|_| {
            let is_removed = removed.next_if_eq(&&at).is_some();
            at += 1;
            !is_removed
        });
    }
    if diff.added.is_empty() {
        return moves;
    }
    port.backends.reserve_exact(diff.added.len());
    for at in &diff.added {
        let wanted = &desired.backends[*at];
        let (id, generation) =
            ids.backends[family].allocate().expect("backend ids were counted before");
        note(id, 0, wanted.sets);
        let backend = HeldBackend {
            ip: wanted.ip,
            id,
            port: wanted.port,
            generation,
            sets: wanted.sets,
            slotted: wanted.sets,
            flags: wanted.flags,
        };
        port.nodes.set(id, wanted.node);
        draft.stage.push(store(&backend, wanted.node, index));
        port.backends.push(backend);
    }
    port.backends.sort_by_key(HeldBackend::address);
    moves
}

fn store(backend: &HeldBackend, node: Option<IpAddr>, service: u32) -> Op {
    let HeldBackend { ip, id, port, generation, sets, flags, .. } = *backend;
    let entry = BackendEntry { ip, port, generation, sets, flags, service, node };
    Op { owner: service, write: Write::StoreBackend { id, entry } }
}

/// Takes a backend out of use. Its flows recognise that by the generation.
fn retire_backend(
    ids: &mut Ids,
    family: usize,
    mut gone: HeldBackend,
    node: Option<IpAddr>,
    service: u32,
) -> Op {
    gone.generation = gone.generation.wrapping_add(1);
    (gone.sets, gone.flags) = (0, 0);
    ids.backends[family].free_after_grace(gone.id, gone.generation);
    store(&gone, node, service)
}

/// Brings the slots of a set up to date and returns the word to publish.
fn plan_set(
    ids: &mut Ids,
    set: &mut HeldSet,
    moves: &Moves,
    block: Option<Block>,
    store: &mut impl FnMut(Write, bool),
) -> SlotRange {
    let writes = rearrange(set, moves);
    let length = set.slots.len() as u32;
    if let Some(block) = block {
        store(Write::StoreSlots { start: block.start, backends: set.slots.clone() }, false);
        if let Some(old) = set.block.replace(block) {
            ids.blocks.free_after_grace(old);
        }
        return SlotRange::new(block.start, length);
    }
    let Some(block) = set.block else { return SlotRange::EMPTY };
    if length == 0 {
        set.block = None;
        set.slots = Vec::new();
        ids.blocks.free_after_grace(block);
        return SlotRange::EMPTY;
    }
    for run in writes.chunk_by(|a, b| a + 1 == *b) {
        let backends = set.slots[run[0]..=run[run.len() - 1]].to_vec();
        store(Write::StoreSlots { start: block.start + run[0] as u32, backends }, true);
    }
    SlotRange::new(block.start, length)
}

/// Puts joining backends where others leave, or behind the last slot, fills remaining holes
/// from the end, and returns the positions that were written, in order.
fn rearrange(set: &mut HeldSet, moves: &Moves) -> Vec<usize> {
    let mut holes = std::mem::take(&mut set.faulty);
    if !moves.leaving.is_empty() {
        let mut leaving = moves.leaving.clone();
        leaving.sort_unstable();
        let leaves = |(_, id): &(usize, &u32)| leaving.binary_search(id).is_ok();
        holes.extend(set.slots.iter().enumerate().filter(leaves).map(|(at, _)| at));
        holes.sort_unstable();
        holes.dedup();
    }
    let mut writes = Vec::new();
    let filled = holes.len().min(moves.joining.len());
    for (hole, id) in holes.drain(..filled).zip(&moves.joining) {
        set.slots[hole] = *id;
        writes.push(hole);
    }
    if set.slots.is_empty() {
        // To the slot: most sets seldom grow.
        set.slots.reserve_exact(moves.joining.len());
    }
    for id in &moves.joining[filled..] {
        writes.push(set.slots.len());
        set.slots.push(*id);
    }
    for hole in holes.into_iter().rev() {
        set.slots.swap_remove(hole);
        writes.push(hole);
    }
    writes.retain(|at| *at < set.slots.len());
    writes.sort_unstable();
    writes
}

/// Publishes what changed of an existing service port; `live_stores` are the stores into slots
/// of each set that packets reach already.
///
/// A new policy is stored after the set that it uses is there, and before the set that it
/// no longer uses changes: no packet gets the old policy on new sets.
fn publish(draft: &mut Draft, port: &HeldPort, old: Service, live_stores: [Vec<Op>; 2]) {
    let new = port.entry;
    let op = |write| Op { owner: port.index, write };
    let [mut cluster, mut local] = live_stores;
    if new.cluster != old.cluster {
        cluster.push(op(Write::PublishCluster(new.cluster)));
    }
    if new.local != old.local {
        local.push(op(Write::PublishLocal(new.local)));
    }
    let mut entry = Vec::new();
    let to_local = new.flags & !old.flags & LOCAL_POLICIES != 0;
    let to_cluster = old.flags & !new.flags & LOCAL_POLICIES != 0;
    if (old.affinity_seconds, old.flags) != (new.affinity_seconds, new.flags) {
        let (affinity_seconds, flags) = (new.affinity_seconds, new.flags);
        let cluster = if to_local && !to_cluster { old.cluster } else { new.cluster };
        let local = if to_local { new.local } else { old.local };
        entry.push(op(Write::StoreService(Service { cluster, local, affinity_seconds, flags })));
    }
    let phases = match (to_local, to_cluster) {
        (true, false) => [local, entry, cluster],
        (false, _) => [cluster, entry, local],
        // Both sets are in use before and after: publish both before the entry.
        (true, true) => [cluster, local, entry],
    };
    draft.publish.extend(phases.into_iter().flatten());
}

/// Takes a service port out of use, after its frontends were removed or lead elsewhere.
pub(super) fn retire(ids: &mut Ids, draft: &mut Draft, gone: HeldPort) {
    let family = index_of_family(gone.key.family);
    for backend in gone.backends {
        let node = gone.nodes.of(backend.id);
        draft.retire.push(retire_backend(ids, family, backend, node, gone.index));
    }
    let write = Write::StoreName(Box::new(free_name()));
    draft.retire.push(Op { owner: gone.index, write });
    gone.sets.blocks().for_each(|block| ids.blocks.free_after_grace(block));
    ids.services.free_after_grace(gone.index, 0);
}
