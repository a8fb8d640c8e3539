//! When everything is read again, in case a message was lost.

use std::time::{Duration, Instant};

/// How often everything is read and attached again.
pub(super) const INTERVAL: Duration = Duration::from_secs(60);
/// The least interval between two readings; doubled with each one that follows an overrun, because
/// a reading of many interfaces and routes makes the next overrun more likely.
const LEAST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);

/// The time of the next reading.
#[derive(Debug)]
pub(super) struct Resync {
    last: Instant,
    at: Instant,
    least: Duration,
    has_overrun: bool,
}

impl Resync {
    /// Everything was read at `now`.
    pub(super) fn new(now: Instant) -> Self {
        Self { last: now, at: now + INTERVAL, least: LEAST, has_overrun: false }
    }

    /// Messages were lost.
    pub(super) fn overrun(&mut self) {
        self.has_overrun = true;
        self.at = self.at.min(self.last + self.least);
    }

    /// When everything is to be read.
    pub(super) fn at(&self) -> Instant {
        self.at
    }

    /// Everything was read at `now`.
    pub(super) fn done(&mut self, now: Instant) {
        let has_overrun = std::mem::take(&mut self.has_overrun);
        self.least = if has_overrun { (self.least * 2).min(LONGEST) } else { LEAST };
        (self.last, self.at) = (now, now + INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_after_overruns_keep_growing_distances() {
        let start = Instant::now();
        let mut resync = Resync::new(start);
        assert_eq!(resync.at(), start + INTERVAL);
        let mut distances = Vec::new();
        for _ in 0..7 {
            let last = resync.last;
            resync.overrun();
            resync.overrun();
            distances.push((resync.at() - last).as_secs());
            resync.done(resync.at());
        }
        assert_eq!(distances, [1, 2, 4, 8, 16, 30, 30]);
        resync.done(resync.at());
        let last = resync.last;
        resync.overrun();
        assert_eq!(resync.at() - last, LEAST, "after a quiet minute");
    }
}
