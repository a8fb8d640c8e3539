//! The client and the server of the scaling cases, each a process of its own.
//!
//! Clients end connections with RST: those that wait for late packets would soon occupy every port.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::Linger;

use super::super::exchange::{
    DATAGRAM, PATIENCE, Sample, accept, answer, answer_bursts, ask, connect, datagrams, listen,
    summary,
};
use crate::harness::echo::crowd::allow_files;

/// The source port of the first flow of [`Work::Flows`].
const FIRST_PORT: u16 = 2_000;
/// The most flows: one for each port that is left.
pub const MOST_FLOWS: u32 = 60_000;

/// What a client does.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Work {
    /// connect() alone.
    Open,
    /// Connect, one byte, its answer.
    Exchange,
    /// A datagram and its answer, in a random one of many flows that exist already.
    Flows,
    /// Connects for some time, and says when it last reached an endpoint whose address ends with 1.
    Watch,
    /// Connects, and notes the last numbers of the endpoints' addresses.
    Endpoints,
}

impl Work {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Exchange => "exchange",
            Self::Flows => "flows",
            Self::Watch => "watch",
            Self::Endpoints => "endpoints",
        }
    }
}

/// Does `count` operations, in as many `flows` where there are many, or for `count` milliseconds
/// ([`Work::Watch`]). Returns what there is to say as JSON.
///
/// # Errors
/// The server does not answer.
pub fn run(work: Work, to: SocketAddr, count: u64, flows: u32) -> Result<String> {
    let said = match work {
        Work::Open => serde_json::to_string(&times(count, || open(to))?),
        Work::Exchange => serde_json::to_string(&times(count, || exchange(to))?),
        Work::Flows => serde_json::to_string(&in_flows(to, count, flows)?),
        Work::Watch => serde_json::to_string(&watch(to, Duration::from_millis(count))?),
        Work::Endpoints => {
            let all = (0..count).map(|_| endpoint(to)).collect::<io::Result<BTreeSet<_>>>();
            serde_json::to_string(&all.with_context(|| format!("connect to {to}"))?)
        }
    };
    Ok(said?)
}

/// Repeats an operation that measures itself, after a twentieth as many to warm up.
fn times(count: u64, operation: impl Fn() -> io::Result<Duration>) -> Result<Sample> {
    (0..count.div_ceil(20)).try_for_each(|_| operation().map(drop))?;
    let start = Instant::now();
    let mut times = Vec::with_capacity(usize::try_from(count)?);
    for _ in 0..count {
        times.push(operation()?.as_secs_f64() * 1e6);
    }
    Ok(summary(&mut times, count as f64 / start.elapsed().as_secs_f64()))
}

fn open(to: SocketAddr) -> io::Result<Duration> {
    let start = Instant::now();
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    let took = start.elapsed();
    reset(stream)?;
    Ok(took)
}

fn exchange(to: SocketAddr) -> io::Result<Duration> {
    let start = Instant::now();
    let mut stream = connect(to)?;
    ask(&mut stream)?;
    let took = start.elapsed();
    reset(stream)?;
    Ok(took)
}

/// Closes with RST.
fn reset(stream: TcpStream) -> io::Result<()> {
    let now = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&stream, Linger, &now)?;
    Ok(())
}

fn in_flows(to: SocketAddr, count: u64, flows: u32) -> Result<Sample> {
    ensure!(flows <= MOST_FLOWS, "{flows} flows are more than there are ports");
    allow_files(flows as usize)?;
    let sockets: Vec<_> =
        (0..flows as u16).map(|number| flow(to, number)).collect::<Result<_>>()?;
    for socket in &sockets {
        datagram(socket).with_context(|| format!("the first datagram of a flow to {to}"))?;
    }
    let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut times = Vec::with_capacity(usize::try_from(count)?);
    let start = Instant::now();
    for _ in 0..count {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let socket = &sockets[(random % u64::from(flows)) as usize];
        let begin = Instant::now();
        datagram(socket).with_context(|| format!("a datagram to {to}"))?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    Ok(summary(&mut times, count as f64 / start.elapsed().as_secs_f64()))
}

fn flow(to: SocketAddr, number: u16) -> Result<UdpSocket> {
    if number == 0 {
        return Ok(datagrams(to, 0)?);
    }
    let port = FIRST_PORT + number;
    datagrams(to, port).with_context(|| format!("cannot open a socket on port {port}"))
}

fn datagram(socket: &UdpSocket) -> io::Result<()> {
    socket.send(&[0; DATAGRAM])?;
    socket.recv(&mut [0; DATAGRAM]).map(drop)
}

/// What the client of [`Work::Watch`] says on a line of its own when it reaches the endpoint again.
pub const REACHED: &str = "reached";
/// So many connections in a row to the other one of two endpoints say that the first is gone.
const GONE: u32 = 30;

/// Connects for some time. When it no longer reaches the endpoint, it says on a line of its own when
/// it began the last connection that did, microseconds since 1970.
fn watch(to: SocketAddr, time: Duration) -> Result<()> {
    let start = Instant::now();
    let (mut last, mut missed) = (None, 0);
    while start.elapsed() < time {
        let begin = micros(SystemTime::now())?;
        if endpoint(to).with_context(|| format!("connect to {to}"))? == 1 {
            if last.is_none() {
                println!("{REACHED}");
            }
            (last, missed) = (Some(begin), 0);
            continue;
        }
        missed += 1;
        if missed == GONE
            && let Some(last) = last.take()
        {
            println!("{last}");
        }
    }
    Ok(())
}

/// Microseconds since 1970.
///
/// # Errors
/// The clock is older than that.
pub fn micros(at: SystemTime) -> Result<u64> {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).context("a clock before 1970")?;
    Ok(u64::try_from(since.as_micros())?)
}

/// The last number of the address of an endpoint.
fn endpoint(to: SocketAddr) -> io::Result<u8> {
    let mut stream = connect(to)?;
    let mut number = [0];
    stream.write_all(&number)?;
    stream.read_exact(&mut number)?;
    reset(stream)?;
    Ok(number[0])
}

/// Answers TCP on this port, and names endpoints on the next one; says `ready`, and does not return.
/// Datagrams are answered at one endpoint: with a socket of all endpoints the kernel would answer
/// from another address.
///
/// # Errors
/// A port is taken.
pub fn serve(port: u16, datagrams: Ipv4Addr) -> Result<()> {
    let [answers, names] = [listen(port)?, listen(port + 1)?];
    let echo = UdpSocket::bind((datagrams, port))?;
    thread::scope(|scope| {
        scope.spawn(|| accept(&answers, answer));
        scope.spawn(|| accept(&names, name));
        scope.spawn(|| answer_bursts(&echo, 1));
        println!("ready");
        io::stdout().flush()
    })?;
    Ok(())
}

fn name(mut stream: TcpStream) -> io::Result<()> {
    let last = match stream.local_addr()?.ip() {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(ip) => ip.octets()[15],
    };
    while stream.read(&mut [0])? == 1 {
        stream.write_all(&[last])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_work_is_answered() {
        // Two ports in a row that are most likely free.
        let port = 30_000 + (std::process::id() % 10_000) as u16;
        thread::spawn(move || serve(port, Ipv4Addr::LOCALHOST));
        let to = SocketAddr::from(([127, 0, 0, 1], port));
        let start = Instant::now();
        while TcpStream::connect((to.ip(), port + 1)).is_err() {
            assert!(start.elapsed() < PATIENCE, "the server does not listen on {port}");
        }
        for (work, flows) in
            [(Work::Open, 1), (Work::Exchange, 1), (Work::Flows, 1), (Work::Flows, 5)]
        {
            let said = run(work, to, 40, flows).expect("an answer");
            let sample: Sample = serde_json::from_str(&said).expect("a sample");
            assert!(sample.p50_us > 0.0 && sample.p99_us >= sample.p50_us, "{work:?}: {sample:?}");
        }
        let names = SocketAddr::new(to.ip(), port + 1);
        assert_eq!(run(Work::Endpoints, names, 3, 1).expect("an answer"), "[1]");
        assert_eq!(run(Work::Watch, names, 20, 1).expect("an answer"), "null");
    }
}
