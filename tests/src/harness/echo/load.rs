//! A bounded stream of connections or datagrams, and how many of them went wrong.

use std::collections::BTreeMap;
use std::io;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::probe::{self, Channel};
use super::{Answer, Probe, Transport, error_name};

/// How many connections may be waiting for an answer at once.
const WORKERS: u64 = 8;
/// The highest rate that is accepted, per second.
const MAX_RATE: u64 = 100_000;
/// The longest run.
const MAX_SECONDS: u64 = 600;

/// What to send and how much of it.
#[derive(Clone, Debug)]
pub struct Load {
    /// Where to and how. UDP: one socket for the whole run.
    pub probe: Probe,
    /// Connections, exchanges or datagrams per second.
    pub rate: u64,
    /// When it is over.
    pub seconds: f64,
    /// TCP: `rate` exchanges on a few connections that stay, instead of `rate` connections.
    pub keepalive: bool,
}

/// What became of it.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Report {
    /// Connections, exchanges or datagrams that were tried.
    pub sent: u64,
    /// Those that were answered.
    pub ok: u64,
    /// The others by error; `lost` is a datagram without an answer.
    pub failed: BTreeMap<String, u64>,
    /// Answers by the name of the server.
    pub answers: BTreeMap<String, u64>,
    /// Answers by the client address that the server saw.
    pub client_addresses: BTreeMap<String, u64>,
    /// TCP connections that were opened, or 0 for UDP.
    pub connections: u64,
    /// The longest time without any answer.
    pub longest_gap_ms: f64,
    /// The slowest answer.
    pub slowest_ms: f64,
    /// TCP: so long took 99 of 100 answers at most.
    pub p99_ms: f64,
    /// How long it took.
    pub seconds: f64,
}

impl Report {
    /// How many were not answered.
    pub fn failures(&self) -> u64 {
        self.failed.values().sum()
    }
}

struct Tally {
    report: Report,
    /// Milliseconds of every answer.
    elapsed: Vec<f64>,
    last_answer: Instant,
}

impl Tally {
    fn add(&mut self, answer: &Answer) {
        match answer {
            Answer::Reached(reached) => {
                let now = Instant::now();
                let gap = now.duration_since(self.last_answer).as_secs_f64() * 1000.0;
                self.last_answer = now;
                let report = &mut self.report;
                report.ok += 1;
                self.elapsed.push(reached.elapsed_ms);
                report.longest_gap_ms = report.longest_gap_ms.max(gap);
                report.slowest_ms = report.slowest_ms.max(reached.elapsed_ms);
                *report.answers.entry(reached.greeting.name.clone()).or_default() += 1;
                let client = reached.greeting.client_address.to_string();
                *report.client_addresses.entry(client).or_default() += 1;
            }
            Answer::Failed(failed) => self.fail(failed.error.clone(), 1),
        }
    }

    fn fail(&mut self, error: String, count: u64) {
        if count > 0 {
            *self.report.failed.entry(error).or_default() += count;
        }
    }
}

impl Load {
    /// Runs until the time is over or `stop` is set.
    ///
    /// # Errors
    /// A rate or a time that is out of bounds, or a UDP socket that cannot be made.
    pub fn run(&self, stop: &AtomicBool) -> io::Result<Report> {
        if self.rate == 0 || self.rate > MAX_RATE {
            return Err(io::Error::other(format!("rate {} is not in 1..={MAX_RATE}", self.rate)));
        }
        let most = Duration::from_secs(MAX_SECONDS);
        let run = Duration::try_from_secs_f64(self.seconds).ok().filter(|run| *run <= most);
        let Some(run) = run else {
            return Err(io::Error::other(format!(
                "{} seconds are not in 0..={MAX_SECONDS}",
                self.seconds
            )));
        };
        let start = Instant::now();
        let (report, elapsed) = (Report::default(), Vec::new());
        let tally = Mutex::new(Tally { report, elapsed, last_answer: start });
        let pace = Pace { start, end: start + run, rate: self.rate, next: AtomicU64::new(0), stop };
        match self.probe.transport {
            Transport::Tcp => thread::scope(|scope| {
                for _ in 0..WORKERS {
                    scope.spawn(|| self.connections(&pace, &tally));
                }
            }),
            Transport::Udp => self.datagrams(&pace, &tally)?,
        }
        let mut tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
        let p99_ms = percentile(&mut tally.elapsed, 0.99);
        Ok(Report { seconds: start.elapsed().as_secs_f64(), p99_ms, ..tally.report })
    }

    fn connections(&self, pace: &Pace<'_>, tally: &Mutex<Tally>) {
        let mut kept: Option<Channel> = None;
        while pace.wait().is_some() {
            let (answer, opened) = match kept.take() {
                Some(mut channel) => {
                    let answer = channel.exchange(&self.probe.payload, Instant::now());
                    if answer.reached().is_some() {
                        kept = Some(channel);
                    }
                    (answer, false)
                }
                None => {
                    let (channel, answer) = probe::open(&self.probe);
                    let opened = channel.is_some();
                    kept = channel.filter(|_| self.keepalive);
                    (answer, opened)
                }
            };
            let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
            tally.report.sent += 1;
            tally.report.connections += u64::from(opened);
            tally.add(&answer);
        }
    }

    fn datagrams(&self, pace: &Pace<'_>, tally: &Mutex<Tally>) -> io::Result<()> {
        let Channel::Udp { socket, to, connected } = Channel::open(&self.probe)? else {
            return Err(io::Error::other("a datagram stream needs a UDP socket"));
        };
        let receiver = socket.try_clone()?;
        receiver.set_read_timeout(Some(Duration::from_millis(20)))?;
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| self.receive(&receiver, &over, tally));
            while let Some(number) = pace.wait() {
                let payload = number.to_string();
                let sent = if connected {
                    socket.send(payload.as_bytes())
                } else {
                    socket.send_to(payload.as_bytes(), to)
                };
                let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
                tally.report.sent += 1;
                if let Err(error) = sent {
                    tally.fail(error_name(&error), 1);
                }
            }
            over.store(true, Ordering::Release);
        });
        let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        let known = tally.report.ok + tally.report.failures();
        let lost = tally.report.sent.saturating_sub(known);
        tally.fail("lost".to_owned(), lost);
        Ok(())
    }

    /// Counts answers until all are there, or until the probe's timeout after the last question.
    fn receive(&self, socket: &UdpSocket, over: &AtomicBool, tally: &Mutex<Tally>) {
        let mut buffer = vec![0; 64 * 1024];
        let mut deadline = None;
        loop {
            let received = socket.recv_from(&mut buffer);
            let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
            match received {
                Ok((length, peer)) => {
                    if let (Ok((greeting, _)), Ok(source)) =
                        (probe::split_datagram(&buffer[..length]), socket.local_addr())
                    {
                        let elapsed_ms = 0.0;
                        tally.add(&Answer::Reached(super::Reached {
                            greeting,
                            peer,
                            source,
                            elapsed_ms,
                        }));
                    }
                }
                Err(error) => match error_name(&error).as_str() {
                    "timeout" => {}
                    name => tally.fail(name.to_owned(), 1),
                },
            }
            if over.load(Ordering::Acquire) {
                let all = tally.report.ok + tally.report.failures() >= tally.report.sent;
                let timeout = Duration::from_millis(self.probe.timeout_ms);
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + timeout);
                if all || Instant::now() >= deadline {
                    return;
                }
            }
        }
    }
}

/// The value that this part of all does not exceed; 0 of none.
fn percentile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let position = (values.len() as f64 * part) as usize;
    values.get(position).or(values.last()).copied().unwrap_or_default()
}

/// Hands out the moments at which to send.
struct Pace<'a> {
    start: Instant,
    end: Instant,
    rate: u64,
    next: AtomicU64,
    stop: &'a AtomicBool,
}

impl Pace<'_> {
    /// Waits for the next moment; `None` when the run is over.
    fn wait(&self) -> Option<u64> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let nanoseconds = number.saturating_mul(1_000_000_000) / self.rate;
        let due = self.start + Duration::from_nanos(nanoseconds);
        if due >= self.end {
            return None;
        }
        loop {
            let now = Instant::now();
            if self.stop.load(Ordering::Relaxed) || now >= self.end {
                return None;
            }
            if now >= due {
                return Some(number);
            }
            // In slices, so that a stop is heard.
            thread::sleep((due - now).min(Duration::from_millis(20)));
        }
    }
}
