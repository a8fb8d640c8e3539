//! A client that stays: questions on stdin, answers on stdout, one line of JSON each.
//!
//! It costs microseconds a probe instead of a process, and it is a process of its own, so that
//! it has a cgroup of its own and the connect-time hooks see it. A line of input is answered
//! before the next is read.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::crowd::{self, Crowd};
use super::probe::{self, Channel};
use super::{Answer, Probe};

/// One line of input.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Request {
    /// Open, ask once, close.
    Ask(Probe),
    /// Open and ask once; the socket stays open under the handle of the reply.
    Open(Probe),
    /// Ask again on an open socket.
    Exchange {
        /// From the reply to `Open`.
        handle: u64,
        /// What must come back.
        payload: String,
        /// How long it may take.
        timeout_ms: u64,
    },
    /// Close an open socket, or those of a crowd.
    Close {
        /// From the reply to `Open` or `Gather`.
        handle: u64,
    },
    /// Make a crowd that asks nothing yet.
    Gather {
        /// What every member asks; port and payload are its own.
        probe: Probe,
        /// How many members.
        count: usize,
    },
    /// Every member of a crowd asks once.
    Crowd {
        /// From the reply to `Gather`.
        handle: u64,
    },
}

/// One line of output.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Reply {
    /// The socket that stays open after `Open`.
    pub handle: Option<u64>,
    /// The server's answer, to `Ask`, `Open` and `Exchange`.
    pub answer: Option<Answer>,
    /// What became of a crowd's questions.
    pub crowd: Option<crowd::Report>,
    /// The question made no sense.
    pub refused: Option<String>,
}

/// Answers `input` until it ends.
///
/// # Errors
/// Input that is no [`Request`], or an output that cannot be written.
pub fn run(input: impl BufRead, mut output: impl Write) -> io::Result<()> {
    let mut open = Open { next: 1, ..Open::default() };
    for line in input.lines() {
        let request = serde_json::from_str(&line?)?;
        let reply = open.answer(request);
        let mut line = serde_json::to_vec(&reply)?;
        line.push(b'\n');
        output.write_all(&line)?;
        output.flush()?;
    }
    Ok(())
}

/// What stays open, by handle.
#[derive(Default)]
struct Open {
    channels: BTreeMap<u64, Channel>,
    crowds: BTreeMap<u64, Crowd>,
    next: u64,
}

impl Open {
    fn answer(&mut self, request: Request) -> Reply {
        let start = Instant::now();
        match request {
            Request::Ask(probe) => reply(None, probe::ask(&probe)),
            Request::Open(probe) => {
                let (channel, answer) = probe::open(&probe);
                let handle = channel.map(|channel| {
                    let handle = self.handle();
                    self.channels.insert(handle, channel);
                    handle
                });
                reply(handle, answer)
            }
            Request::Exchange { handle, payload, timeout_ms } => {
                let Some(channel) = self.channels.get_mut(&handle) else {
                    return refuse(format!("no open socket {handle}"));
                };
                match channel.set_timeout(Duration::from_millis(timeout_ms)) {
                    Ok(()) => reply(Some(handle), channel.exchange(&payload, start)),
                    Err(error) => refuse(error.to_string()),
                }
            }
            Request::Close { handle } => {
                self.channels.remove(&handle);
                self.crowds.remove(&handle);
                Reply::default()
            }
            Request::Gather { probe, count } => match Crowd::new(&probe, count) {
                Ok(crowd) => {
                    let handle = self.handle();
                    self.crowds.insert(handle, crowd);
                    Reply { handle: Some(handle), ..Reply::default() }
                }
                Err(error) => refuse(error.to_string()),
            },
            Request::Crowd { handle } => match self.crowds.get_mut(&handle) {
                Some(crowd) => Reply { crowd: Some(crowd.ask()), ..Reply::default() },
                None => refuse(format!("no crowd {handle}")),
            },
        }
    }

    fn handle(&mut self) -> u64 {
        let handle = self.next;
        self.next += 1;
        handle
    }
}

fn reply(handle: Option<u64>, answer: Answer) -> Reply {
    Reply { handle, answer: Some(answer), ..Reply::default() }
}

fn refuse(reason: String) -> Reply {
    Reply { refused: Some(reason), ..Reply::default() }
}
