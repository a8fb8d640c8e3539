//! What commands print to stdout.
//!
//! Invariant: a command does the same, and ends with the same status, whether or not somebody reads
//! what it prints. Once the reader is gone (`lb-agent get services | head -1`), the rest is dropped
//! in silence, where `println!` would panic.

use std::{
    fmt,
    io::{self, StdoutLock, Write},
};

/// Stdout, for all that a command prints.
pub fn stdout() -> Unread<StdoutLock<'static>> {
    Unread(io::stdout().lock())
}

/// Prints a line.
///
/// # Errors
/// Those of the file that stdout is, such as a full disk. A reader that is gone is none.
pub fn line(text: impl fmt::Display) -> io::Result<()> {
    let mut stdout = stdout();
    writeln!(stdout, "{text}")?;
    stdout.flush()
}

/// A writer that drops what nobody reads.
#[derive(Debug)]
pub struct Unread<W>(W);

impl<W: Write> Write for Unread<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(bytes.len()),
            result => result,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.0.flush() {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::pipe};

    use super::*;

    #[test]
    fn what_nobody_reads_is_dropped_and_a_full_disk_is_an_error() {
        let (reader, writer) = pipe().expect("a pipe");
        drop(reader);
        let mut unread = Unread(writer);
        unread.write_all(&[b'x'; 100_000]).expect("it is dropped");
        unread.flush().expect("nothing is left");
        let full = File::options().write(true).open("/dev/full").expect("the device");
        let error = Unread(full).write_all(b"x").expect_err("it is full");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
