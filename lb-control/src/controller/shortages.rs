//! Services that do not fit into the maps, and when each is tried again.
//!
//! When entries become free, the Services are looked at in turn, some in each reconciliation, and
//! only those are planned whose map has the room that they lacked: freeing one entry does not cost a
//! plan of every Service that waits.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ops::Bound,
    sync::Arc,
};

use crate::{
    plan::{Map, Shortage},
    work,
};

/// How many are looked at in one reconciliation.
const LOOKS: usize = 1_024;
/// How many of them are planned.
pub(super) const RETRIES: usize = 16;

/// The Services that do not fit.
#[derive(Debug, Default)]
pub(super) struct Shortages {
    of_services: BTreeMap<Arc<str>, Shortage>,
    of_maps: BTreeMap<Map, usize>,
    round: Option<Round>,
}

/// A look at all of them.
#[derive(Debug, Default)]
struct Round {
    /// The last one that was looked at.
    last: Option<Arc<str>>,
    /// More entries became free meanwhile: another round follows.
    is_again: bool,
}

/// What became of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// It fits, as before, or does not, as before.
    None,
    /// It does not fit, since now or for another reason than before.
    New,
    /// It fits again.
    Gone,
}

impl Shortages {
    /// Notes whether a Service fits.
    pub(super) fn set(&mut self, name: &Arc<str>, shortage: Option<Shortage>) -> Change {
        let old = match shortage {
            None => match self.of_services.remove(name) {
                None => return Change::None,
                old => old,
            },
            Some(new) => {
                *self.of_maps.entry(new.map).or_default() += 1;
                self.of_services.insert(Arc::clone(name), new)
            }
        };
        if let Some(old) = &old
            && let Entry::Occupied(mut count) = self.of_maps.entry(old.map)
        {
            *count.get_mut() -= 1;
        }
        match (old, self.of_services.get(name)) {
            (_, None) => Change::Gone,
            (Some(old), Some(new)) if old.has_same_message(new) => Change::None,
            (_, Some(_)) => Change::New,
        }
    }

    /// All of them, in the order of their names.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Shortage> {
        self.of_services.values()
    }

    /// How many there are for each map.
    pub(super) fn of_maps(&self) -> impl Iterator<Item = (Map, usize)> {
        Map::ALL.into_iter().map(|map| (map, self.of_maps.get(&map).copied().unwrap_or(0)))
    }

    /// Entries became free: each of them is looked at once more.
    pub(super) fn note_more_room(&mut self) {
        if !self.of_services.is_empty() {
            match &mut self.round {
                Some(round) => round.is_again = true,
                None => self.round = Some(Round::default()),
            }
        }
    }

    /// Whether some are still to be looked at.
    pub(super) fn is_waiting(&self) -> bool {
        self.round.is_some()
    }

    /// The next ones to plan.
    pub(super) fn take_some(&mut self, may_fit: impl Fn(&Shortage) -> bool) -> Vec<Arc<str>> {
        let Some(round) = &mut self.round else { return Vec::new() };
        let start = match round.last.take() {
            Some(last) => Bound::Excluded(last),
            None => Bound::Unbounded,
        };
        let mut found = Vec::new();
        let mut rest = self.of_services.range((start, Bound::Unbounded));
        for (name, shortage) in rest.by_ref().take(LOOKS) {
            work::count(1);
            round.last = Some(Arc::clone(name));
            if may_fit(shortage) {
                found.push(Arc::clone(name));
            }
            if found.len() == RETRIES {
                break;
            }
        }
        if rest.next().is_none() {
            self.round = round.is_again.then(Round::default);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shortage(name: &str, needed: usize) -> (Arc<str>, Shortage) {
        let service: Arc<str> = name.into();
        let map = Map::Backends4;
        (Arc::clone(&service), Shortage { service, map, limit: 9, needed, share: None })
    }

    fn names(found: &[Arc<str>]) -> Vec<&str> {
        found.iter().map(|name| &**name).collect()
    }

    #[test]
    fn a_change_is_reported_once() {
        let mut shortages = Shortages::default();
        let (name, short) = shortage("n/a", 3);
        let is_worse = Shortage { needed: 4, ..short.clone() };
        let is_other = Shortage { map: Map::Slots, ..short.clone() };
        for (new, change, backends, slots) in [
            (None, Change::None, 0, 0),
            (Some(short), Change::New, 1, 0),
            (Some(is_worse), Change::None, 1, 0),
            (Some(is_other), Change::New, 0, 1),
            (None, Change::Gone, 0, 0),
        ] {
            assert_eq!(shortages.set(&name, new), change);
            let count = |map| shortages.of_maps().find(|(of, _)| *of == map).map_or(0, |it| it.1);
            assert_eq!((count(Map::Backends4), count(Map::Slots)), (backends, slots));
        }
    }

    #[test]
    fn those_that_may_fit_are_tried_some_at_a_time() {
        let mut shortages = Shortages::default();
        for number in 0..40 {
            let (name, short) = shortage(&format!("n/{number:02}"), number);
            shortages.set(&name, Some(short));
        }
        assert_eq!(shortages.take_some(|_| true), [], "no entry became free");
        shortages.note_more_room();
        let first = shortages.take_some(|short| short.needed % 2 == 0);
        assert_eq!((first.len(), names(&first)[15]), (RETRIES, "n/30"));
        // More becomes free in the middle of a round.
        shortages.note_more_room();
        assert_eq!(
            names(&shortages.take_some(|short| short.needed % 2 == 0)),
            ["n/32", "n/34", "n/36", "n/38"]
        );
        assert!(shortages.is_waiting());
        assert_eq!(names(&shortages.take_some(|short| short.needed == 0)), ["n/00"]);
        assert!(!shortages.is_waiting());
    }
}
