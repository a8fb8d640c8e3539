//! `lb-agent cleanup --drain`: waits until the flows that are known have ended.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use tokio::time::{sleep, sleep_until};

use crate::dataplane::drain::{Drain, DrainError};

/// How often flows are counted, unless that takes long.
const LOOK: Duration = Duration::from_millis(250);
/// How often it is told how many there are.
const TELL: Duration = Duration::from_secs(5);

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// There was nothing to drain.
    Nothing,
    /// So many flows are left, of which none is the rule.
    Over(u64),
    /// It was told to stop; so many flows go on.
    Stopped(u64),
}

/// Leaves new flows to the stack, and returns when no flow is left, `longest` is over or
/// `stopped` is ready. Then the datapath is still there, and still opens no flow.
///
/// # Errors
/// As [`Drain::begin`] and [`Drain::live`].
pub async fn drain(
    bpf_dir: &Path,
    longest: Duration,
    stopped: impl Future<Output = ()>,
) -> Result<Outcome, DrainError> {
    let Some(drain) = Drain::begin(bpf_dir, longest)? else { return Ok(Outcome::Nothing) };
    let deadline = Instant::now() + longest;
    let mut told = None::<Instant>;
    tokio::pin!(stopped);
    loop {
        let begun = Instant::now();
        let live = drain.live()?;
        let took = begun.elapsed();
        let left = deadline.saturating_duration_since(Instant::now());
        if live == 0 || left.is_zero() {
            return Ok(Outcome::Over(live));
        }
        if told.is_none_or(|told| told.elapsed() >= TELL) {
            told = Some(Instant::now());
            println!("draining: {live} flows go on, {} s left", left.as_secs());
        }
        tokio::select! {
            () = &mut stopped => return Ok(Outcome::Stopped(live)),
            () = sleep(LOOK.max(took * 4)) => {}
            () = sleep_until(deadline.into()) => {}
        }
    }
}
