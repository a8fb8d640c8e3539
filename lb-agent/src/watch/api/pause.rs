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
    /// The first failure since it was reset.
    first: Option<Instant>,
}

impl Pause {
    pub(super) const FIRST: Duration = Duration::from_millis(100);
    /// For a server that answers with errors, and may be overloaded.
    pub(super) const LONGEST: Duration = Duration::from_secs(15);
    /// For a server that cannot be reached: attempts do not load it. After an outage of more than
    /// [`Self::RESTART`] pauses grow to [`Self::LONGEST`], so that the agents of a cluster do not all come
    /// back within this time.
    pub(super) const UNREACHABLE: Duration = Duration::from_secs(3);
    /// How long a server takes to restart at most.
    const RESTART: Duration = Duration::from_secs(60);
    /// For a resource version that is too old: the next list fixes it.
    pub(super) const OUTDATED: Duration = Duration::from_secs(1);

    /// The next pause, which is at most about `longest`.
    pub(super) fn next(&mut self, longest: Duration) -> Duration {
        let now = Instant::now();
        if now.duration_since(self.last) > 2 * Self::LONGEST {
            self.reset();
        }
        self.last = now;
        let first = *self.first.get_or_insert(now);
        let is_long = longest == Self::UNREACHABLE && now.duration_since(first) > Self::RESTART;
        let pause = self.next.min(if is_long { Self::LONGEST } else { longest });
        self.next = (pause * 2).min(Self::LONGEST);
        jittered(pause)
    }

    /// The next pause is short again.
    pub(super) fn reset(&mut self) {
        (self.next, self.first) = (Self::FIRST, None);
    }
}

impl Default for Pause {
    fn default() -> Self {
        Self { next: Self::FIRST, last: Instant::now(), first: None }
    }
}

/// Between 0.5 and 1.5 times the duration.
pub(super) fn jittered(duration: Duration) -> Duration {
    // Every `RandomState` has a random seed.
    let random = RandomState::new().build_hasher().finish() >> 32;
    duration / 2 + duration.mul_f64(random as f64 / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_and_are_long_after_a_long_outage() {
        let mut pause = Pause::default();
        let mut last = Duration::ZERO;
        // For the first minute attempts are frequent, so that a restart is noticed soon.
        let start = Instant::now();
        while start.elapsed() < Pause::RESTART {
            last = pause.next(Pause::UNREACHABLE);
            assert!(last <= Pause::UNREACHABLE.mul_f64(1.5), "{last:?}");
            tokio::time::advance(last).await;
        }
        assert!(last >= Pause::UNREACHABLE / 2, "{last:?}");
        // Then 5,000 agents are spread over a quarter of a minute.
        let pauses: Vec<_> = (0..8).map(|_| pause.next(Pause::UNREACHABLE)).collect();
        assert!(pauses.iter().skip(3).all(|pause| *pause >= Pause::LONGEST / 2), "{pauses:?}");
        pause.reset();
        let last = pause.next(Pause::UNREACHABLE);
        assert!(last <= Pause::FIRST.mul_f64(1.5), "{last:?}");
    }
}
