//! First packets of processes of the node, sent by real sockets. The outcome is what leaves by
//! the node's devices, comes back to the socket, or reaches a server of the node itself.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect, getsockname,
    getsockopt, socket, sockopt::SocketError,
};

use super::format::{Flow, Protocol};
use super::outcome::{Outcome, Refusal, Source};
use super::view::View;
use super::world::{EXTERNAL, PODS};
use crate::harness::netns::traffic::capture::{Capture, TCP, UDP};

/// A packet that has not appeared after this time was dropped: the kernel handles it before the
/// call returns, or in the next soft interrupt.
const PATIENCE: Duration = Duration::from_millis(500);

/// Captures the packets that leave the node.
pub(super) struct Wire {
    captures: [Capture; 2],
}

impl Wire {
    pub(super) fn tap() -> Result<Self> {
        Ok(Self { captures: [Capture::here(EXTERNAL)?, Capture::here(PODS)?] })
    }

    /// The first packet of this protocol that has left since the last time.
    fn left(&self, protocol: u8) -> Result<Option<[SocketAddr; 2]>> {
        let mut first = None;
        for capture in &self.captures {
            for frame in capture.take()?.into_iter().filter(|frame| frame.is_outgoing) {
                if let Some((of, ends)) = frame.ends()
                    && of == protocol
                {
                    first = first.or(Some(ends.map(|(ip, port)| SocketAddr::new(ip, port))));
                }
            }
        }
        Ok(first)
    }
}

/// A server of the node. It receives packets that were not translated, or whose endpoint is a
/// process of the node.
struct Server {
    at: SocketAddr,
    socket: Listening,
}

enum Listening {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl Server {
    /// Servers at every address of the node that may receive the first packet of a flow.
    fn all(view: View<'_>, flow: &Flow) -> Result<Vec<Self>> {
        let frontend = SocketAddr::new(flow.dest_ip, flow.dest_port);
        let endpoints = flow.expect.dnat.iter().flatten().copied();
        let all: BTreeSet<SocketAddr> = [frontend].into_iter().chain(endpoints).collect();
        let here = all.into_iter().filter(|at| view.is_of_node(at.ip()));
        here.map(|at| Self::at(at, flow.protocol)).collect()
    }

    fn at(at: SocketAddr, protocol: Protocol) -> Result<Self> {
        let socket = match protocol {
            Protocol::Udp => UdpSocket::bind(at).and_then(|server| {
                server.set_nonblocking(true)?;
                Ok(Listening::Udp(server))
            }),
            Protocol::Tcp | Protocol::Sctp => TcpListener::bind(at).and_then(|server| {
                server.set_nonblocking(true)?;
                Ok(Listening::Tcp(server))
            }),
        };
        Ok(Self { at, socket: socket.with_context(|| format!("cannot listen on {at}"))? })
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Listening::Tcp(server) => server.as_fd(),
            Listening::Udp(server) => server.as_fd(),
        }
    }

    /// Source and destination of a connection or datagram, if one was received.
    fn heard(&self) -> Result<Option<[SocketAddr; 2]>> {
        let result = match &self.socket {
            Listening::Tcp(server) => server.accept().map(|(_, from)| from),
            Listening::Udp(server) => server.recv_from(&mut [0; 16]).map(|(_, from)| from),
        };
        match result {
            Ok(from) => Ok(Some([from, self.at])),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error).context("the server of the node"),
        }
    }
}

/// Sends the first packet of a flow from a process of the node and returns its outcome.
///
/// # Errors
/// The node does not have the address, or a packet has no explanation.
pub(super) fn send(view: View<'_>, wire: &Wire, flow: &Flow) -> Result<Outcome> {
    let (kind, protocol) = match flow.protocol {
        Protocol::Tcp => (SockType::Stream, TCP),
        Protocol::Udp => (SockType::Datagram, UDP),
        Protocol::Sctp => bail!("SCTP from processes of the node cannot be tried"),
    };
    let servers = Server::all(view, flow)?;
    wire.left(protocol)?;
    let (client, source) = bound(flow, kind)?;
    let to = SocketAddr::new(flow.dest_ip, flow.dest_port);
    if let Some(outcome) = call(connect(client.as_raw_fd(), &SockaddrStorage::from(to)))? {
        return Ok(outcome);
    }
    if flow.protocol == Protocol::Udp
        && let Some(outcome) = call(send_to_peer(&client))?
    {
        return Ok(outcome);
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut seen = wire.left(protocol)?;
        for server in &servers {
            seen = seen.or(server.heard()?);
        }
        if let Some([from, gone_to]) = seen {
            return judged(view, to, source, from, gone_to);
        }
        match getsockopt(&client, SocketError)? {
            0 => {}
            error => {
                let outcome = call(Err(Errno::from_raw(error)))?;
                return outcome.context("the socket reports an error that is no outcome");
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Outcome::Dropped);
        }
        wait(wire, &servers, &client, left)?;
    }
}

/// A socket of the flow's sender, bound to a port that the kernel chose.
fn bound(flow: &Flow, kind: SockType) -> Result<(OwnedFd, SocketAddr)> {
    let family = if flow.source_ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let client = socket(family, kind, flags, None).context("cannot make a socket")?;
    let source = SocketAddr::new(flow.source_ip, 0);
    bind(client.as_raw_fd(), &SockaddrStorage::from(source))
        .with_context(|| format!("{} is not an address of this node", flow.source_ip))?;
    let own: SockaddrStorage = getsockname(client.as_raw_fd())?;
    let port = match (own.as_sockaddr_in(), own.as_sockaddr_in6()) {
        (Some(own), _) => own.port(),
        (_, Some(own)) => own.port(),
        _ => bail!("the socket has neither an IPv4 nor an IPv6 address"),
    };
    Ok((client, SocketAddr::new(flow.source_ip, port)))
}

fn send_to_peer(client: &OwnedFd) -> nix::Result<()> {
    nix::sys::socket::send(client.as_raw_fd(), b"first", MsgFlags::empty()).map(drop)
}

/// The outcome of a call that failed; none while the call is in progress.
fn call(result: nix::Result<()>) -> Result<Option<Outcome>> {
    match result {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(None),
        Err(Errno::ECONNREFUSED) => Ok(Some(Outcome::Refused(Refusal::Connection))),
        Err(Errno::EPERM) => Ok(Some(Outcome::Denied)),
        Err(error) => Err(error).context("the call of the client"),
    }
}

/// The outcome of a packet that was captured or received.
fn judged(
    view: View<'_>,
    to: SocketAddr,
    source: SocketAddr,
    from: SocketAddr,
    gone_to: SocketAddr,
) -> Result<Outcome> {
    if gone_to == to {
        ensure!(from == source, "the destination stayed, but {source} became {from}");
        return Ok(Outcome::Untouched);
    }
    let is_node = view.node().local_ips.contains(&from.ip());
    ensure!(is_node, "{gone_to} sees {from}, which is not an address of the node");
    Ok(Outcome::To(gone_to, Source::Node))
}

/// Waits until a capture, a server or the client has something to read.
fn wait(wire: &Wire, servers: &[Server], client: &OwnedFd, time: Duration) -> Result<()> {
    let mut watched: Vec<PollFd<'_>> = wire.captures.iter().map(AsFd::as_fd).map(read).collect();
    watched.extend(servers.iter().map(Server::descriptor).map(read));
    watched.push(PollFd::new(client.as_fd(), PollFlags::POLLERR | PollFlags::POLLIN));
    let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
    match poll(&mut watched, time) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error).context("cannot wait for a packet"),
    }
}

fn read(descriptor: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(descriptor, PollFlags::POLLIN)
}
