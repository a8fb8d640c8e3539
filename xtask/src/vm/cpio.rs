//! Archives in the form that the kernel unpacks an initramfs from ("newc" of cpio(5)).

use std::collections::BTreeSet;
use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive that is being written.
pub(crate) struct Archive<W: Write> {
    out: W,
    entries: u32,
    directories: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, entries: 0, directories: BTreeSet::new() }
    }

    /// Adds a file that may be run, and the directories above it.
    pub(crate) fn file(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        self.directories_of(path)?;
        self.entry(path, PROGRAM, (0, 0), content)
    }

    /// Adds a character device, and the directories above it.
    pub(crate) fn device(&mut self, path: &str, number: (u32, u32)) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        self.directories_of(path)?;
        self.entry(path, CHARACTER_DEVICE, number, &[])
    }

    /// Ends the archive; another one may follow it in the same file.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()
    }

    fn directories_of(&mut self, path: &str) -> io::Result<()> {
        for (at, _) in path.match_indices('/') {
            if self.directories.insert(path[..at].to_owned()) {
                self.entry(&path[..at], DIRECTORY, (0, 0), &[])?;
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        (major, minor): (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let name_size = name.len() as u32 + 1;
        // Number, mode, user, group, links, time, size, device, device's number, name, sum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0];
        let mut header = String::from("070701");
        fields.iter().for_each(|field| header.push_str(&format!("{field:08X}")));
        header.push_str(name);
        header.push('\0');
        self.padded(header.as_bytes())?;
        self.padded(content)
    }

    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        let padding = bytes.len().next_multiple_of(4) - bytes.len();
        self.out.write_all(bytes)?;
        self.out.write_all(&[0; 3][..padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_begin_at_multiples_of_four_below_their_directories() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        archive.file("/a/bc/d", b"hello").expect("a vector takes it");
        archive.file("/a/e", b"").expect("a vector takes it");
        archive.finish().expect("a vector takes it");
        let text = String::from_utf8_lossy(&bytes);
        let starts: Vec<usize> = text.match_indices("070701").map(|(at, _)| at).collect();
        assert!(starts.iter().all(|at| at % 4 == 0), "{starts:?}");
        let name = |at: &usize| text[at + 110..].split('\0').next().map(str::to_owned);
        let names: Vec<_> = starts.iter().filter_map(name).collect();
        assert_eq!(names, ["a", "a/bc", "a/bc/d", "a/e", "TRAILER!!!"]);
        assert_eq!(bytes.len() % 4, 0);
    }
}
