//! The server's side: dual stack TCP, UDP and HTTP servers that say which client they saw.

use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn6, recvmsg, sendmsg, setsockopt,
    sockopt,
};

use super::Greeting;

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

fn echo(mut stream: TcpStream, name: &str) -> io::Result<()> {
    let mut first = serde_json::to_string(&greet(&stream, name)?)?;
    first.push('\n');
    stream.write_all(first.as_bytes())?;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..length])?;
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
