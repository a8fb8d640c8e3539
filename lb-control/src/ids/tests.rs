use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{slots::*, *};

#[test]
fn a_number_waits_for_the_grace_period_and_changes_its_generation() {
    let mut numbers = Numbers::new(0, 1);
    assert_eq!(numbers.allocate(), Some((0, 0)));
    numbers.free_after_grace(0, 1);
    assert!(numbers.reclaim(1_000, 100).is_empty());
    assert!(numbers.reclaim(1_099, 100).is_empty());
    assert_eq!(numbers.allocate(), None);
    assert_eq!(numbers.next_due(1_099, 100), Some(1_100));
    assert_eq!(numbers.reclaim(1_100, 100), [(0, 2)]);
    assert_eq!(numbers.allocate(), Some((0, 2)));
}

#[test]
fn generations_wrap() {
    let mut numbers = Numbers::new(0, 1);
    numbers.allocate();
    numbers.free_after_grace(0, u16::MAX);
    numbers.reclaim(0, 0);
    assert_eq!(numbers.allocate(), Some((0, 0)));
}

#[test]
fn adoption_keeps_generations_and_what_was_never_used() {
    let known = [Known::Used, Known::Free(0), Known::Used, Known::JustFreed(7), Known::Free(0)];
    let mut numbers = Numbers::adopt(1, 5, known.into_iter());
    assert_eq!(numbers.available(), 2);
    assert_eq!(numbers.allocate(), Some((1, 0)));
    assert_eq!(numbers.allocate(), Some((4, 0)));
    assert_eq!(numbers.allocate(), None);
    numbers.reclaim(0, 10);
    assert_eq!(numbers.reclaim(10, 10), [(3, 8)]);
}

#[test]
fn blocks_have_room_to_grow() {
    for (length, capacity) in [(1, 2), (2, 4), (3, 4), (10, 16), (12, 16), (13, 32), (1_000, 2_048)]
    {
        assert_eq!(1 << roomy_order_of(length), capacity, "{length}");
    }
}

#[test]
fn free_blocks_grow_together_again() {
    let mut blocks = Blocks::new(100);
    let all: Vec<_> = (0..100).filter_map(|_| blocks.allocate(0)).collect();
    assert_eq!((all.len(), blocks.allocate(0)), (100, None));
    all.into_iter().for_each(|block| blocks.free_at_once(block));
    let order = |order| Blocks::allocate(&mut Blocks::new(100), order);
    assert_eq!(blocks.allocate(6), order(6));
    assert_eq!(blocks.allocate(5), Some(Block { start: 64, order: 5 }));
    assert_eq!(blocks.allocate(2), Some(Block { start: 96, order: 2 }));
    assert_eq!(blocks.allocate(0), None);
}

#[test]
fn what_lies_below_the_last_used_slot_waits() {
    let mut blocks = Blocks::new(64);
    assert!(blocks.reserve(Block { start: 8, order: 2 }));
    assert!(!blocks.reserve(Block { start: 8, order: 0 }));
    assert!(!blocks.reserve(Block { start: 9, order: 1 }));
    blocks.quarantine_below(13);
    assert_eq!(blocks.allocate(0), Some(Block { start: 13, order: 0 }));
    blocks.reclaim(0, 5);
    assert!(blocks.reclaim(5, 5));
    assert_eq!(blocks.allocate(3), Some(Block { start: 0, order: 3 }));
}

proptest! {
    #[test]
    fn blocks_never_overlap_and_never_come_back_early(
        steps in prop::collection::vec((0u8..5, any::<prop::sample::Index>(), any::<bool>()), 1..200),
    ) {
        const GRACE: u64 = 10;
        let mut blocks = Blocks::new(93);
        let mut used: Vec<Block> = Vec::new();
        let mut freed_at: BTreeMap<u32, u64> = BTreeMap::new();
        for (now, (order, index, is_release)) in (0..).zip(steps) {
            blocks.reclaim(now, GRACE);
            if is_release && !used.is_empty() {
                let block = used.swap_remove(index.index(used.len()));
                for slot in block.start..block.start + block.capacity() {
                    freed_at.insert(slot, now);
                }
                blocks.free_after_grace(block);
            } else if let Some(block) = blocks.allocate(order) {
                prop_assert!(block.start + block.capacity() <= 93);
                for slot in block.start..block.start + block.capacity() {
                    let is_used = |used: &Block| (used.start..used.start + used.capacity()).contains(&slot);
                    prop_assert!(!used.iter().any(is_used));
                    prop_assert!(freed_at.get(&slot).is_none_or(|freed| now - freed >= GRACE));
                }
                used.push(block);
            }
        }
    }
}
