//! How tests wait for events.

use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// How long an event is awaited: long enough on a machine that is busy with other work. A test
/// passes as soon as the event is there; only a failure takes this long.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often a condition is polled.
const POLL: Duration = Duration::from_millis(5);

/// `time` on a usual machine: `LB_PATIENCE` times as long on one that is emulated.
pub(crate) fn patiently(time: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    let factor = FACTOR.get_or_init(|| {
        std::env::var("LB_PATIENCE").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
    });
    time * *factor
}

/// Repeats `attempt` until it succeeds.
///
/// # Errors
/// The error of the last attempt, once [`PATIENCE`] is over.
pub fn eventually<T>(attempt: impl FnMut() -> Result<T>) -> Result<T> {
    within(patiently(PATIENCE), attempt)
}

/// Repeats `attempt` until it succeeds or `limit` is over: for a claim about time.
///
/// # Errors
/// The error of the last attempt.
pub fn within<T>(limit: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match attempt() {
            Err(_) if start.elapsed() < limit => thread::sleep(POLL),
            result => return result.with_context(|| format!("waited {:?}", start.elapsed())),
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::ensure;

    use super::*;

    #[test]
    fn attempts_are_repeated_until_one_succeeds() {
        let mut attempts = 0;
        let third = eventually(|| {
            attempts += 1;
            ensure!(attempts == 3, "only {attempts}");
            Ok(attempts)
        });
        assert_eq!(third.expect("the third attempt"), 3);
    }

    #[test]
    fn the_last_error_is_reported_when_the_time_is_over() {
        let mut attempts = 0;
        let never = within(Duration::from_millis(20), || -> Result<()> {
            attempts += 1;
            anyhow::bail!("attempt {attempts}")
        });
        let error = format!("{:#}", never.expect_err("no attempt succeeds"));
        assert!(attempts > 1 && error.ends_with(&format!(": attempt {attempts}")), "{error}");
    }
}
