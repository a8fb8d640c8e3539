//! `lb-agent cleanup --drain`: existing flows continue, new ones are left to the stack.
//!
//! The only state is a flag in the settings, so it lasts until an agent writes its own settings.

use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lb_common::abi::settings::Settings;
use lb_control::dataplane::{Dataplane as _, DataplaneError};
use tokio::time::{sleep, sleep_until};
use tracing::warn;

use super::cleanup;
use crate::{
    conntrack::ports,
    maps::{
        kernel::KernelDataplane,
        lock::{Lock, LockError},
        pins::{PinError, Pins},
        read::read_settings,
        sweep::Sweeper,
    },
    output::line,
};

/// A drain in progress. It holds the lock, so that no agent can start.
pub struct Drain {
    sweeper: Sweeper,
    settings: Settings,
    _lock: Lock,
}

impl Drain {
    /// Stops the programs from opening flows, and reserves the source ports of existing flows in
    /// conntrack for `longest`. `None` if nothing is pinned below `bpf_dir`.
    ///
    /// # Errors
    /// [`DrainError`]: an agent runs, or maps cannot be read or written.
    pub fn begin(bpf_dir: &Path, longest: Duration) -> Result<Option<Self>, DrainError> {
        let pins = Pins::new(bpf_dir);
        if !pins.map("SETTINGS").exists() {
            let others = cleanup::versions(bpf_dir).unwrap_or_default();
            return match others.into_iter().next() {
                Some(path) => Err(DrainError::Version { path }),
                None => Ok(None),
            };
        }
        let lock = Lock::take(bpf_dir)?;
        let mut settings = read_settings(&pins)?;
        settings.flags |= Settings::DRAINING;
        let sweeper = Sweeper::open(&pins)?;
        reserve_ports(&pins, longest);
        KernelDataplane::open(&pins)?.store_settings(&settings)?;
        // Flows may have been opened since the first pass.
        reserve_ports(&pins, longest);
        Ok(Some(Self { sweeper, settings, _lock: lock }))
    }

    /// How many flows are live.
    ///
    /// # Errors
    /// Those of the bpf(2) calls.
    pub fn live(&self) -> Result<u64, DrainError> {
        self.sweeper.live(&self.settings).map_err(|source| DrainError::Flows { source })
    }

    /// Leaves the next datagram of every flow to the stack, and waits for the answers that are under
    /// way. The programs are detached one after the other: without this, the last requests would
    /// still be translated when nothing translates their answers.
    async fn cut_datagrams(&self) -> Result<(), DrainError> {
        self.sweeper.evict_datagram_requests().map_err(|source| DrainError::Cut { source })?;
        sleep(ANSWER_TIME).await;
        Ok(())
    }
}

/// Reserves the source ports of lb's flows in conntrack. If that fails, a new connection may
/// rarely get a port that a flow uses.
fn reserve_ports(pins: &Pins, longest: Duration) {
    // A drain may end a little late.
    const MARGIN: Duration = Duration::from_secs(10);
    if let Err(error) = ports::reserve_in_conntrack(pins, longest.saturating_add(MARGIN)) {
        warn!(
            %error,
            "cannot reserve the source ports of draining flows in conntrack: a new connection may \
             get the port of a flow, and break both"
        );
    }
}

/// A drain could not be started, or its flows not be counted.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// An agent or another drain runs.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A map could not be opened.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// A map could not be read or written.
    #[error(transparent)]
    Map(#[from] DataplaneError),
    /// The flows could not be counted.
    #[error("cannot count the flows")]
    Flows {
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// Flows could not be cut.
    #[error("cannot remove the flows of datagrams")]
    Cut {
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// The pins are those of another version.
    #[error(
        "{} belongs to another version of lb-agent: drain with that version, or clean up without \
         --drain",
        path.display()
    )]
    Version {
        /// Its directory.
        path: PathBuf,
    },
}

/// How often flows are counted, unless counting takes long.
const COUNT_INTERVAL: Duration = Duration::from_millis(250);
/// How long an answer to a datagram may be under way.
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// How often the count is printed.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// There was nothing to drain.
    Nothing,
    /// Every flow has ended (0), or the time is up and this many flows are left.
    Finished(u64),
    /// It was stopped; this many flows are left.
    Stopped(u64),
}

/// Leaves new flows to the stack, and returns when no flow is left, after `longest`, or when
/// `stopped` is ready. Programs and maps are still in place then, and open no flow. Flows of
/// datagrams have gone to the stack without a loss, unless it was stopped.
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
    let mut reported = None::<Instant>;
    tokio::pin!(stopped);
    loop {
        let started = Instant::now();
        let live = drain.live()?;
        let took = started.elapsed();
        let left = deadline.saturating_duration_since(Instant::now());
        if live == 0 || left.is_zero() {
            if live > 0 {
                drain.cut_datagrams().await?;
            }
            return Ok(Outcome::Finished(live));
        }
        if reported.is_none_or(|reported| reported.elapsed() >= REPORT_INTERVAL) {
            reported = Some(Instant::now());
            // The drain goes on whether or not somebody is told.
            let _ =
                line(format_args!("draining: {live} flows left, {} s remaining", left.as_secs()));
        }
        tokio::select! {
            () = &mut stopped => return Ok(Outcome::Stopped(live)),
            () = sleep(COUNT_INTERVAL.max(took * 4)) => {}
            () = sleep_until(deadline.into()) => {}
        }
    }
}
