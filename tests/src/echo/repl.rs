//! A client that stays: questions on stdin, answers on stdout, one line of JSON each.
//!
//! It costs microseconds a probe instead of a process, and it is a process of its own, so that
//! it has a cgroup of its own and the connect-time hooks see it. A line of input is answered
//! before the next is read.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

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
    /// Close an open socket.
    Close {
        /// From the reply to `Open`.
        handle: u64,
    },
}

/// One line of output.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Reply {
    /// The socket that stays open after `Open`.
    pub handle: Option<u64>,
    /// The server's answer; none after `Close`.
    pub answer: Option<Answer>,
    /// The question made no sense.
    pub refused: Option<String>,
}

/// Answers `input` until it ends.
///
/// # Errors
/// Input that is no [`Request`], or an output that cannot be written.
pub fn run(input: impl BufRead, mut output: impl Write) -> io::Result<()> {
    let mut channels = BTreeMap::new();
    let mut next = 1;
    for line in input.lines() {
        let request = serde_json::from_str(&line?)?;
        let reply = answer(request, &mut channels, &mut next);
        let mut line = serde_json::to_vec(&reply)?;
        line.push(b'\n');
        output.write_all(&line)?;
        output.flush()?;
    }
    Ok(())
}

fn answer(request: Request, channels: &mut BTreeMap<u64, Channel>, next: &mut u64) -> Reply {
    let start = Instant::now();
    match request {
        Request::Ask(probe) => reply(None, probe::ask(&probe)),
        Request::Open(probe) => {
            let (channel, answer) = probe::open(&probe);
            let handle = channel.map(|channel| {
                let handle = *next;
                *next += 1;
                channels.insert(handle, channel);
                handle
            });
            reply(handle, answer)
        }
        Request::Exchange { handle, payload, timeout_ms } => match channels.get_mut(&handle) {
            Some(channel) => match channel.set_timeout(Duration::from_millis(timeout_ms)) {
                Ok(()) => reply(Some(handle), channel.exchange(&payload, start)),
                Err(error) => refuse(error.to_string()),
            },
            None => refuse(format!("no open socket {handle}")),
        },
        Request::Close { handle } => {
            channels.remove(&handle);
            Reply { handle: None, answer: None, refused: None }
        }
    }
}

fn reply(handle: Option<u64>, answer: Answer) -> Reply {
    Reply { handle, answer: Some(answer), refused: None }
}

fn refuse(reason: String) -> Reply {
    Reply { handle: None, answer: None, refused: Some(reason) }
}
