//! Downloads of which every byte is known: who asks names a length and a seed.

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

/// What became of parallel downloads.
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

/// Sends what the client's one line asks for, as often as it asks.
///
/// # Errors
/// A client that goes away, or says something else.
pub(super) fn serve(stream: TcpStream, name: &str) -> io::Result<()> {
    super::serve::greet_in_a_line(&stream, name)?;
    let mut reader = BufReader::new(&stream);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        let mut words = line.split_whitespace().map(str::parse::<u64>);
        let (Some(Ok(mut left)), Some(Ok(seed))) = (words.next(), words.next()) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let block = block(seed);
        while left > 0 {
            let length = left.min(BLOCK as u64);
            (&stream).write_all(&block[..length as usize])?;
            left -= length;
        }
        line.clear();
    }
    Ok(())
}

/// Downloads `length` bytes on each of `count` connections at once.
pub fn download(probe: &Probe, count: u64, length: u64) -> Report {
    let start = Instant::now();
    let one = |seed| {
        let mut done = 0;
        let result = Download { probe, length, seed }.run(&mut done);
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

struct Download<'a> {
    probe: &'a Probe,
    length: u64,
    seed: u64,
}

impl Download<'_> {
    fn run(&self, done: &mut u64) -> io::Result<()> {
        let Channel::Tcp { mut stream, .. } = Channel::open(self.probe)? else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        stream.get_ref().set_read_timeout(Some(Duration::from_secs(20)))?;
        let request = format!("{} {}\n", self.length, self.seed);
        stream.get_mut().write_all(request.as_bytes())?;
        let expected = block(self.seed);
        let mut buffer = vec![0; BLOCK];
        while *done < self.length {
            let length = (self.length - *done).min(BLOCK as u64) as usize;
            stream.read_exact(&mut buffer[..length])?;
            if buffer[..length] != expected[..length] {
                return Err(io::ErrorKind::InvalidData.into());
            }
            *done += length as u64;
        }
        Ok(())
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
    fn a_download_is_right_to_the_last_byte_or_is_told_to_be_wrong() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let to = listener.local_addr().expect("its address");
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || serve(stream, "one"));
            }
        });
        let report = download(&Probe::tcp(to), 3, 200_000);
        assert_eq!((report.ok, report.bytes), (3, 600_000), "{report:?}");
        assert_ne!(block(1), block(2));
        let none = download(&Probe::tcp((Ipv4Addr::LOCALHOST, 1).into()), 2, 1);
        assert_eq!(none.failed.get("ECONNREFUSED"), Some(&2), "{none:?}");
    }
}
