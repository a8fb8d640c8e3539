//! The log: on stderr as text or JSON, and its last lines in memory, for `lb-agent sysdump`.

use std::{
    collections::VecDeque,
    io::{self, IsTerminal as _, Write},
    sync::{Arc, Mutex, PoisonError},
};

use tracing_subscriber::{
    EnvFilter, Layer as _, fmt, fmt::MakeWriter, layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

/// How many lines are kept.
const LINES: usize = 2_000;
/// A kept line is cut to so many bytes.
const LINE: usize = 2_048;

/// How the log is written to stderr, as in kube-proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// A line of text with key-value pairs.
    #[default]
    Text,
    /// A JSON object in a line.
    Json,
}

impl Format {
    /// The format with kube-proxy's name for it.
    pub fn of_name(name: &str) -> Option<Self> {
        match name {
            "text" => Some(Self::Text),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

/// The last lines of the log; clones share them.
#[derive(Clone, Debug, Default)]
pub struct LastLines(Arc<Mutex<VecDeque<String>>>);

impl LastLines {
    /// The lines, the oldest first.
    pub fn text(&self) -> String {
        self.lines().iter().flat_map(|line| [line.as_str(), "\n"]).collect()
    }

    fn push(&self, line: &str) {
        let line = line.trim_end();
        let mut lines = self.lines();
        if lines.len() == LINES {
            lines.pop_front();
        }
        lines.push_back(line[..line.floor_char_boundary(LINE)].to_owned());
    }

    fn lines(&self) -> std::sync::MutexGuard<'_, VecDeque<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for LastLines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(&String::from_utf8_lossy(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LastLines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// Logs from now on, and returns the last lines.
pub fn start(format: Format, verbosity: u32) -> LastLines {
    let level = match verbosity {
        // The watch logs errors of the Kubernetes client with their context. A directory that is
        // replaced loses its inotify watch, which notify reports as a warning.
        0..=3 => "info,kube_client=off,kube_runtime=off,notify=error",
        4 | 5 => "debug",
        6.. => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let lines = LastLines::default();
    let kept = fmt::layer().with_ansi(false).with_writer(lines.clone());
    let written = fmt::layer().with_writer(io::stderr);
    let written = match format {
        Format::Text => written.with_ansi(io::stderr().is_terminal()).boxed(),
        Format::Json => written.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(kept).with(written).init();
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept_and_cut() {
        let mut lines = LastLines::default();
        for number in 0..LINES + 2 {
            let line = format!("line {number}\n");
            lines.make_writer().write_all(line.as_bytes()).expect("memory takes it");
        }
        lines.write_all("é".repeat(LINE).as_bytes()).expect("memory takes it");
        let text = lines.text();
        assert_eq!(text.lines().count(), LINES);
        assert_eq!(text.lines().next(), Some("line 3"));
        assert_eq!(text.lines().next_back().map(str::len), Some(LINE));
    }
}
