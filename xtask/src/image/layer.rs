//! A layer: files with their places in the image, as a tar archive that is the same bytes whenever
//! it is made from the same content: entries are sorted, belong to root and have no time.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flate2::{Compression, GzBuilder};
use tar::{Builder, EntryType, Header};

use super::elf;

/// The mode of directories that nobody asked for.
const DIRECTORY: u32 = 0o755;

/// What a layer contains, by path in the image.
#[derive(Default)]
pub(crate) struct Layer {
    entries: BTreeMap<String, Entry>,
}

enum Entry {
    Directory { mode: u32 },
    File { content: Content, mode: u32 },
    Link { target: String },
}

enum Content {
    Path(PathBuf),
    Bytes(Vec<u8>),
}

impl Layer {
    /// Adds a file of this machine.
    pub(crate) fn file(&mut self, path: &str, from: impl Into<PathBuf>, mode: u32) -> &mut Self {
        self.add(path, Entry::File { content: Content::Path(from.into()), mode })
    }

    /// Adds a program, its dynamic linker, and every library that one of them needs.
    pub(crate) fn program(&mut self, path: &str, program: &Path) -> Result<&mut Self> {
        let binary =
            fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
        self.libraries(&binary, Path::new("/")).with_context(|| program.display().to_string())?;
        Ok(self.file(path, program, 0o755))
    }

    /// Adds the libraries of this program from `root`, which stands for `/`.
    pub(crate) fn libraries(&mut self, binary: &[u8], root: &Path) -> Result<()> {
        for library in elf::libraries(binary, root)? {
            self.file(&library.path, &library.file, 0o755);
            if let Some(link) = &library.link {
                self.link(link, &library.path);
            }
        }
        Ok(())
    }

    /// Adds a file with this content.
    pub(crate) fn bytes(&mut self, path: &str, bytes: impl Into<Vec<u8>>, mode: u32) -> &mut Self {
        self.add(path, Entry::File { content: Content::Bytes(bytes.into()), mode })
    }

    /// Adds an empty directory. Those above a file or a link are added by themselves.
    pub(crate) fn directory(&mut self, path: &str, mode: u32) -> &mut Self {
        self.add(path, Entry::Directory { mode })
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) -> &mut Self {
        self.add(path, Entry::Link { target: target.to_owned() })
    }

    fn add(&mut self, path: &str, entry: Entry) -> &mut Self {
        self.entries.insert(path.trim_matches('/').to_owned(), entry);
        self
    }

    /// The layer as a tar archive.
    pub(super) fn archive(&self) -> Result<Vec<u8>> {
        let mut archive = Builder::new(Vec::new());
        for (path, entry) in self.with_parents()? {
            append(&mut archive, path, entry)
                .with_context(|| format!("cannot add /{path} to the image"))?;
        }
        archive.into_inner().context("cannot end the archive of a layer")
    }

    /// The entries, and the directories above them.
    fn with_parents(&self) -> Result<BTreeMap<&str, &Entry>> {
        const PARENT: &Entry = &Entry::Directory { mode: DIRECTORY };
        let mut all: BTreeMap<&str, &Entry> = BTreeMap::new();
        for (path, entry) in &self.entries {
            let plain = path.split('/').all(|part| !matches!(part, "" | "." | ".."));
            ensure!(plain, "/{path} is not a plain path of an image");
            for (at, _) in path.match_indices('/') {
                let parent = &path[..at];
                let is_directory =
                    self.entries.get(parent).is_none_or(|at| matches!(at, Entry::Directory { .. }));
                ensure!(is_directory, "/{parent} in the image is no directory, but has /{path}");
                all.entry(parent).or_insert(PARENT);
            }
            all.insert(path, entry);
        }
        Ok(all)
    }
}

fn append(archive: &mut Builder<Vec<u8>>, path: &str, entry: &Entry) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    match entry {
        Entry::Directory { mode } => {
            header.set_entry_type(EntryType::Directory);
            header.set_mode(*mode);
            header.set_size(0);
            archive.append_data(&mut header, format!("{path}/"), &[][..])?;
        }
        Entry::File { content, mode } => {
            let bytes = content.read()?;
            header.set_entry_type(EntryType::Regular);
            header.set_mode(*mode);
            header.set_size(bytes.len() as u64);
            archive.append_data(&mut header, path, &bytes[..])?;
        }
        Entry::Link { target } => {
            header.set_entry_type(EntryType::Symlink);
            header.set_mode(0o777);
            header.set_size(0);
            archive.append_link(&mut header, path, Path::new(target))?;
        }
    }
    Ok(())
}

impl Content {
    fn read(&self) -> Result<std::borrow::Cow<'_, [u8]>> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.into()),
            Self::Path(path) => fs::read(path)
                .map(Into::into)
                .with_context(|| format!("cannot read {}", path.display())),
        }
    }
}

/// Compresses an archive; the header has neither a name nor a time.
pub(super) fn gzip(archive: &[u8]) -> Result<Vec<u8>> {
    let mut out = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    out.write_all(archive).and_then(|()| out.finish()).context("cannot compress a layer")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(archive: &[u8]) -> Vec<(String, u32, u64, u64)> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().expect("an archive");
        let read = entries.map(|entry| {
            let entry = entry.expect("an entry");
            let header = entry.header();
            let name = entry.path().expect("a path").to_string_lossy().into_owned();
            let number = |field: std::io::Result<u64>| field.expect("a number");
            let mode = header.mode().expect("a mode");
            (name, mode, number(header.uid()), number(header.mtime()))
        });
        read.collect()
    }

    #[test]
    fn entries_are_sorted_below_their_directories_and_have_no_owner_and_no_time() {
        let mut layer = Layer::default();
        layer.bytes("/usr/bin/b", *b"2", 0o755).bytes("/usr/a", *b"1", 0o644);
        layer.directory("/tmp", 0o1777).link("/bin/sh", "b");
        let archive = layer.archive().expect("an archive");
        let expected = [
            ("bin/", 0o755),
            ("bin/sh", 0o777),
            ("tmp/", 0o1777),
            ("usr/", 0o755),
            ("usr/a", 0o644),
            ("usr/bin/", 0o755),
            ("usr/bin/b", 0o755),
        ];
        assert_eq!(
            names(&archive),
            expected.map(|(name, mode)| (name.to_owned(), mode, 0, 0)).to_vec()
        );
    }

    #[test]
    fn a_layer_does_not_depend_on_the_age_of_files_or_the_order_of_calls() {
        let dir = tempfile::tempdir().expect("a directory");
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&a, "same").expect("a file");
        let mut first = Layer::default();
        first.file("/x", &a, 0o644).bytes("/y", *b"", 0o600);
        let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        fs::write(&b, "same").expect("a file");
        let file = fs::File::open(&b).expect("a file");
        file.set_modified(old).expect("a time");
        let mut second = Layer::default();
        second.bytes("/y", *b"", 0o600).file("/x", &b, 0o644);
        let pack = |layer: &Layer| gzip(&layer.archive().expect("an archive")).expect("bytes");
        assert_eq!(pack(&first), pack(&second));
    }

    #[test]
    fn a_file_in_the_place_of_a_directory_and_paths_that_climb_are_errors() {
        let error = |build: &dyn Fn(&mut Layer)| {
            let mut layer = Layer::default();
            build(&mut layer);
            layer.archive().map_or_else(|error| format!("{error:#}"), |_| "no error".to_owned())
        };
        let below = error(&|layer| {
            layer.bytes("/a", *b"", 0o644).bytes("/a/b", *b"", 0o644);
        });
        assert_eq!(below, "/a in the image is no directory, but has /a/b");
        let climbs = error(&|layer| {
            layer.bytes("/a/../b", *b"", 0o644);
        });
        assert_eq!(climbs, "/a/../b is not a plain path of an image");
        let absent = error(&|layer| {
            layer.file("/a", "/nowhere/at/all", 0o644);
        });
        assert!(absent.contains("cannot read /nowhere/at/all"), "{absent}");
    }
}
