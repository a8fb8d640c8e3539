//! The last days of a datapath: known flows go on, new ones are left to the stack.
//!
//! The state is in the settings alone, so it lasts until an agent writes its own.

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
};

/// A drain that goes on. No agent can start meanwhile.
pub struct Drain {
    sweeper: Sweeper,
    settings: Settings,
    _lock: Lock,
}

impl Drain {
    /// Has the programs open no more flows, and the kernel give none of their ports to others for so long; `None` if nothing is pinned below `bpf_dir`.
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
        hold_ports(&pins, longest);
        KernelDataplane::open(&pins)?.store_settings(&settings)?;
        // Those that were opened meanwhile.
        hold_ports(&pins, longest);
        Ok(Some(Self { sweeper, settings, _lock: lock }))
    }

    /// How many flows go on.
    ///
    /// # Errors
    /// Those of the bpf(2) calls.
    pub fn live(&self) -> Result<u64, DrainError> {
        self.sweeper.live(&self.settings).map_err(|source| DrainError::Flows { source })
    }
}

/// Without it all but a few new connections find a port of their own.
fn hold_ports(pins: &Pins, longest: Duration) {
    // A drain may end a little late.
    const MORE: Duration = Duration::from_secs(10);
    if let Err(error) = ports::hold(pins, longest.saturating_add(MORE)) {
        warn!(%error, "the kernel may give ports of our flows to new ones");
    }
}

/// A drain could not be begun, or followed.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// Somebody else is at work.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A map could not be opened.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// A map could not be read or written.
    #[error(transparent)]
    Map(#[from] DataplaneError),
    /// The flows could not be counted.
    #[error("cannot read the table of flows")]
    Flows {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What is there is another version's.
    #[error(
        "{} is another version's of lb-agent: drain with that version, or clean up without --drain",
        path.display()
    )]
    Version {
        /// Its directory.
        path: PathBuf,
    },
}

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
