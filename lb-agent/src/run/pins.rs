//! Keeps everything that the agent has pinned where commands and the next agent look for it.
//!
//! A bpffs has no inotify, so the agent looks every two seconds. Invariant: packets do not depend
//! on pins while the agent runs, so nothing here makes it unhealthy.

use std::{convert::Infallible, time::Duration};

use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::agent::Agent;
use crate::maps::{
    bpffs::{self, BpffsError},
    lock::{Lock, LockError},
    pins::PinError,
};

/// How often the pins are checked.
const INTERVAL: Duration = Duration::from_secs(2);

/// The lock of the directory, and the answers to commands, which find the agent by it.
#[derive(Debug)]
pub(super) struct Directory {
    lock: Lock,
    answers: CancellationToken,
}

impl Directory {
    /// Starts to answer commands that ask the agent of the directory that is locked.
    pub(super) fn answer(agent: &Agent, lock: Lock) -> Self {
        Self { lock, answers: agent.answer_commands() }
    }
}

/// Pins could not be made again.
#[derive(Debug, thiserror::Error)]
enum RestoreError {
    #[error(transparent)]
    Bpffs(#[from] BpffsError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// Pins again what another process removes.
///
/// # Errors
/// If another agent has locked the directory, which was removed and made again: it has programs on
/// the same hooks, and one of the two has to end.
pub(super) async fn keep(agent: &Agent, mut directory: Directory) -> anyhow::Result<Infallible> {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut logged = None;
    loop {
        ticks.tick().await;
        let failed = match restore(agent, &mut directory) {
            Ok(()) => None,
            Err(RestoreError::Lock(error @ LockError::Held { .. })) => {
                return Err(anyhow::Error::from(error).context(
                    "the directory of this agent's pins was removed, and another agent serves now",
                ));
            }
            Err(error) => Some(error),
        };
        agent.metrics.set_missing_pins(agent.pins.kept().lost().len());
        let failed = failed.map(|error| format!("{:#}", anyhow::Error::from(error)));
        if let Some(error) = &failed
            && logged.as_ref() != Some(error)
        {
            tracing::warn!(
                error,
                "pins were removed, and cannot be made again: traffic is served while this agent \
                 runs, but when it ends, its programs are detached and translated connections \
                 break; trying again every {INTERVAL:?}"
            );
        }
        logged = failed;
    }
}

fn restore(agent: &Agent, directory: &mut Directory) -> Result<(), RestoreError> {
    let bpf_dir = agent.pins.base();
    let is_same = directory.lock.is_of(bpf_dir);
    if !is_same {
        bpffs::ensure(bpf_dir)?;
        directory.lock = Lock::take(bpf_dir)?;
        directory.answers.cancel();
        directory.answers = agent.answer_commands();
    }
    let restored = agent.pins.restore()?;
    if restored.pins() == 0 {
        return Ok(());
    }
    agent.metrics.pins_restored(restored.pins());
    tracing::warn!(
        bpf_dir = %bpf_dir.display(),
        maps = restored.maps,
        programs = restored.programs,
        links = restored.links,
        directory = if is_same { "the same" } else { "removed or unmounted" },
        "pins were removed by another process, and are made again: no traffic was affected, \
         because the agent holds maps and programs open; without pins, its end would have cut \
         translated connections"
    );
    Ok(())
}
