//! Many clients at once, each from a port of its own: does every one hear what it said?

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::Instant;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use super::probe::{self, Channel};
use super::{Answer, Greeting, Probe, Transport, error_name};

/// How many of them wait for an answer at once.
const WORKERS: usize = 16;
/// How many clients, or clients of a server, one process is to have: a limit of 10,000 open
/// files is to be found everywhere.
pub const SHARE: usize = 8_000;
/// How often a datagram is sent that is not answered: a full socket buffer is no fault.
const ATTEMPTS: u32 = 3;

/// What became of one round of questions.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Report {
    /// Those that heard what they said.
    pub ok: u64,
    /// The others by error; `corrupt` is an answer to somebody else.
    pub failed: BTreeMap<String, u64>,
    /// Those that the server saw under another address or port than before.
    pub moved: u64,
    /// Answers by the client address that the server saw.
    pub client_addresses: BTreeMap<String, u64>,
    /// The clients' addresses and ports as the server saw them.
    pub clients: Vec<SocketAddr>,
    /// How long the round took.
    pub seconds: f64,
}

/// Clients whose sockets stay open.
#[derive(Debug)]
pub struct Crowd {
    members: Vec<Member>,
    round: u32,
}

#[derive(Debug)]
struct Member {
    probe: Probe,
    channel: Option<Channel>,
    /// How the server sees it.
    seen: Option<SocketAddr>,
    before: Option<SocketAddr>,
    error: Option<String>,
}

/// Lets this process have as many open files as it may.
///
/// # Errors
/// They are fewer than so many.
pub fn allow_files(count: usize) -> io::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if most < count as u64 + 100 {
        let error = format!("{count} sockets are more than the limit of open files, {most}");
        return Err(io::Error::other(error));
    }
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}

impl Report {
    /// Adds what became of another process's questions, which were asked at the same time.
    pub fn add(&mut self, other: Self) {
        let maps = [
            (&mut self.failed, other.failed),
            (&mut self.client_addresses, other.client_addresses),
        ];
        for (all, more) in maps {
            for (key, count) in more {
                *all.entry(key).or_default() += count;
            }
        }
        self.ok += other.ok;
        self.moved += other.moved;
        self.clients.extend(other.clients);
        self.seconds = self.seconds.max(other.seconds);
    }

    /// How many the server saw under the address and port of another one.
    pub fn shared(&self) -> usize {
        let distinct: HashSet<_> = self.clients.iter().collect();
        self.clients.len() - distinct.len()
    }
}

impl Crowd {
    /// So many clients, none of which has asked yet, on successive ports beginning with the
    /// probe's.
    ///
    /// # Errors
    /// More than there are ports, or than this process may have open files.
    pub fn new(probe: &Probe, count: usize) -> io::Result<Self> {
        let first = usize::from(probe.source_port);
        let ports = u16::try_from(first + count).map_err(io::Error::other)?;
        allow_files(count)?;
        let member = |source_port| Member {
            probe: Probe { source_port, ..probe.clone() },
            channel: None,
            seen: None,
            before: None,
            error: None,
        };
        Ok(Self { members: (probe.source_port..ports).map(member).collect(), round: 0 })
    }

    /// Every one asks once. Who has no open socket, because it is the first time or the last
    /// one failed, opens one.
    pub fn ask(&mut self) -> Report {
        let start = Instant::now();
        self.round += 1;
        let round = self.round;
        let share = self.members.len().div_ceil(WORKERS).max(1);
        thread::scope(|scope| {
            for members in self.members.chunks_mut(share) {
                scope.spawn(move || members.iter_mut().for_each(|member| member.ask(round)));
            }
        });
        let mut report = Report { seconds: start.elapsed().as_secs_f64(), ..Report::default() };
        for member in &self.members {
            if let Some(error) = &member.error {
                *report.failed.entry(error.clone()).or_default() += 1;
            } else if let Some(seen) = member.seen {
                report.ok += 1;
                report.clients.push(seen);
                report.moved += u64::from(member.before.is_some_and(|before| before != seen));
                *report.client_addresses.entry(seen.ip().to_string()).or_default() += 1;
            }
        }
        report
    }
}

impl Member {
    fn ask(&mut self, round: u32) {
        self.before = self.seen.take();
        let said = format!("{}:{round}", self.probe.source_port);
        let answer = match self.probe.transport {
            Transport::Tcp => self.exchange(&said),
            Transport::Udp => self.datagram(&said).map_err(|error| error_name(&error)),
        };
        match answer {
            Ok(greeting) => {
                self.seen = Some((greeting.client_address, greeting.client_port).into());
                self.error = None;
            }
            Err(error) => {
                self.channel = None;
                self.error = Some(error);
            }
        }
    }

    fn exchange(&mut self, said: &str) -> Result<Greeting, String> {
        let answer = match &mut self.channel {
            Some(channel) => channel.exchange(said, Instant::now()),
            None => {
                let (channel, answer) = probe::open(&self.probe.clone().payload(said));
                self.channel = channel;
                answer
            }
        };
        match answer {
            Answer::Reached(reached) => Ok(reached.greeting),
            Answer::Failed(failed) => Err(failed.error),
        }
    }

    fn datagram(&mut self, said: &str) -> io::Result<Greeting> {
        let channel = match self.channel.take() {
            Some(channel) => channel,
            None => Channel::open(&self.probe)?,
        };
        let Channel::Udp { socket, to, .. } = self.channel.insert(channel) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let mut attempt = 1;
        loop {
            socket.send_to(said.as_bytes(), *to)?;
            match hear(socket, *to, said) {
                Err(error) if error_name(&error) == "timeout" && attempt < ATTEMPTS => attempt += 1,
                heard => return heard,
            }
        }
    }
}

/// Waits for what was said to come back; what was said to others is an error.
fn hear(socket: &UdpSocket, to: SocketAddr, said: &str) -> io::Result<Greeting> {
    let own = said.split(':').next().unwrap_or_default();
    let mut buffer = [0; 1024];
    loop {
        let (length, from) = socket.recv_from(&mut buffer)?;
        let (greeting, echo) = probe::split_datagram(&buffer[..length])?;
        if from == to && echo == said.as_bytes() {
            return Ok(greeting);
        }
        // An answer to an earlier question may still come.
        let is_own =
            std::str::from_utf8(echo).is_ok_and(|echo| echo.split(':').next() == Some(own));
        if from != to || !is_own {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}
