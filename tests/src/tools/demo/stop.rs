//! SIGINT, SIGTERM and SIGHUP: a handler records the signal, the demo stops between two steps.
//!
//! No signal is blocked: processes that the demo starts would inherit that.

use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The signal that came; 0 = none.
static HEARD: AtomicI32 = AtomicI32::new(0);

/// Whether the user wants the demo to end.
#[derive(Clone, Copy, Debug)]
pub struct Stop(());

impl Stop {
    /// Handles SIGINT, SIGTERM and SIGHUP from now on: the first one is recorded, a second one
    /// ends the process at once.
    ///
    /// # Errors
    /// There is no such signal.
    pub fn listen() -> Result<Self> {
        // Without SA_RESTART: a call that waits returns.
        let note = SigAction::new(SigHandler::Handler(note), SaFlags::empty(), SigSet::empty());
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            // SAFETY: the handler does nothing but atomic stores and _exit(2).
            unsafe { sigaction(signal, &note) }
                .with_context(|| format!("cannot listen to {signal}"))?;
        }
        Ok(Self(()))
    }

    /// The signal that came.
    pub fn signal(self) -> Option<Signal> {
        Signal::try_from(HEARD.load(Ordering::Relaxed)).ok()
    }

    /// Fails once a signal came.
    ///
    /// # Errors
    /// A signal came.
    pub fn check(self) -> Result<()> {
        ensure!(self.signal().is_none(), "interrupted");
        Ok(())
    }

    /// Returns when a signal comes.
    pub fn wait(self) {
        while self.signal().is_none() {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

extern "C" fn note(signal: libc::c_int) {
    if HEARD.swap(signal, Ordering::Relaxed) != 0 {
        // SAFETY: async-signal-safe.
        unsafe { libc::_exit(128 + signal) }
    }
}
