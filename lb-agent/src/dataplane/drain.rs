//! The last days of a datapath: known flows go on, new ones are left to the stack.
//!
//! The state is in the settings alone, so it lasts until an agent writes its own.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use lb_common::abi::settings::Settings;
use tracing::warn;

use super::{
    Dataplane as _, DataplaneError, cleanup,
    kernel::{KernelDataplane, read_settings},
    lock::{Lock, LockError},
    pins::{PinError, Pins},
    ports,
    sweep::Sweeper,
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
