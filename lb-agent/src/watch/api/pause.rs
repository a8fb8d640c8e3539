//! Pauses between attempts: doubled up to a limit, with jitter, so that the agents of a cluster
//! do not all ask at once after an outage.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    time::Duration,
};

use tokio::time::Instant;

/// The next pause. It is reset after a success or a long time without errors.
#[derive(Debug)]
pub(super) struct Pause {
    next: Duration,
    last: Instant,
}

impl Pause {
    pub(super) const FIRST: Duration = Duration::from_millis(100);
    /// For a server that answers with errors, and may be overloaded.
    pub(super) const LONGEST: Duration = Duration::from_secs(15);
    /// For a server that cannot be reached: attempts do not load it.
    pub(super) const UNREACHABLE: Duration = Duration::from_secs(3);
    /// For a resource version that is too old: the next list fixes it.
    pub(super) const OUTDATED: Duration = Duration::from_secs(1);

    /// The next pause, which is at most about `longest`.
    pub(super) fn next(&mut self, longest: Duration) -> Duration {
        if self.last.elapsed() > 2 * Self::LONGEST {
            self.reset();
        }
        self.last = Instant::now();
        let pause = self.next.min(longest);
        self.next = (pause * 2).min(Self::LONGEST);
        jittered(pause)
    }

    /// The next pause is short again.
    pub(super) fn reset(&mut self) {
        self.next = Self::FIRST;
    }
}

impl Default for Pause {
    fn default() -> Self {
        Self { next: Self::FIRST, last: Instant::now() }
    }
}

/// Between 0.5 and 1.5 times the duration.
pub(super) fn jittered(duration: Duration) -> Duration {
    // Every `RandomState` has a random seed.
    let random = RandomState::new().build_hasher().finish() >> 32;
    duration / 2 + duration.mul_f64(random as f64 / f64::from(u32::MAX))
}
