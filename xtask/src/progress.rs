//! Progress of a long step: a spinner on a terminal, lines elsewhere. It is printed to stderr,
//! because stdout is the command's result.

use std::io::{IsTerminal, stderr};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a line is printed for a running step without a terminal.
const HEARTBEAT: Duration = Duration::from_secs(60);

/// A running step. It prints no last line if it is dropped without [`Progress::done`].
pub(crate) struct Progress {
    what: String,
    started: Instant,
    display: Display,
}

enum Display {
    Spinner(ProgressBar),
    /// The thread that prints the heartbeat ends when the sender is dropped.
    Lines {
        _alive: Sender<()>,
    },
}

impl Progress {
    /// Shows that `what` has started.
    pub(crate) fn start(what: impl Into<String>) -> Self {
        let what = what.into();
        let display = if stderr().is_terminal() {
            let bar = ProgressBar::new_spinner();
            bar.set_style(
                ProgressStyle::with_template("{spinner} {msg} ({elapsed})")
                    .unwrap_or_else(|_| ProgressStyle::default_spinner()),
            );
            bar.set_message(what.clone());
            bar.enable_steady_tick(Duration::from_millis(100));
            Display::Spinner(bar)
        } else {
            eprintln!("{what} ...");
            Display::Lines { _alive: heartbeat(what.clone()) }
        };
        Self { what, started: Instant::now(), display }
    }

    /// Ends the step with a line that says how long it took.
    pub(crate) fn done(self) {
        if let Display::Spinner(bar) = &self.display {
            bar.finish_and_clear();
        }
        eprintln!("{}: done in {}", self.what, seconds(self.started.elapsed()));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Display::Spinner(bar) = &self.display {
            bar.finish_and_clear();
        }
    }
}

/// `1.2s`, `3m05s`.
pub(crate) fn seconds(time: Duration) -> String {
    if time.as_secs() < 60 {
        format!("{:.1}s", time.as_secs_f64())
    } else {
        format!("{}m{:02}s", time.as_secs() / 60, time.as_secs() % 60)
    }
}

fn heartbeat(what: String) -> Sender<()> {
    let (alive, ended) = mpsc::channel();
    let started = Instant::now();
    thread::spawn(move || {
        while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(HEARTBEAT) {
            eprintln!("{what}: still running after {}", seconds(started.elapsed()));
        }
    });
    alive
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(seconds(Duration::from_millis(1234)), "1.2s");
        assert_eq!(seconds(Duration::from_secs(185)), "3m05s");
    }
}
