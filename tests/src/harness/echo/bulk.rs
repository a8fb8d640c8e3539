//! Downloads and uploads of which every byte is known: who asks names a length and a seed.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::probe::Channel;
use super::{Probe, error_name};

/// The length of what is repeated: a prime, so that no byte of a segment that is lost, twice
/// there or another connection's is the one that belongs in its place.
const BLOCK: usize = 65_521;

/// Which end sends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Direction {
    /// The server.
    Down,
    /// The client; the server says at the end that every byte was right.
    Up,
}

impl Direction {
    /// What it is called in a request.
    fn word(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Up => "up",
        }
    }
}

/// What a server says after an upload.
const RIGHT: &str = "right\n";

/// What became of parallel transfers.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Report {
    /// Those that are complete and right to the last byte.
    pub ok: u64,
    /// The others by error; `corrupt` is a wrong byte, `eof` too few.
    pub failed: BTreeMap<String, u64>,
    /// How many bytes were right.
    pub bytes: u64,
    /// How long all took.
    pub seconds: f64,
}

/// Does what each of the client's lines asks for.
///
/// # Errors
/// A client that goes away, or says or sends something else.
pub(super) fn serve(stream: TcpStream, name: &str) -> io::Result<()> {
    super::serve::greet_in_a_line(&stream, name)?;
    let mut reader = BufReader::new(&stream);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        let mut words = line.split_whitespace();
        let direction = words.next();
        let mut numbers = words.map(str::parse::<u64>);
        let (Some(Ok(length)), Some(Ok(seed))) = (numbers.next(), numbers.next()) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        if direction == Some(Direction::Up.word()) {
            receive(&mut reader, length, seed, &mut 0)?;
            (&stream).write_all(RIGHT.as_bytes())?;
        } else {
            send(&mut &stream, length, seed, &mut 0)?;
        }
        line.clear();
    }
    Ok(())
}

/// Sends what this seed makes; `done` counts the bytes.
fn send(to: &mut impl Write, length: u64, seed: u64, done: &mut u64) -> io::Result<()> {
    let block = block(seed);
    while *done < length {
        let part = (length - *done).min(BLOCK as u64);
        to.write_all(&block[..part as usize])?;
        *done += part;
    }
    Ok(())
}

/// Receives what this seed makes, and nothing else; `done` counts the bytes.
fn receive(from: &mut impl Read, length: u64, seed: u64, done: &mut u64) -> io::Result<()> {
    let expected = block(seed);
    let mut buffer = vec![0; BLOCK];
    while *done < length {
        let part = (length - *done).min(BLOCK as u64) as usize;
        from.read_exact(&mut buffer[..part])?;
        if buffer[..part] != expected[..part] {
            return Err(io::ErrorKind::InvalidData.into());
        }
        *done += part as u64;
    }
    Ok(())
}

/// Sends `length` bytes on each of `count` connections at once.
pub fn transfer(probe: &Probe, direction: Direction, count: u64, length: u64) -> Report {
    let start = Instant::now();
    let one = |seed| {
        let mut done = 0;
        let result = Transfer { probe, direction, length, seed }.run(&mut done);
        (done, result)
    };
    let mut report = Report::default();
    thread::scope(|scope| {
        let all: Vec<_> = (0..count).map(|seed| scope.spawn(move || one(seed))).collect();
        for thread in all {
            let (done, result) = thread.join().unwrap_or((0, Err(io::Error::other("panic"))));
            report.bytes += done;
            match result {
                Ok(()) => report.ok += 1,
                Err(error) => *report.failed.entry(error_name(&error)).or_default() += 1,
            }
        }
    });
    report.seconds = start.elapsed().as_secs_f64();
    report
}

struct Transfer<'a> {
    probe: &'a Probe,
    direction: Direction,
    length: u64,
    seed: u64,
}

impl Transfer<'_> {
    fn run(&self, done: &mut u64) -> io::Result<()> {
        let Channel::Tcp { mut stream, .. } = Channel::open(self.probe)? else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let patience = Some(Duration::from_secs(20));
        stream.get_ref().set_read_timeout(patience)?;
        stream.get_ref().set_write_timeout(patience)?;
        let Self { direction, length, seed, .. } = *self;
        let request = format!("{} {length} {seed}\n", direction.word());
        stream.get_mut().write_all(request.as_bytes())?;
        if direction == Direction::Down {
            return receive(&mut stream, length, seed, done);
        }
        send(stream.get_mut(), length, seed, done)?;
        let mut said = String::new();
        stream.read_line(&mut said)?;
        if said == RIGHT { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// Bytes that another seed does not make (xorshift64).
fn block(seed: u64) -> Vec<u8> {
    let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut block = Vec::with_capacity(BLOCK + 8);
    while block.len() < BLOCK {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        block.extend_from_slice(&state.to_le_bytes());
    }
    block.truncate(BLOCK);
    block
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    #[test]
    fn a_transfer_is_right_to_the_last_byte_or_is_told_to_be_wrong() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let to = listener.local_addr().expect("its address");
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || serve(stream, "one"));
            }
        });
        for direction in [Direction::Down, Direction::Up] {
            let report = transfer(&Probe::tcp(to), direction, 3, 200_000);
            assert_eq!((report.ok, report.bytes), (3, 600_000), "{direction:?}: {report:?}");
        }
        assert_ne!(block(1), block(2));
        let wrong = receive(&mut &block(1)[..], 100, 2, &mut 0);
        assert_eq!(wrong.expect_err("another seed").kind(), io::ErrorKind::InvalidData);
        let nowhere = Probe::tcp((Ipv4Addr::LOCALHOST, 1).into());
        let none = transfer(&nowhere, Direction::Down, 2, 1);
        assert_eq!(none.failed.get("ECONNREFUSED"), Some(&2), "{none:?}");
    }
}
