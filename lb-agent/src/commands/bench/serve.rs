//! The server of `bench`. The first byte of a connection says what it is for.

use std::{
    convert::Infallible,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use super::bulk;

/// Every further byte is sent back.
pub(super) const ECHO: u8 = b'e';
/// All further bytes are counted, and their number is the answer.
pub(super) const SINK: u8 = b's';
/// A client that says nothing for so long is gone.
const IDLE: Duration = Duration::from_secs(60);

/// Serves every address of this host; does not return.
///
/// # Errors
/// The port is taken.
pub(super) fn serve(port: u16) -> io::Result<Infallible> {
    // Both families, or IPv4 alone where the kernel has no other.
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))?;
    loop {
        accept(&listener);
    }
}

/// Accepts clients until the listener has an error, and serves each in a thread.
pub(super) fn accept(listener: &TcpListener) {
    for client in listener.incoming() {
        let Ok(client) = client else { return thread::sleep(Duration::from_millis(10)) };
        // A client that breaks off has its own error.
        thread::spawn(move || answer(client).ok());
    }
}

fn answer(mut client: TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    client.set_read_timeout(Some(IDLE))?;
    let mut byte = [0];
    client.read_exact(&mut byte)?;
    if byte[0] != SINK {
        while client.read(&mut byte)? == 1 {
            client.write_all(&byte)?;
        }
        return Ok(());
    }
    bulk::receive(client)
}
