//! Servers that report the client's address, and clients that report who answered:
//! `lb_tests::harness::echo` as a program, so that it can run in the namespace and the cgroup of a
//! pod.

use std::io::{self, BufRead, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use lb_tests::harness::echo::bulk::{Direction, transfer};
use lb_tests::harness::echo::load::Load;
use lb_tests::harness::echo::probe::{self, Channel};
use lb_tests::harness::echo::serve::Servers;
use lb_tests::harness::echo::{Answer, Probe, Transport, repl};
use nix::sys::signal::{SigSet, Signal};

/// Servers and clients for tests of a load balancer.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve on all addresses; prints `ready`.
    Serve {
        /// The name that the servers report.
        #[arg(long)]
        name: String,
        /// Ports of TCP echo servers.
        #[arg(long)]
        tcp: Vec<u16>,
        /// Ports of UDP echo servers.
        #[arg(long)]
        udp: Vec<u16>,
        /// Ports of HTTP servers.
        #[arg(long)]
        http: Vec<u16>,
        /// Ports of TCP echo servers for tens of thousands of clients.
        #[arg(long)]
        crowd: Vec<u16>,
        /// Ports of servers of downloads and uploads.
        #[arg(long)]
        bulk: Vec<u16>,
    },
    /// Call once and print the answer as JSON; exit status 0 whatever the answer.
    Connect(Target),
    /// Call at a bounded rate and print a report as JSON at the end or on SIGTERM.
    Load {
        #[command(flatten)]
        target: Target,
        /// Connections, exchanges or datagrams per second.
        #[arg(long)]
        rate: u64,
        /// How long.
        #[arg(long)]
        seconds: f64,
        /// TCP: exchanges on a few connections that stay open.
        #[arg(long)]
        keepalive: bool,
    },
    /// Download at once on many connections, compare every byte and print a report as JSON.
    Download {
        /// Upload instead; the server compares.
        #[arg(long)]
        up: bool,
        #[command(flatten)]
        target: Target,
        /// How many connections.
        #[arg(long)]
        count: u64,
        /// How much on each.
        #[arg(long)]
        bytes: u64,
    },
    /// One connection: sends each line of stdin and prints the answer to it.
    Hold(Target),
    /// Requests on stdin, replies on stdout, one line of JSON each.
    Repl,
}

#[derive(Args)]
struct Target {
    /// ADDRESS:PORT, an IPv6 address in brackets.
    to: SocketAddr,
    /// UDP instead of TCP.
    #[arg(long)]
    udp: bool,
    /// How long an answer may take.
    #[arg(long, default_value_t = 1000)]
    timeout_ms: u64,
    /// Reach an IPv4 address from an IPv6 socket.
    #[arg(long)]
    v4mapped: bool,
    /// The client's port.
    #[arg(long, default_value_t = 0)]
    source_port: u16,
    /// UDP: connect() the socket.
    #[arg(long)]
    connected: bool,
    /// TCP: close with RST.
    #[arg(long)]
    reset: bool,
}

impl Target {
    fn probe(&self) -> Probe {
        Probe {
            transport: if self.udp { Transport::Udp } else { Transport::Tcp },
            timeout_ms: self.timeout_ms,
            v4_mapped: self.v4mapped,
            source_port: self.source_port,
            connected: self.connected,
            reset: self.reset,
            ..Probe::tcp(self.to)
        }
    }
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Serve { name, tcp, udp, http, crowd, bulk } => {
            Servers { name, tcp, udp, http, crowd, bulk }
                .run(|| say("ready"))
                .context("cannot serve")
        }
        Command::Connect(target) => {
            say(&serde_json::to_string(&probe::ask(&target.probe()))?);
            Ok(())
        }
        Command::Load { target, rate, seconds, keepalive } => {
            let stop = stop_on_sigterm()?;
            say("started");
            let report = Load { probe: target.probe(), rate, seconds, keepalive }.run(&stop)?;
            say(&serde_json::to_string(&report)?);
            Ok(())
        }
        Command::Download { up, target, count, bytes } => {
            let direction = if up { Direction::Up } else { Direction::Down };
            say("started");
            let report = transfer(&target.probe(), direction, count, bytes);
            say(&serde_json::to_string(&report)?);
            Ok(())
        }
        Command::Hold(target) => hold(&target),
        Command::Repl => Ok(repl::run(io::stdin().lock(), io::stdout().lock())?),
    }
}

fn hold(target: &Target) -> Result<()> {
    let (channel, answer) = probe::open(&target.probe());
    print_answer(&answer)?;
    let Some(mut channel): Option<Channel> = channel else {
        bail!("cannot hold a connection to {}", target.to);
    };
    for line in io::stdin().lock().lines() {
        print_answer(&channel.exchange(&line?, Instant::now()))?;
    }
    Ok(())
}

fn print_answer(answer: &Answer) -> Result<()> {
    say(&serde_json::to_string(answer)?);
    Ok(())
}

/// Prints a line and flushes it. A closed pipe is not an error.
fn say(line: &str) {
    let mut output = io::stdout().lock();
    writeln!(output, "{line}").and_then(|()| output.flush()).ok();
}

fn stop_on_sigterm() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("cannot block SIGTERM")?;
    let heard = stop.clone();
    thread::spawn(move || {
        if signals.wait().is_ok() {
            heard.store(true, Ordering::Relaxed);
        }
    });
    Ok(stop)
}
