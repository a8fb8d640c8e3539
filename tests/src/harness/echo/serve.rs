//! The server's side: dual stack TCP, UDP and HTTP servers that say which client they saw.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
    SockaddrIn6, SockaddrStorage, bind, listen, recvmsg, sendmsg, setsockopt, socket, sockopt,
};

use super::{Greeting, bulk, crowd};

/// A connection without a byte for this long is closed, so that no test leaves threads behind
/// for long.
const IDLE: Duration = Duration::from_secs(300);

/// Which servers to run; each port is optional.
#[derive(Clone, Debug, Default)]
pub struct Servers {
    /// What they say their name is.
    pub name: String,
    /// Greets, then echoes until the client's end.
    pub tcp: Vec<u16>,
    /// Answers every datagram with the greeting, a line feed and the payload.
    pub udp: Vec<u16>,
    /// As `tcp`, for tens of thousands of clients: one thread for all of them, and a port
    /// that other processes may serve too.
    pub crowd: Vec<u16>,
    /// Greets, then sends or takes as many bytes as it is asked to; see [`super::bulk`].
    pub bulk: Vec<u16>,
    /// Answers any request with `client_address=…` and `name=…` lines.
    pub http: Vec<u16>,
}

impl Servers {
    /// Binds all ports on all addresses, calls `ready`, and serves for ever.
    ///
    /// # Errors
    /// A port that cannot be bound.
    pub fn run(self, ready: impl FnOnce()) -> io::Result<()> {
        let name: Arc<str> = self.name.into();
        let mut threads = Vec::new();
        for port in self.tcp {
            let (listener, name) =
                (TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?, name.clone());
            threads.push(thread::spawn(move || accept(&listener, &name, echo)));
        }
        for port in self.bulk {
            let (listener, name) =
                (TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?, name.clone());
            threads.push(thread::spawn(move || accept(&listener, &name, bulk::serve)));
        }
        for port in self.crowd {
            let crowd = Crowd::new(shared_listener(port)?, name.clone())?;
            threads.push(thread::spawn(move || crowd.run()));
        }
        for port in self.http {
            let (listener, name) =
                (TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?, name.clone());
            threads.push(thread::spawn(move || accept(&listener, &name, http)));
        }
        for port in self.udp {
            let (socket, name) = (UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))?, name.clone());
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
            threads.push(thread::spawn(move || datagrams(&socket, port, &name)));
        }
        ready();
        for thread in threads {
            if thread.join().is_err() {
                return Err(io::Error::other("a server thread panicked"));
            }
        }
        Ok(())
    }
}

fn accept(listener: &TcpListener, name: &Arc<str>, answer: fn(TcpStream, &str) -> io::Result<()>) {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                let name = name.clone();
                // A client that goes away is no failure of the server.
                thread::spawn(move || answer(stream, &name).ok());
            }
            Err(error) => eprintln!("accept: {error}"),
        }
    }
}

fn greet(stream: &TcpStream, name: &str) -> io::Result<Greeting> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(IDLE))?;
    Ok(Greeting::new(name, stream.peer_addr()?, stream.local_addr()?))
}

pub(super) fn greet_in_a_line(mut stream: &TcpStream, name: &str) -> io::Result<()> {
    let mut first = serde_json::to_string(&greet(stream, name)?)?;
    first.push('\n');
    stream.write_all(first.as_bytes())
}

fn echo(mut stream: TcpStream, name: &str) -> io::Result<()> {
    greet_in_a_line(&stream, name)?;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..length])?;
    }
}

/// A listener beside those of other processes on the same port.
fn shared_listener(port: u16) -> io::Result<TcpListener> {
    let fd = socket(AddressFamily::Inet6, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    setsockopt(&fd, sockopt::ReusePort, &true)?;
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    bind(fd.as_raw_fd(), &SockaddrStorage::from(any))?;
    listen(&fd, Backlog::MAXCONN)?;
    Ok(fd.into())
}

/// Clients whose sockets one thread watches.
struct Crowd {
    listener: TcpListener,
    name: Arc<str>,
    clients: HashMap<u64, TcpStream>,
    epoll: Epoll,
}

impl Crowd {
    /// What stands for the listener among the watched, which else are known by descriptor.
    const LISTENER: u64 = u64::MAX;

    fn new(listener: TcpListener, name: Arc<str>) -> io::Result<Self> {
        crowd::allow_files(crowd::SHARE)?;
        listener.set_nonblocking(true)?;
        let epoll = Epoll::new(EpollCreateFlags::empty())?;
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, Self::LISTENER))?;
        Ok(Self { listener, name, clients: HashMap::new(), epoll })
    }

    fn run(mut self) {
        let mut events = [EpollEvent::empty(); 256];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(error) => return eprintln!("epoll: {error}"),
            };
            for event in &events[..count] {
                match event.data() {
                    Self::LISTENER => self.accept(),
                    client => self.echo(client),
                }
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            let client = stream.as_raw_fd() as u64;
            let watch = EpollEvent::new(EpollFlags::EPOLLIN, client);
            let watched = greet_in_a_line(&stream, &self.name)
                .and_then(|()| Ok(self.epoll.add(&stream, watch)?));
            match watched {
                Ok(()) => drop(self.clients.insert(client, stream)),
                Err(error) => eprintln!("a client of many: {error}"),
            }
        }
    }

    fn echo(&mut self, client: u64) {
        let Some(mut stream) = self.clients.get(&client) else { return };
        let mut buffer = [0; 4096];
        let echoed = stream
            .read(&mut buffer)
            .and_then(|length| stream.write_all(&buffer[..length]).map(|()| length));
        // Closing it ends the watch.
        if !matches!(echoed, Ok(1..)) {
            self.clients.remove(&client);
        }
    }
}

fn http(stream: TcpStream, name: &str) -> io::Result<()> {
    let greeting = greet(&stream, name)?;
    let mut reader = BufReader::new(&stream).take(64 * 1024);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let body = format!(
        "name={}\nclient_address={}\nclient_port={}\nlocal_address={}\n",
        greeting.name, greeting.client_address, greeting.client_port, greeting.local_address
    );
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    (&stream).write_all(format!("{head}{body}").as_bytes())
}

/// Answers from the address that the question was sent to, as a wildcard socket does not do by
/// itself on a node with several addresses.
fn datagrams(socket: &UdpSocket, port: u16, name: &str) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        if let Err(error) = datagram(socket, port, name, &mut buffer) {
            // An ICMP error about an earlier answer ends up here too.
            eprintln!("udp port {port}: {error}");
        }
    }
}

fn datagram(socket: &UdpSocket, port: u16, name: &str, buffer: &mut [u8]) -> io::Result<()> {
    let mut control = nix::cmsg_space!(libc::in6_pktinfo);
    let (length, from, info) = {
        let mut parts = [IoSliceMut::new(buffer)];
        let message = recvmsg::<SockaddrIn6>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut control),
            MsgFlags::empty(),
        )?;
        let info = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::Ipv6PacketInfo(info) => Some(info),
            _ => None,
        });
        (message.bytes, message.address, info)
    };
    let (Some(from), Some(mut info)) = (from, info) else {
        return Err(io::Error::other("a datagram without source or destination"));
    };
    let local = SocketAddr::new(Ipv6Addr::from(info.ipi6_addr.s6_addr).into(), port);
    let greeting = Greeting::new(name, SocketAddrV6::from(from).into(), local);
    let mut answer = serde_json::to_vec(&greeting)?;
    answer.push(b'\n');
    answer.extend_from_slice(&buffer[..length]);
    info.ipi6_ifindex = 0;
    sendmsg(
        socket.as_raw_fd(),
        &[IoSlice::new(&answer)],
        &[ControlMessage::Ipv6PacketInfo(&info)],
        MsgFlags::empty(),
        Some(&from),
    )?;
    Ok(())
}
