//! How often an object may be reported: as with client-go's filter for Events, 25 times at once, then
//! once in five minutes.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::Key;

/// How many reports an object has at first.
pub(super) const BURST: u32 = 25;
/// How long it takes until it has one more.
pub(super) const REFILL: Duration = Duration::from_secs(300);
/// How many objects are remembered.
const OBJECTS: usize = 4_096;

/// Counts the reports of each object.
#[derive(Debug, Default)]
pub(super) struct SpamFilter {
    buckets: HashMap<Key, Bucket>,
}

/// The reports that an object may still have.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: u32,
    /// The last time at which `left` grew.
    filled: Instant,
}

impl Bucket {
    fn full(now: Instant) -> Self {
        Self { left: BURST, filled: now }
    }

    fn fill(&mut self, now: Instant) {
        let rounds = now.duration_since(self.filled).as_secs() / REFILL.as_secs();
        let rounds = u32::try_from(rounds).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(rounds).min(BURST);
        self.filled = if self.left == BURST { now } else { self.filled + REFILL * rounds };
    }
}

impl SpamFilter {
    /// Whether an object may be reported at `now`; that counts as a report.
    pub(super) fn admit(&mut self, key: &Key, now: Instant) -> bool {
        if self.buckets.len() >= OBJECTS && !self.buckets.contains_key(key) {
            self.forget_some(now);
        }
        let bucket = self.buckets.entry(key.clone()).or_insert_with(|| Bucket::full(now));
        bucket.fill(now);
        let is_admitted = bucket.left > 0;
        bucket.left = bucket.left.saturating_sub(1);
        is_admitted
    }

    /// Forgets the objects that may be reported as often as unknown ones. If there are none, so
    /// many objects are reported that all of them are forgotten.
    fn forget_some(&mut self, now: Instant) {
        self.buckets.retain(|_, bucket| {
            bucket.fill(now);
            bucket.left < BURST
        });
        if self.buckets.len() >= OBJECTS {
            self.buckets.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use lb_control::model::event::ObjectKind;

    use super::*;

    fn key(number: usize) -> Key {
        (ObjectKind::Service, format!("shop/s{number}").as_str().into())
    }

    #[test]
    fn an_object_has_25_reports_at_once_and_then_one_in_five_minutes() {
        let (mut filter, start) = (SpamFilter::default(), Instant::now());
        let mut reports = |number: usize, seconds: u64, tries: usize| {
            let now = start + Duration::from_secs(seconds);
            (0..tries).filter(|_| filter.admit(&key(number), now)).count()
        };
        assert_eq!(reports(1, 0, 100), 25);
        assert_eq!(reports(2, 0, 3), 3, "another object has its own");
        assert_eq!(reports(1, 299, 10), 0);
        assert_eq!(reports(1, 300, 10), 1);
        assert_eq!(reports(1, 599, 10), 0);
        assert_eq!(reports(1, 1_200, 10), 3);
        assert_eq!(reports(1, 100_000, 100), 25);
    }

    #[test]
    fn the_memory_is_bounded() {
        let (mut filter, now) = (SpamFilter::default(), Instant::now());
        for number in 0..3 * OBJECTS {
            assert!(filter.admit(&key(number), now));
            assert!(filter.buckets.len() <= OBJECTS);
        }
        let later = now + REFILL * BURST;
        assert!(filter.admit(&key(0), later));
        filter.forget_some(later);
        assert_eq!(filter.buckets.len(), 1);
    }
}
