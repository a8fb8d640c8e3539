//! A directory of manifests as a source of events.
//!
//! Every `*.yaml`, `*.yml` and `*.json` below the directory is read, through symbolic links to
//! files too. Hidden files, backup files of editors and links to directories are skipped. The
//! directory itself may be replaced by another; while it is missing, its objects stay.
//! Invariant: a file that becomes invalid changes nothing until it is valid again or deleted.

pub mod parse;
mod store;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    time::{Duration, Instant},
};

use lb_control::model::event::{Object, ObjectEvent, ObjectKind};
use notify::{
    RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, CreateKind, EventKind, ModifyKind},
};
use tokio::sync::mpsc::Sender;

use super::admit::admit;

use parse::{Format, Located};
use store::{Content, Store};

/// How long a file that is written to, but not closed, must rest before it is read.
const REST: Duration = Duration::from_millis(50);

/// A file that became invalid, or lost an object, is read again after this time, because the
/// first read may have seen it half written.
const SECOND_LOOK: Duration = Duration::from_millis(4);

/// How often it is checked that the directory is the one that is watched: where it is mounted, or
/// where a directory above it is replaced, there is no notification.
const IDENTITY: Duration = Duration::from_secs(2);

/// Why a directory cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be read at start-up.
    #[error("cannot read the manifests in {}: give --manifests a directory that exists", dir.display())]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// inotify failed.
    #[error("cannot watch {} for changes", dir.display())]
    Notify {
        /// The directory.
        dir: PathBuf,
        /// The reason.
        source: notify::Error,
    },
    /// The thread that reads the files ended.
    #[error("the reader of the manifests in {} ended", dir.display())]
    Reader {
        /// The directory.
        dir: PathBuf,
        /// The reason.
        source: tokio::task::JoinError,
    },
}

/// What is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestError {
    /// The file, relative to the directory; the directory itself if that is missing.
    pub file: PathBuf,
    /// The line, from 1, if known.
    pub line: Option<u64>,
    /// The path of the field, such as `spec.ports[0].port`; empty if there is none.
    pub field: String,
    /// What is wrong there.
    pub message: String,
}

impl fmt::Display for ManifestError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(formatter, ":{line}")?;
        }
        if !self.field.is_empty() {
            write!(formatter, ": {}", self.field)?;
        }
        write!(formatter, ": {}", self.message)
    }
}

impl std::error::Error for ManifestError {}

/// The faults of all files now; clones share the list.
#[derive(Clone, Debug, Default)]
pub struct Problems(Arc<Mutex<Vec<ManifestError>>>);

impl Problems {
    /// Every fault, sorted by file.
    pub fn list(&self) -> Vec<ManifestError> {
        self.lock().clone()
    }

    /// How many faults there are.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<ManifestError>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the list, and logs new and fixed faults.
    fn replace(&self, now: Vec<ManifestError>) {
        let mut listed = self.lock();
        for error in now.iter().filter(|error| !listed.contains(error)) {
            tracing::warn!(%error, "invalid manifest: the objects that this file had before stay in force; correct it");
        }
        for error in listed.iter() {
            if !now.iter().any(|other| other.file == error.file) {
                tracing::info!(file = %error.file.display(), "manifest is valid again, or deleted");
            }
        }
        *listed = now;
    }
}

/// Sends one [`ObjectEvent::Replaced`] for each kind, then every change on disk, until the
/// receiver is gone.
///
/// # Errors
/// If the directory cannot be read or watched at the start; later faults go to `problems`.
pub async fn watch(
    dir: PathBuf,
    sender: Sender<ObjectEvent>,
    problems: Problems,
) -> Result<(), Error> {
    let (notices, inbox) = mpsc::channel();
    let stop = StopOnDrop(notices.clone());
    let closed = sender.clone();
    let shown = dir.clone();
    let reader = tokio::task::spawn_blocking(move || {
        let mut reader = Reader::new(dir, notices, sender, problems)?;
        reader.run(&inbox);
        Ok(())
    });
    let result = tokio::select! {
        result = reader => {
            result.unwrap_or_else(|source| Err(Error::Reader { dir: shown, source }))
        }
        () = closed.closed() => Ok(()),
    };
    drop(stop);
    result
}

/// A message to the thread that reads the files.
enum Notice {
    Changed(notify::Result<notify::Event>),
    Stop,
}

/// Ends the reading thread when the future that waits for it is dropped.
struct StopOnDrop(mpsc::Sender<Notice>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        // An error means that the thread has ended already.
        let _ = self.0.send(Notice::Stop);
    }
}

struct Reader {
    root: PathBuf,
    watcher: notify::RecommendedWatcher,
    watched: BTreeSet<PathBuf>,
    store: Store,
    sender: Sender<ObjectEvent>,
    problems: Problems,
    missing: Option<ManifestError>,
    /// Device and inode of the directory that is watched.
    identity: Option<(u64, u64)>,
    /// Hashes of texts that wait for a second look.
    unconfirmed: BTreeMap<PathBuf, u64>,
}

/// The files and directories to read.
#[derive(Default)]
struct Dirty {
    /// Files to read, directories to walk.
    now: BTreeSet<PathBuf>,
    /// Files that were written to but not closed, and when to read them.
    resting: BTreeMap<PathBuf, Instant>,
    /// The whole directory, with new watches.
    all: bool,
}

/// The receiver of events is gone.
struct Closed;

impl Reader {
    fn new(
        dir: PathBuf,
        notices: mpsc::Sender<Notice>,
        sender: Sender<ObjectEvent>,
        problems: Problems,
    ) -> Result<Self, Error> {
        let root = std::path::absolute(&dir)
            .and_then(|root| fs::read_dir(&root).map(|_| root))
            .map_err(|source| Error::Directory { dir: dir.clone(), source })?;
        let at_dir = |source| Error::Notify { dir: dir.clone(), source };
        let watcher = notify::recommended_watcher(move |event| {
            // An error means that the thread has ended.
            let _ = notices.send(Notice::Changed(event));
        })
        .map_err(at_dir)?;
        let mut reader = Self {
            root: root.clone(),
            watcher,
            watched: BTreeSet::new(),
            store: Store::default(),
            sender,
            problems,
            missing: None,
            identity: identity(&root),
            unconfirmed: BTreeMap::new(),
        };
        if let Some(parent) = root.parent() {
            // The parent shows when the directory itself is replaced.
            if let Err(error) = reader.watcher.watch(parent, RecursiveMode::NonRecursive) {
                tracing::warn!(parent = %parent.display(), %error, "cannot watch the parent directory: if the directory of manifests is replaced, restart the agent");
            }
        }
        reader.watcher.watch(&root, RecursiveMode::NonRecursive).map_err(at_dir)?;
        reader.watched.insert(root);
        Ok(reader)
    }

    fn run(&mut self, inbox: &mpsc::Receiver<Notice>) {
        if self.first_lists().is_err() {
            return;
        }
        let mut dirty = Dirty::default();
        loop {
            let due = dirty.resting.values().min();
            let due = due.map_or(IDENTITY, |due| due.saturating_duration_since(Instant::now()));
            let mut notice = match inbox.recv_timeout(due.min(IDENTITY)) {
                Ok(notice) => Some(notice),
                Err(mpsc::RecvTimeoutError::Timeout) => None,
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            };
            while let Some(received) = notice {
                match received {
                    Notice::Stop => return,
                    Notice::Changed(event) => self.note(event, &mut dirty),
                }
                notice = inbox.try_recv().ok();
            }
            dirty.all |= identity(&self.root) != self.identity;
            if self.process(&mut dirty).is_err() {
                return;
            }
        }
    }

    /// Sends the complete lists.
    fn first_lists(&mut self) -> Result<(), Closed> {
        let mut files = BTreeSet::new();
        self.walk(&self.root.clone(), &mut files);
        let mut lists: BTreeMap<ObjectKind, Vec<Object>> =
            ObjectKind::ALL.into_iter().map(|kind| (kind, Vec::new())).collect();
        for file in files {
            let (content, _) = self.content(&file);
            for event in self.put(&file, content) {
                if let ObjectEvent::Applied(object) = event {
                    lists.entry(object.kind()).or_default().push(object);
                }
            }
        }
        self.show_problems();
        for (kind, objects) in lists {
            tracing::info!(%kind, objects = objects.len(), dir = %self.root.display(), "read manifests");
            self.send(ObjectEvent::Replaced(kind, objects))?;
        }
        Ok(())
    }

    /// Records the paths of an inotify event.
    fn note(&self, event: notify::Result<notify::Event>, dirty: &mut Dirty) {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                tracing::warn!(%error, "watching the manifests failed: reading all of them again");
                dirty.all = true;
                return;
            }
        };
        dirty.all |= event.need_rescan();
        let at_once = match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Modify(ModifyKind::Name(_))
            | EventKind::Remove(_)
            | EventKind::Create(CreateKind::Folder) => true,
            // A link is complete when it appears; a new file is not written yet.
            EventKind::Create(_) => event.paths.iter().any(|path| path.is_symlink()),
            EventKind::Modify(_) => false,
            _ => return,
        };
        for path in event.paths {
            self.note_path(path, at_once, dirty);
        }
    }

    fn note_path(&self, path: PathBuf, at_once: bool, dirty: &mut Dirty) {
        let Ok(below) = path.strip_prefix(&self.root) else { return };
        if below.as_os_str().is_empty() {
            dirty.all |= at_once;
        } else if below.components().any(|part| is_hidden(Path::new(&part))) {
            // An update of a mounted ConfigMap replaces the hidden link that its files use.
            dirty.all |= at_once && (path.is_symlink() || below.starts_with("..data"));
        } else if at_once {
            dirty.resting.remove(&path);
            dirty.now.insert(path);
        } else if is_manifest(&path) {
            dirty.resting.insert(path, Instant::now() + REST);
        }
    }

    fn process(&mut self, dirty: &mut Dirty) -> Result<(), Closed> {
        let now = Instant::now();
        let mut paths = std::mem::take(&mut dirty.now);
        if std::mem::take(&mut dirty.all) {
            dirty.resting.clear();
            if !self.start_over() {
                return Ok(());
            }
            paths = BTreeSet::from([self.root.clone()]);
        }
        while let Some(entry) = dirty.resting.first_entry().filter(|entry| *entry.get() <= now) {
            paths.insert(entry.remove_entry().0);
        }
        if paths.is_empty() {
            return Ok(());
        }
        let mut files = BTreeSet::new();
        for path in paths {
            let below = path.strip_prefix(&self.root).unwrap_or(Path::new(""));
            let known = self.store.known_below(below);
            files.extend(known.into_iter().map(|file| self.root.join(file)));
            match fs::symlink_metadata(&path) {
                Ok(metadata) if metadata.is_dir() => self.walk(&path, &mut files),
                Ok(_) if is_manifest(&path) => _ = files.insert(path),
                Ok(_) => {}
                Err(_) => self.watched.retain(|dir| !dir.starts_with(&path)),
            }
        }
        // Existing files first: an object that moved to another file is not deleted in between.
        let (there, gone): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| file.exists());
        for file in there.into_iter().chain(gone) {
            let (content, hash) = self.content(&file);
            if self.needs_second_look(&file, &content, hash) {
                dirty.resting.insert(file, Instant::now() + SECOND_LOOK);
                continue;
            }
            for event in self.put(&file, content) {
                self.send(event)?;
            }
        }
        self.show_problems();
        Ok(())
    }

    /// Renews all watches, and returns whether the directory exists.
    fn start_over(&mut self) -> bool {
        for dir in std::mem::take(&mut self.watched) {
            // It fails for a deleted directory, whose watch no longer exists.
            let _ = self.watcher.unwatch(&dir);
        }
        let failure = fs::read_dir(&self.root).err().map(|error| ManifestError {
            file: self.root.clone(),
            line: None,
            field: String::new(),
            message: error.to_string(),
        });
        self.missing = failure;
        self.identity = identity(&self.root);
        if let Some(parent) = self.root.parent() {
            // It may be another one as well; watching the same one twice has no effect.
            let _ = self.watcher.watch(parent, RecursiveMode::NonRecursive);
        }
        self.show_problems();
        self.missing.is_none()
    }

    /// Watches a directory and its subdirectories, then collects their files: in this order,
    /// so that no new file is missed.
    fn walk(&mut self, dir: &Path, files: &mut BTreeSet<PathBuf>) {
        if !self.watched.contains(dir) {
            match self.watcher.watch(dir, RecursiveMode::NonRecursive) {
                Ok(()) => _ = self.watched.insert(dir.to_owned()),
                Err(error) => {
                    tracing::warn!(dir = %dir.display(), %error, "cannot watch this directory: changes in it are not seen until the agent restarts");
                }
            }
        }
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) => {
                tracing::warn!(dir = %dir.display(), %error, "cannot read this directory: its manifests are not read");
                return;
            }
        };
        for entry in entries.flatten() {
            let path = entry.path();
            if is_hidden(Path::new(&entry.file_name())) {
                continue;
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.walk(&path, files);
            } else if is_manifest(&path) {
                files.insert(path);
            }
        }
    }

    fn needs_second_look(&mut self, file: &Path, content: &Content, hash: u64) -> bool {
        let doubtful = self.store.is_withdrawn_by(self.relative(file), content);
        if !doubtful || self.unconfirmed.get(file) == Some(&hash) {
            self.unconfirmed.remove(file);
            return false;
        }
        self.unconfirmed.insert(file.to_owned(), hash);
        true
    }

    fn content(&self, file: &Path) -> (Content, u64) {
        content(&self.root, self.relative(file))
    }

    fn put(&mut self, file: &Path, content_now: Content) -> Vec<ObjectEvent> {
        let reread = |file: &Path| match content(&self.root, file).0 {
            Content::Good(located) => located,
            Content::Bad(_) | Content::Gone => Vec::new(),
        };
        let file = file.strip_prefix(&self.root).unwrap_or(file);
        self.store.put(file, content_now, &reread)
    }

    fn relative<'a>(&self, file: &'a Path) -> &'a Path {
        file.strip_prefix(&self.root).unwrap_or(file)
    }

    fn show_problems(&self) {
        let all = self.missing.iter().cloned().chain(self.store.errors());
        self.problems.replace(all.collect());
    }

    fn send(&self, event: ObjectEvent) -> Result<(), Closed> {
        self.sender.blocking_send(event).map_err(|_| Closed)
    }
}

/// Reads and parses a file, named relative to the directory, and returns a hash of its text too.
fn content(root: &Path, file: &Path) -> (Content, u64) {
    let bad = |line, field: String, message: String| {
        Content::Bad(ManifestError { file: file.to_owned(), line, field, message })
    };
    let text = match fs::read_to_string(root.join(file)) {
        Ok(text) => text,
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            return (Content::Gone, 0);
        }
        Err(error) => return (bad(None, String::new(), error.to_string()), 0),
    };
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let format = match file.extension().and_then(|extension| extension.to_str()) {
        Some("json") => Format::Json,
        _ => Format::Yaml,
    };
    let keep = |Located { line, object }| Some(Located { line, object: admit(object)? });
    let content = match parse::parse(&text, format) {
        Ok(found) => Content::Good(found.into_iter().filter_map(keep).collect()),
        Err(error) => bad(Some(error.line), error.field, error.message),
    };
    (content, hasher.finish())
}

fn identity(directory: &Path) -> Option<(u64, u64)> {
    fs::metadata(directory).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

fn is_manifest(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    let left_behind = |name: &std::ffi::OsStr| name.as_encoded_bytes().starts_with(b"#");
    matches!(extension, Some("yaml" | "yml" | "json"))
        && !path.file_name().is_some_and(left_behind)
        && !is_hidden(Path::new(path.file_name().unwrap_or_default()))
}

fn is_hidden(name: &Path) -> bool {
    name.as_os_str().as_encoded_bytes().starts_with(b".")
}

#[cfg(test)]
mod tests;
