//! The client's side: one socket, asked and answered.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::{Answer, Failed, Greeting, Probe, Reached, Transport, error_name};

/// The longest answer to a datagram.
const DATAGRAM: usize = 65_535;

/// An open conversation with a server.
#[derive(Debug)]
pub enum Channel {
    /// A TCP connection and what its server said first.
    Tcp {
        /// The connection.
        stream: BufReader<TcpStream>,
        /// The server's first line.
        greeting: Greeting,
    },
    /// A UDP socket.
    Udp {
        /// The socket.
        socket: UdpSocket,
        /// Where to, v4-mapped if asked for.
        to: SocketAddr,
        /// Whether the socket is connected.
        connected: bool,
    },
}

/// Opens a socket, sends the payload once and closes the socket.
pub fn ask(probe: &Probe) -> Answer {
    open(probe).1
}

/// Opens a socket and sends the payload once. The channel is there when a server answered, and
/// with UDP also when none did, so that one socket can be asked again.
pub fn open(probe: &Probe) -> (Option<Channel>, Answer) {
    let start = Instant::now();
    match Channel::open(probe) {
        Ok(mut channel) => {
            let answer = channel.exchange(&probe.payload, start);
            let keep = answer.reached().is_some() || matches!(channel, Channel::Udp { .. });
            (keep.then_some(channel), answer)
        }
        Err(error) => (None, failed(&error, start)),
    }
}

impl Channel {
    /// Connects, and reads the greeting of a TCP server.
    ///
    /// # Errors
    /// What the socket calls say, `UnexpectedEof` and `InvalidData` for a server that is none of
    /// ours.
    pub fn open(probe: &Probe) -> io::Result<Self> {
        let to = match probe.to.ip() {
            IpAddr::V4(ip) if probe.v4_mapped => {
                SocketAddr::new(ip.to_ipv6_mapped().into(), probe.to.port())
            }
            _ => probe.to,
        };
        let timeout = Duration::from_millis(probe.timeout_ms.max(1));
        match probe.transport {
            Transport::Tcp => Self::open_tcp(probe, to, timeout),
            Transport::Udp => Self::open_udp(probe, to, timeout),
        }
    }

    fn open_tcp(probe: &Probe, to: SocketAddr, timeout: Duration) -> io::Result<Self> {
        let fd = new_socket(SockType::Stream, to, probe.source_port)?;
        let seconds = i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX);
        setsockopt(
            &fd,
            sockopt::SendTimeout,
            &TimeVal::new(seconds, i64::from(timeout.subsec_micros())),
        )?;
        if probe.reset {
            setsockopt(&fd, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
        }
        connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
        let stream = TcpStream::from(fd);
        stream.set_read_timeout(Some(timeout))?;
        stream.set_nodelay(true)?;
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Self::Tcp { stream, greeting: serde_json::from_str(&line)? })
    }

    fn open_udp(probe: &Probe, to: SocketAddr, timeout: Duration) -> io::Result<Self> {
        let fd = new_socket(SockType::Datagram, to, probe.source_port)?;
        if !probe.connected {
            // Without it an unconnected socket never hears of an ICMP error.
            if probe.to.is_ipv4() {
                setsockopt(&fd, sockopt::Ipv4RecvErr, &true)?;
            } else {
                setsockopt(&fd, sockopt::Ipv6RecvErr, &true)?;
            }
        }
        if probe.connected {
            connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
        }
        let socket = UdpSocket::from(fd);
        socket.set_read_timeout(Some(timeout))?;
        Ok(Self::Udp { socket, to, connected: probe.connected })
    }

    /// Sends the payload and waits for it to come back; `start` is when the question began.
    pub fn exchange(&mut self, payload: &str, start: Instant) -> Answer {
        match self.try_exchange(payload) {
            Ok((greeting, peer, source)) => {
                Answer::Reached(Reached { greeting, peer, source, elapsed_ms: elapsed(start) })
            }
            Err(error) => failed(&error, start),
        }
    }

    /// Waits this long for the answers to come.
    ///
    /// # Errors
    /// What setsockopt() says.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        let timeout = Some(timeout.max(Duration::from_millis(1)));
        match self {
            Self::Tcp { stream, .. } => stream.get_ref().set_read_timeout(timeout),
            Self::Udp { socket, .. } => socket.set_read_timeout(timeout),
        }
    }

    fn try_exchange(&mut self, payload: &str) -> io::Result<(Greeting, SocketAddr, SocketAddr)> {
        match self {
            Self::Tcp { stream, greeting } => {
                let line = format!("{payload}\n");
                stream.get_mut().write_all(line.as_bytes())?;
                let mut echo = String::new();
                if stream.read_line(&mut echo)? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                if echo != line {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                let stream = stream.get_ref();
                Ok((greeting.clone(), stream.peer_addr()?, stream.local_addr()?))
            }
            Self::Udp { socket, to, connected } => {
                if *connected {
                    socket.send(payload.as_bytes())?;
                } else {
                    socket.send_to(payload.as_bytes(), *to)?;
                }
                let mut buffer = vec![0; DATAGRAM];
                loop {
                    let (length, from) = socket.recv_from(&mut buffer)?;
                    let (greeting, echo) = split_datagram(&buffer[..length])?;
                    // An answer that came too late for an earlier question.
                    if echo != payload.as_bytes() {
                        continue;
                    }
                    let peer = if *connected { socket.peer_addr()? } else { from };
                    return Ok((greeting, peer, socket.local_addr()?));
                }
            }
        }
    }
}

/// Splits a server's datagram into its greeting and the payload that came back.
///
/// # Errors
/// `InvalidData` for a datagram that is none of ours.
pub(super) fn split_datagram(datagram: &[u8]) -> io::Result<(Greeting, &[u8])> {
    let end = datagram.iter().position(|byte| *byte == b'\n').ok_or(io::ErrorKind::InvalidData)?;
    Ok((serde_json::from_slice(&datagram[..end])?, &datagram[end + 1..]))
}

fn new_socket(kind: SockType, to: SocketAddr, source_port: u16) -> io::Result<OwnedFd> {
    let (family, any) = match to {
        SocketAddr::V4(_) => (AddressFamily::Inet, IpAddr::from([0; 4])),
        SocketAddr::V6(_) => (AddressFamily::Inet6, IpAddr::from([0; 16])),
    };
    let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    if source_port != 0 {
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(any, source_port)))?;
    }
    Ok(fd)
}

fn failed(error: &io::Error, start: Instant) -> Answer {
    Answer::Failed(Failed { error: error_name(error), elapsed_ms: elapsed(start) })
}

fn elapsed(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1000.0
}
