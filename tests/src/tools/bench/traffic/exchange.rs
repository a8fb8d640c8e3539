//! The client and the server of the benchmark, each a process of its own on a processor that the
//! benchmark chooses.
//!
//! Both are plain blocking sockets: one system call after another, so that nothing but the kernel's
//! path between them differs from lane to lane. A turn does a fixed number of operations.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use lb_agent::commands::bench::bulk;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::time::TimeVal;
use serde::{Deserialize, Serialize};

/// What a client does.
#[derive(
    Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Load {
    /// One byte and its answer, again and again on one TCP connection.
    Request,
    /// Connect, one byte, its answer, close.
    Connect,
    /// One datagram and its answer, again and again from one socket.
    Datagram,
    /// Datagrams one way, in bursts of [`BURST`]; the server answers a burst that arrived whole.
    Burst,
    /// Datagrams that are dropped behind the node that forwards them. On one processor a datagram is
    /// there when the call that sends it returns, so the call takes as long as the way there.
    Forward,
    /// [`TRANSFER`] bytes one way on a TCP connection of their own.
    Bulk,
}

/// The datagrams of a burst: few enough for the default receive buffer.
pub const BURST: u64 = 32;
/// The payload of a datagram, bytes.
pub(super) const DATAGRAM: usize = 64;
/// The bytes of one transfer of [`Load::Bulk`].
const TRANSFER: usize = 16 << 20;
/// How long an answer may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);

impl Load {
    /// All, for loops.
    pub const ALL: [Self; 6] =
        [Self::Request, Self::Connect, Self::Datagram, Self::Burst, Self::Forward, Self::Bulk];

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Request => "TCP request/response",
            Self::Connect => "TCP connect-request-close",
            Self::Datagram => "UDP request/response",
            Self::Burst => "UDP one way",
            Self::Forward => "UDP as far as the first node",
            Self::Bulk => "TCP bulk",
        }
    }

    /// How far the port that serves it is from the first port of a server or a Service.
    pub fn port_offset(self) -> u16 {
        match self {
            Self::Request | Self::Connect | Self::Datagram | Self::Forward => 0,
            Self::Burst | Self::Bulk => 1,
        }
    }

    /// The operations of a turn: about 50 ms.
    pub fn operations(self) -> u64 {
        match self {
            Self::Request | Self::Datagram => 2_000,
            Self::Connect => 500,
            Self::Burst => 500,
            Self::Forward => 10_000,
            Self::Bulk => 16,
        }
    }

    /// What one operation moves: connections, requests, datagrams or bytes.
    fn units(self) -> f64 {
        match self {
            Self::Request | Self::Connect | Self::Datagram | Self::Forward => 1.0,
            Self::Burst => BURST as f64,
            Self::Bulk => TRANSFER as f64,
        }
    }
}

/// The result of a turn.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Sample {
    /// The median time of an operation, us.
    pub p50_us: f64,
    /// Its 99th percentile, us.
    pub p99_us: f64,
    /// Requests, connections, datagrams or bytes each second; bytes by the median transfer.
    pub rate: f64,
}

/// Does `operations`, after a twentieth of them to warm up.
///
/// # Errors
/// The server does not answer.
pub fn run(load: Load, to: SocketAddr, operations: u64) -> Result<Sample> {
    let warm_up = operations.div_ceil(20);
    let work = || match load {
        Load::Request => {
            let mut stream = connect(to)?;
            measure(load, warm_up, operations, || ask(&mut stream))
        }
        Load::Connect => measure(load, warm_up, operations, || ask(&mut connect(to)?)),
        Load::Datagram | Load::Burst => {
            let socket = datagrams(to, 0)?;
            let count = if load == Load::Burst { BURST } else { 1 };
            measure(load, warm_up, operations, || burst(&socket, count))
        }
        Load::Forward => {
            let socket = datagrams(to, 0)?;
            measure(load, warm_up, operations, || socket.send(&[0; DATAGRAM]).map(drop))
        }
        Load::Bulk => {
            let chunk = vec![0; bulk::CHUNK];
            measure(load, warm_up, operations, || bulk::send(connect(to)?, &chunk, TRANSFER))
        }
    };
    work().with_context(|| format!("{} to {to}", load.title()))
}

pub(super) fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// A socket on this port, or on one that is free if it is 0.
pub(super) fn datagrams(to: SocketAddr, port: u16) -> io::Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, port))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

pub(super) fn ask(stream: &mut TcpStream) -> io::Result<()> {
    let mut byte = [1];
    stream.write_all(&byte)?;
    stream.read_exact(&mut byte)
}

fn burst(socket: &UdpSocket, count: u64) -> io::Result<()> {
    for _ in 0..count {
        socket.send(&[0; DATAGRAM])?;
    }
    socket.recv(&mut [0; DATAGRAM]).map(drop)
}

fn measure(
    load: Load,
    warm_up: u64,
    operations: u64,
    mut operation: impl FnMut() -> io::Result<()>,
) -> Result<Sample> {
    (0..warm_up).try_for_each(|_| operation())?;
    let mut times = Vec::with_capacity(usize::try_from(operations)?);
    let start = Instant::now();
    let mut last = start;
    for _ in 0..operations {
        operation()?;
        let now = Instant::now();
        times.push((now - last).as_secs_f64() * 1e6);
        last = now;
    }
    let seconds = (last - start).as_secs_f64();
    let sample = summary(&mut times, operations as f64 * load.units() / seconds);
    Ok(match load {
        // A single transfer that other work delays would decide the rate of all.
        Load::Bulk => Sample { rate: load.units() * 1e6 / sample.p50_us, ..sample },
        _ => sample,
    })
}

/// The percentiles of `times`, us.
pub(super) fn summary(times: &mut [f64], rate: f64) -> Sample {
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or_default();
    let [p50_us, p99_us] = [50, 99].map(at);
    Sample { p50_us, p99_us, rate }
}

/// Serves every [`Load`] on this port and the next one, and says `ready`; does not return.
///
/// # Errors
/// A port is taken.
pub fn serve(port: u16) -> Result<()> {
    let second = port + 1;
    let any = Ipv6Addr::UNSPECIFIED;
    let [answers, sink] = [listen(port)?, listen(second)?];
    let [echo, bursts] = [UdpSocket::bind((any, port))?, UdpSocket::bind((any, second))?];
    thread::scope(|scope| {
        scope.spawn(|| accept(&answers, answer));
        scope.spawn(|| accept(&sink, bulk::receive));
        scope.spawn(|| answer_bursts(&echo, 1));
        scope.spawn(|| answer_bursts(&bursts, BURST));
        println!("ready");
        io::stdout().flush()
    })?;
    Ok(())
}

/// A listener for both families. Accepted sockets inherit its timeout, and accept() itself has it.
pub(super) fn listen(port: u16) -> Result<TcpListener> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    setsockopt(&listener, ReceiveTimeout, &TimeVal::new(PATIENCE.as_secs() as i64, 0))?;
    Ok(listener)
}

/// One connection after another: there is one client at a time.
pub(super) fn accept(listener: &TcpListener, serve: fn(TcpStream) -> io::Result<()>) {
    loop {
        if let Ok((stream, _)) = listener.accept() {
            // A client that is gone is the client's matter.
            serve(stream).ok();
        }
    }
}

pub(super) fn answer(mut stream: TcpStream) -> io::Result<()> {
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

/// Answers every `count`th datagram of a client.
pub(super) fn answer_bursts(socket: &UdpSocket, count: u64) {
    let mut received = 0;
    let mut client = None;
    loop {
        let Ok((_, from)) = socket.recv_from(&mut [0; DATAGRAM]) else { continue };
        if client != Some(from) {
            (received, client) = (0, Some(from));
        }
        received += 1;
        if received % count == 0 {
            socket.send_to(&[0], from).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn every_load_is_answered_over_both_families() {
        // Two ports in a row that are most likely free.
        let port = 20_000 + (std::process::id() % 10_000) as u16;
        thread::spawn(move || serve(port));
        let any = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
        let start = Instant::now();
        while TcpStream::connect((any[0], port + 1)).is_err() {
            assert!(start.elapsed() < PATIENCE, "the server does not listen on {port}");
        }
        for (load, address) in Load::ALL.into_iter().flat_map(|load| any.map(|to| (load, to))) {
            let to = SocketAddr::new(address, port + load.port_offset());
            let sample = run(load, to, 40).expect("an answer");
            let is_plausible = sample.p50_us > 0.0 && sample.p99_us >= sample.p50_us;
            assert!(is_plausible && sample.rate > 0.0, "{load:?}: {sample:?}");
        }
    }

    #[test]
    fn a_server_that_is_not_there_is_an_error() {
        let nobody = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        let error = run(Load::Connect, nobody, 1).expect_err("nobody listens");
        assert!(format!("{error:#}").contains("connect-request-close to 127.0.0.1:1"), "{error:#}");
    }
}
