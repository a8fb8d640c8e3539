//! Clients of a test: a process per host that stays and is asked through pipes.

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::host::Host;
use super::process::Process;
use crate::harness::echo::bulk::Direction;
use crate::harness::echo::load::Report;
use crate::harness::echo::repl::{Reply, Request};
use crate::harness::echo::{Answer, Probe, Transport, bulk, crowd};
use crate::harness::wait::PATIENCE;

/// The `lb-echo` program, ready for arguments.
pub(in crate::harness::netns) fn lb_echo() -> Result<Command> {
    Ok(Command::new(program("LB_ECHO", "lb-echo", &[])?))
}

/// Finds a program of this workspace: where the variable says, else beside the running program
/// (or above it, for a test), else in one of `directories`.
pub(in crate::harness) fn program(
    variable: &str,
    name: &str,
    directories: &[PathBuf],
) -> Result<PathBuf> {
    if let Some(path) = env::var_os(variable) {
        return Ok(path.into());
    }
    let own = env::current_exe().context("cannot find the running program")?;
    own.ancestors()
        .skip(1)
        .take(2)
        .map(Path::to_owned)
        .chain(directories.iter().cloned())
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("no {name} beside {}; build it, or set {variable}", own.display()))
}

/// The client process of a host.
#[derive(Debug)]
pub(in crate::harness::netns) struct Repl {
    process: Process,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Repl {
    pub(in crate::harness::netns) fn start(host: &Host) -> Result<Self> {
        let mut command = lb_echo()?;
        command.arg("repl");
        let mut process = host.place().spawn_piped(&format!("{}-client", host.name()), command)?;
        let input = process.take_stdin().context("no pipe to the client")?;
        let output = BufReader::new(process.take_stdout().context("no pipe from the client")?);
        Ok(Self { process, input, output })
    }

    fn call(&mut self, request: &Request) -> Result<Reply> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        let mut answer = String::new();
        let asked = self.input.write_all(&line).and_then(|()| self.output.read_line(&mut answer));
        if !matches!(asked, Ok(1..)) {
            bail!("the client is gone: {asked:?}\n{}", self.process.tail());
        }
        let reply: Reply =
            serde_json::from_str(&answer).with_context(|| format!("the client said {answer:?}"))?;
        match reply.refused {
            Some(reason) => bail!("the client refused {request:?}: {reason}"),
            None => Ok(reply),
        }
    }
}

fn call(client: &Mutex<Repl>, request: &Request) -> Result<Reply> {
    client.lock().unwrap_or_else(PoisonError::into_inner).call(request)
}

pub(in crate::harness::netns) fn ask(client: &Mutex<Repl>, probe: Probe) -> Result<Answer> {
    call(client, &Request::Ask(probe))?.answer.context("a reply without an answer")
}

/// A socket that stays open in the client process; dropping closes it.
#[derive(Debug)]
pub struct Connection {
    client: Arc<Mutex<Repl>>,
    handle: u64,
    first: Answer,
}

impl Connection {
    pub(in crate::harness::netns) fn open(client: Arc<Mutex<Repl>>, probe: Probe) -> Result<Self> {
        let to = probe.to;
        let reply = call(&client, &Request::Open(probe))?;
        let first = reply.answer.context("a reply without an answer")?;
        match reply.handle {
            Some(handle) => Ok(Self { client, handle, first }),
            None => bail!("cannot open a connection to {to}: {first:?}"),
        }
    }

    /// The answer to the probe that opened it.
    pub fn first(&self) -> &Answer {
        &self.first
    }

    /// Asks again on the same socket.
    ///
    /// # Errors
    /// The client process does not work.
    pub fn exchange(&self, payload: &str, timeout: Duration) -> Result<Answer> {
        let request = Request::Exchange {
            handle: self.handle,
            payload: payload.to_owned(),
            timeout_ms: u64::try_from(timeout.as_millis())?,
        };
        call(&self.client, &request)?.answer.context("a reply without an answer")
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A client that is gone has closed it already.
        call(&self.client, &Request::Close { handle: self.handle }).ok();
    }
}

/// Many sockets, each with a port of its own, which stay open, in a few processes.
#[derive(Debug)]
pub struct Crowd {
    parts: Vec<(Mutex<Repl>, u64)>,
}

/// The port of the first one of a crowd, if the test does not care.
const FIRST_PORT: u16 = 2_000;

impl Crowd {
    pub(in crate::harness::netns) fn gather(
        host: &Host,
        probe: &Probe,
        count: usize,
    ) -> Result<Self> {
        let mut parts = Vec::new();
        for first in (0..count).step_by(crowd::SHARE) {
            let repl = Mutex::new(Repl::start(host)?);
            let begin = Some(probe.source_port).filter(|port| *port > 0).unwrap_or(FIRST_PORT);
            let source_port = u16::try_from(usize::from(begin) + first)?;
            let probe = Probe { source_port, ..probe.clone() };
            let count = crowd::SHARE.min(count - first);
            let reply = call(&repl, &Request::Gather { probe, count })?;
            parts.push((repl, reply.handle.context("a crowd without a handle")?));
        }
        Ok(Self { parts })
    }

    /// Every one asks once; the first time all of them open their sockets.
    ///
    /// # Errors
    /// A client process does not work.
    pub fn ask(&self) -> Result<crowd::Report> {
        let ask = |(repl, handle): &(Mutex<Repl>, u64)| {
            let reply = call(repl, &Request::Crowd { handle: *handle })?;
            reply.crowd.context("a reply without a report")
        };
        let reports = thread::scope(|scope| {
            let all: Vec<_> =
                self.parts.iter().map(|part| scope.spawn(move || ask(part))).collect();
            all.into_iter().map(|one| one.join()).collect::<Vec<_>>()
        });
        let mut sum = crowd::Report::default();
        for report in reports {
            sum.add(report.ok().context("a thread panicked")??);
        }
        Ok(sum)
    }
}

/// Running downloads or uploads, `lb-echo download`.
#[derive(Debug)]
pub struct Transfers {
    process: Process,
}

impl Transfers {
    pub(in crate::harness::netns) fn start(
        host: &Host,
        to: SocketAddr,
        direction: Direction,
        count: u64,
        length: u64,
    ) -> Result<Self> {
        let mut command = lb_echo()?;
        command.arg("download").arg(to.to_string());
        command.args(["--count", &count.to_string(), "--bytes", &length.to_string()]);
        command.args(["--timeout-ms", "5000"]);
        if direction == Direction::Up {
            command.arg("--up");
        }
        let mut process = host.spawn("transfer", command)?;
        process.wait_for_output("started", PATIENCE)?;
        Ok(Self { process })
    }

    /// Waits for the end and returns what became of them.
    ///
    /// # Errors
    /// They take longer than `timeout`, or the process fails.
    pub fn finish(mut self, timeout: Duration) -> Result<bulk::Report> {
        let status = self.process.wait(timeout)?;
        if !status.success() {
            bail!("the transfers ended with {status}\n{}", self.process.tail());
        }
        let output = self.process.stdout();
        let report = output.lines().last().unwrap_or_default();
        serde_json::from_str(report).with_context(|| format!("the transfers said {output:?}"))
    }
}

/// A running `lb-echo load`.
#[derive(Debug)]
pub struct Load {
    process: Process,
    longest: Duration,
}

impl Load {
    pub(in crate::harness::netns) fn start(
        host: &Host,
        probe: &Probe,
        rate: u64,
        time: Duration,
        keepalive: bool,
    ) -> Result<Self> {
        let mut command = lb_echo()?;
        command.arg("load").arg(probe.to.to_string());
        command.arg("--rate").arg(rate.to_string());
        command.arg("--seconds").arg(time.as_secs_f64().to_string());
        command.arg("--timeout-ms").arg(probe.timeout_ms.to_string());
        command.arg("--source-port").arg(probe.source_port.to_string());
        let flags = [
            ("--udp", probe.transport == Transport::Udp),
            ("--v4mapped", probe.v4_mapped),
            ("--connected", probe.connected),
            ("--reset", probe.reset),
            ("--keepalive", keepalive),
        ];
        command.args(flags.iter().filter(|(_, on)| *on).map(|(flag, _)| flag));
        let mut process = host.spawn("load", command)?;
        process.wait_for_output("started", PATIENCE)?;
        let longest = time + Duration::from_millis(probe.timeout_ms) + PATIENCE;
        Ok(Self { process, longest })
    }

    /// Waits for the end and returns what became of it.
    ///
    /// # Errors
    /// It does not end in time or fails.
    pub fn finish(mut self) -> Result<Report> {
        let status = self.process.wait(self.longest)?;
        if !status.success() {
            bail!("the load ended with {status}\n{}", self.process.tail());
        }
        let output = self.process.stdout();
        let report = output.lines().last().unwrap_or_default();
        serde_json::from_str(report).with_context(|| format!("the load said {output:?}"))
    }

    /// Ends it now and returns what became of it.
    ///
    /// # Errors
    /// As [`Load::finish`].
    pub fn stop(self) -> Result<Report> {
        self.process.signal(Signal::SIGTERM)?;
        self.finish()
    }
}

/// Ends loads and holds each to it that nothing failed and more than `least` was answered.
///
/// # Errors
/// What was lost, or a load that did not run.
pub fn stop_without_loss(loads: impl IntoIterator<Item = Load>, least: u64) -> Result<()> {
    for load in loads {
        let report = load.stop()?;
        println!("{report:?}");
        ensure!(report.failures() == 0 && report.ok > least, "{report:?}");
    }
    Ok(())
}
