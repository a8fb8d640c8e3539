//! Many bytes one way: the receiver counts them, and answers with their number.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpStream},
};

/// The bytes of one read or write.
pub const CHUNK: usize = 128 << 10;

/// Sends `length` bytes, a multiple of that of `chunk`, and waits until the receiver has read all.
///
/// # Errors
/// The connection breaks, or not all arrived.
pub fn send(mut stream: TcpStream, chunk: &[u8], length: usize) -> io::Result<()> {
    for _ in 0..length / chunk.len() {
        stream.write_all(chunk)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut received = [0; 8];
    stream.read_exact(&mut received)?;
    let received = u64::from_be_bytes(received);
    if received != length as u64 {
        return Err(io::Error::other(format!("{received} of {length} bytes arrived")));
    }
    Ok(())
}

/// Reads until the sender has sent all, and answers.
///
/// # Errors
/// The connection breaks.
pub fn receive(mut stream: TcpStream) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut received = 0;
    loop {
        match stream.read(&mut chunk)? {
            0 => return stream.write_all(&u64::to_be_bytes(received)),
            length => received += length as u64,
        }
    }
}
