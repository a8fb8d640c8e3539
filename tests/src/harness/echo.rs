//! What servers and clients of a test say to each other, and to the test.
//!
//! A server tells every client its own name and the client address that it saw: that is all a
//! test of a load balancer needs to know. The program `lb-echo` is a command line over this
//! module. It is no benchmark: a rate is bounded, a latency is only an indication.

pub mod bulk;
pub mod crowd;
pub mod load;
pub mod probe;
pub mod repl;
pub mod serve;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

/// What a server sends first on a TCP connection (one line of JSON), and before the payload in
/// every UDP answer.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Greeting {
    /// The name that the server was started with, the pod's as a rule.
    pub name: String,
    /// The client as the server sees it; a v4-mapped address is written as IPv4.
    pub client_address: IpAddr,
    /// The client's port as the server sees it.
    pub client_port: u16,
    /// The address and port that the client's packets arrived at.
    pub local_address: SocketAddr,
}

impl Greeting {
    fn new(name: &str, client: SocketAddr, local: SocketAddr) -> Self {
        Self {
            name: name.to_owned(),
            client_address: client.ip().to_canonical(),
            client_port: client.port(),
            local_address: canonical(local),
        }
    }
}

/// TCP or UDP.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// A TCP connection.
    #[default]
    Tcp,
    /// UDP datagrams.
    Udp,
}

/// One question of a client: who answers at this address?
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Probe {
    /// Where to.
    pub to: SocketAddr,
    /// By which protocol.
    pub transport: Transport,
    /// How long connecting, and each answer, may take, in milliseconds.
    pub timeout_ms: u64,
    /// Reach an IPv4 address from an IPv6 socket, as `::ffff:a.b.c.d`.
    pub v4_mapped: bool,
    /// The client's port; 0 leaves the choice to the kernel.
    pub source_port: u16,
    /// UDP: connect() the socket and send(), instead of sendto() on an unconnected one.
    pub connected: bool,
    /// TCP: end the connection with RST instead of FIN.
    pub reset: bool,
    /// What is sent and must come back; no line feed in it, at most 64 KiB for TCP.
    pub payload: String,
}

impl Probe {
    /// A TCP connection to `to`, with a timeout of one second.
    pub fn tcp(to: SocketAddr) -> Self {
        Self {
            to,
            transport: Transport::Tcp,
            timeout_ms: 1000,
            v4_mapped: false,
            source_port: 0,
            connected: false,
            reset: false,
            payload: "ping".to_owned(),
        }
    }

    /// A datagram from an unconnected socket to `to`, with a timeout of one second.
    pub fn udp(to: SocketAddr) -> Self {
        Self { transport: Transport::Udp, ..Self::tcp(to) }
    }

    /// By `transport`, otherwise as [`Probe::tcp`].
    pub fn new(transport: Transport, to: SocketAddr) -> Self {
        Self { transport, ..Self::tcp(to) }
    }

    /// Waits this long instead.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self
    }

    /// From an IPv6 socket although the address is IPv4.
    #[must_use]
    pub fn v4_mapped(mut self) -> Self {
        self.v4_mapped = true;
        self
    }

    /// From this port.
    #[must_use]
    pub fn source_port(mut self, port: u16) -> Self {
        self.source_port = port;
        self
    }

    /// From a connected UDP socket.
    #[must_use]
    pub fn connected(mut self) -> Self {
        self.connected = true;
        self
    }

    /// Ends a TCP connection with RST, which frees its source port at once.
    #[must_use]
    pub fn reset(mut self) -> Self {
        self.reset = true;
        self
    }

    /// Sends this instead of `ping`.
    #[must_use]
    pub fn payload(mut self, payload: impl Into<String>) -> Self {
        self.payload = payload.into();
        self
    }
}

/// What a client got for its [`Probe`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Answer {
    /// A server answered.
    Reached(Reached),
    /// None did.
    Failed(Failed),
}

impl Answer {
    /// The answer of a server, or `None` where the probe failed.
    pub fn reached(&self) -> Option<&Reached> {
        match self {
            Self::Reached(reached) => Some(reached),
            Self::Failed(_) => None,
        }
    }

    /// The name of the server that answered.
    pub fn name(&self) -> Option<&str> {
        self.reached().map(|reached| reached.greeting.name.as_str())
    }

    /// The client address that the server saw.
    pub fn client_address(&self) -> Option<IpAddr> {
        self.reached().map(|reached| reached.greeting.client_address)
    }

    /// The error's name (see [`Failed`]), or `None` where a server answered.
    pub fn error(&self) -> Option<&str> {
        match self {
            Self::Reached(_) => None,
            Self::Failed(failed) => Some(&failed.error),
        }
    }
}

/// A server answered, and the payload came back unchanged.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Reached {
    /// What the server said.
    #[serde(flatten)]
    pub greeting: Greeting,
    /// TCP and connected UDP: getpeername(). Unconnected UDP: the source of the answer. As the
    /// socket sees it, so v4-mapped for a v4-mapped probe.
    pub peer: SocketAddr,
    /// getsockname() of the client.
    pub source: SocketAddr,
    /// From the start of connect() to the end of the answer.
    pub elapsed_ms: f64,
}

/// Nobody answered.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Failed {
    /// The name of the errno (`ECONNREFUSED`), or `timeout`, `eof`, `corrupt`.
    pub error: String,
    /// From the start of connect() to the error.
    pub elapsed_ms: f64,
}

/// An address as IPv4 where it is a v4-mapped one.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The name that [`Failed`] gives to an error.
fn error_name(error: &io::Error) -> String {
    let Some(number) = error.raw_os_error() else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof => "eof".to_owned(),
            io::ErrorKind::InvalidData => "corrupt".to_owned(),
            kind => format!("{kind:?}"),
        };
    };
    match Errno::from_raw(number) {
        // The first is connect() past SO_SNDTIMEO, the second any other call past its timeout.
        Errno::EINPROGRESS | Errno::EAGAIN => "timeout".to_owned(),
        errno => format!("{errno:?}"),
    }
}
