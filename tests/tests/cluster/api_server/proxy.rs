//! A proxy, HTTP and SOCKS 5 on one port, that counts the tunnels that it opens.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Result;
use lb_tests::harness::netns::topology::namespace::Netns;
use nix::sched::{CloneFlags, setns};

/// The version by which a request of SOCKS begins (RFC 1928).
const SOCKS: u8 = 5;

/// A proxy in a namespace. It ends when it is dropped.
pub(super) struct Proxy {
    opened: Arc<AtomicUsize>,
    ends: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Proxy {
    pub(super) fn start(netns: &Netns, address: SocketAddr) -> Result<Self> {
        let listener = netns.run(|| Ok(TcpListener::bind(address)?))?;
        listener.set_nonblocking(true)?;
        let namespace = File::open(netns.path())?;
        let (opened, ends) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let (count, flag) = (Arc::clone(&opened), Arc::clone(&ends));
        let server = thread::spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).expect("the namespace is there");
            while !flag.load(Ordering::Relaxed) {
                let Ok((client, _)) = listener.accept() else {
                    thread::sleep(Duration::from_millis(5));
                    continue;
                };
                let count = Arc::clone(&count);
                thread::spawn(move || tunnel(client, &count).ok());
            }
        });
        Ok(Self { opened, ends, server: Some(server) })
    }

    /// How many tunnels were opened since the last call.
    pub(super) fn take(&self) -> usize {
        self.opened.swap(0, Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(server) = self.server.take() {
            server.join().ok();
        }
    }
}

/// Serves one request for a tunnel. Ends with either side.
fn tunnel(mut client: TcpStream, count: &AtomicUsize) -> io::Result<()> {
    client.set_nonblocking(false)?;
    let mut first = [0];
    client.read_exact(&mut first)?;
    let server = if first == [SOCKS] { by_socks(&mut client)? } else { by_http(&mut client)? };
    count.fetch_add(1, Ordering::Relaxed);
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    let up = thread::spawn(move || {
        io::copy(&mut from_client, &mut to_server).ok();
        to_server.shutdown(std::net::Shutdown::Both).ok();
    });
    let (mut from_server, mut to_client) = (server, client);
    io::copy(&mut from_server, &mut to_client).ok();
    to_client.shutdown(std::net::Shutdown::Both).ok();
    up.join().ok();
    Ok(())
}

/// Connects by `CONNECT`, whose first letter is read already.
fn by_http(client: &mut TcpStream) -> io::Result<TcpStream> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        head.extend(byte);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let mut words = head.split(' ');
    let (Some("ONNECT"), Some(target)) = (words.next(), words.next()) else {
        client.write_all(b"HTTP/1.1 405 Method Not Allowed\r\n\r\n")?;
        return Err(io::ErrorKind::Unsupported.into());
    };
    let server = TcpStream::connect(target)?;
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
    Ok(server)
}

/// Connects to an IPv4 address without authentication, by RFC 1928. The version is read already.
fn by_socks(client: &mut TcpStream) -> io::Result<TcpStream> {
    let mut count = [0];
    client.read_exact(&mut count)?;
    client.read_exact(&mut vec![0; count[0].into()])?;
    client.write_all(&[SOCKS, 0])?;
    let mut request = [0; 10];
    client.read_exact(&mut request)?;
    let [SOCKS, 1, 0, 1, a, b, c, d, high, low] = request else {
        return Err(io::ErrorKind::Unsupported.into());
    };
    let server = TcpStream::connect((Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([high, low])))?;
    client.write_all(&[SOCKS, 0, 0, 1, 0, 0, 0, 0, 0, 0])?;
    Ok(server)
}
