//! What this process has pinned, and how it pins that again.
//!
//! Whoever may write to a bpffs can remove pins, their directory or the mount. Maps, programs and
//! links outlive that as long as a process has them open. Invariant: what is kept is open.

use std::{
    collections::BTreeMap,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The pins of this process; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Kept(Arc<Mutex<BTreeMap<PathBuf, Pin>>>);

#[derive(Debug)]
struct Pin {
    object: Arc<OwnedFd>,
    /// The file in the bpffs; `None` while there is none.
    file: Option<FileId>,
}

/// Device and inode: a file that another process puts at the same path has another inode.
type FileId = (u64, u64);

impl Pin {
    fn put(&mut self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => lb_sys::obj_pin(self.object.as_fd(), path)?,
        }
        self.file = file_at(path);
        Ok(())
    }

    fn is_at(&self, path: &Path) -> bool {
        self.file.is_some() && self.file == file_at(path)
    }
}

impl Kept {
    /// Keeps an object that is pinned at `path`.
    pub fn keep(&self, path: &Path, object: Arc<OwnedFd>) {
        let pin = Pin { object, file: file_at(path) };
        self.pins().insert(path.to_owned(), pin);
    }

    /// Pins an object at `path`, in place of what is pinned there, and keeps it. If it cannot be
    /// pinned, it is lost until it is [restored](Self::restore).
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn pin(&self, path: &Path, object: Arc<OwnedFd>) -> io::Result<()> {
        let mut pins = self.pins();
        let mut pin = Pin { object, file: None };
        let result = pin.put(path);
        pins.insert(path.to_owned(), pin);
        result
    }

    /// Removes a pin and keeps it no longer. What another process has pinned in its place stays.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn unpin(&self, path: &Path) -> io::Result<()> {
        match self.pins().remove(path) {
            Some(pin) if pin.is_at(path) => fs::remove_file(path),
            _ => Ok(()),
        }
    }

    /// The pins that are not where they were put.
    pub fn lost(&self) -> Vec<PathBuf> {
        let pins = self.pins();
        let lost = pins.iter().filter(|(path, pin)| !pin.is_at(path));
        lost.map(|(path, _)| path.clone()).collect()
    }

    /// Pins again what was pinned at `path`, and makes its directory if that is gone. Nothing if
    /// it is no longer kept.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn restore(&self, path: &Path) -> io::Result<()> {
        let mut pins = self.pins();
        let Some(pin) = pins.get_mut(path) else { return Ok(()) };
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        pin.put(path)
    }

    fn pins(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Pin>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn file_at(path: &Path) -> Option<FileId> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}
