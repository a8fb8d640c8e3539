//! Maps each manifest file to its objects, and tracks which objects were sent as events.
//!
//! It does no I/O and keeps no objects, only their hashes. Invariant: of an object in several
//! files, the version in the first file by path is in force.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use lb_control::model::event::{Object, ObjectEvent, ObjectKind, ObjectName};

use super::{ManifestError, parse::Located};

pub(super) type Key = (ObjectKind, ObjectName);

/// The result of reading a file.
pub(super) enum Content {
    /// The file does not exist.
    Gone,
    /// Not readable or not valid: its former objects stay.
    Bad(ManifestError),
    /// Its admitted objects.
    Good(Vec<Located>),
}

#[derive(Default)]
pub(super) struct Store {
    /// The lines of the objects of each file.
    files: BTreeMap<Arc<Path>, BTreeMap<Key, u64>>,
    errors: BTreeMap<PathBuf, ManifestError>,
    holders: HashMap<Key, BTreeSet<Arc<Path>>>,
    shared: BTreeSet<Key>,
    sent: HashMap<Key, (Arc<Path>, u64)>,
}

impl Store {
    /// Sets the content of a file and returns the changes. `reread` reads the objects of another
    /// file, if that is now the first one with an object that this file had.
    pub(super) fn put(
        &mut self,
        path: &Path,
        content: Content,
        reread: &dyn Fn(&Path) -> Vec<Located>,
    ) -> Vec<ObjectEvent> {
        let located = match content {
            Content::Bad(error) => {
                self.errors.insert(path.to_owned(), error);
                return Vec::new();
            }
            Content::Gone => Vec::new(),
            Content::Good(located) => located,
        };
        self.errors.remove(path);
        let path: Arc<Path> = match self.files.get_key_value(path) {
            Some((known, _)) => known.clone(),
            None => path.into(),
        };
        let mut objects = BTreeMap::new();
        for located in located {
            let key = (located.object.kind(), located.object.name());
            if let Some(Located { line, .. }) = objects.get(&key) {
                let error = twice_in_file(&path, &key, *line, located.line);
                self.errors.insert(path.to_path_buf(), error);
            } else {
                objects.insert(key, located);
            }
        }
        let lines: BTreeMap<_, _> =
            objects.iter().map(|(key, located)| (key.clone(), located.line)).collect();
        let before = self.replace_lines(&path, lines);
        let keys: BTreeSet<Key> = before.into_keys().chain(objects.keys().cloned()).collect();
        let mut events = Vec::new();
        for key in keys {
            let own = objects.remove(&key);
            events.extend(self.event_of(key, &path, own, reread));
        }
        events.sort_by_key(rank);
        events
    }

    fn replace_lines(&mut self, path: &Arc<Path>, lines: BTreeMap<Key, u64>) -> BTreeMap<Key, u64> {
        let before = self.files.remove(path).unwrap_or_default();
        for key in before.keys().filter(|key| !lines.contains_key(key)) {
            if let Some(holders) = self.holders.get_mut(key) {
                holders.remove(path);
                if holders.len() < 2 {
                    self.shared.remove(key);
                }
                if holders.is_empty() {
                    self.holders.remove(key);
                }
            }
        }
        for key in lines.keys() {
            let holders = self.holders.entry(key.clone()).or_default();
            holders.insert(path.clone());
            if holders.len() > 1 {
                self.shared.insert(key.clone());
            }
        }
        if !lines.is_empty() {
            self.files.insert(path.clone(), lines);
        }
        before
    }

    /// The event of an object, if it changed by a change of the file `path`, which now has it as
    /// `own`.
    fn event_of(
        &mut self,
        key: Key,
        path: &Arc<Path>,
        own: Option<Located>,
        reread: &dyn Fn(&Path) -> Vec<Located>,
    ) -> Option<ObjectEvent> {
        let Some(holder) = self.holders.get(&key).and_then(BTreeSet::first).cloned() else {
            return self.sent.remove(&key).map(|_| ObjectEvent::Deleted(key.0, key.1));
        };
        let object = if holder == *path {
            own?.object
        } else if self.sent.get(&key).is_some_and(|(sent, _)| *sent == holder) {
            return None;
        } else {
            let of_key = |located: &Located| (located.object.kind(), located.object.name()) == key;
            reread(&holder).into_iter().find(of_key)?.object
        };
        let hash = hash_of(&object);
        let before = self.sent.insert(key, (holder, hash));
        (before.is_none_or(|(_, before)| before != hash)).then_some(ObjectEvent::Applied(object))
    }

    /// Whether an existing file became invalid, or lost an object.
    pub(super) fn is_withdrawn_by(&self, path: &Path, content: &Content) -> bool {
        let located = match content {
            Content::Gone => return false,
            Content::Bad(_) => return true,
            Content::Good(located) => located,
        };
        let Some(held) = self.files.get(path) else { return false };
        let keys: BTreeSet<Key> =
            located.iter().map(|located| (located.object.kind(), located.object.name())).collect();
        held.keys().any(|key| !keys.contains(key))
    }

    /// The known files with an object or a fault, at or below `path`.
    pub(super) fn known_below(&self, path: &Path) -> Vec<PathBuf> {
        let held = self.files.keys().map(|file| file.to_path_buf());
        let bad = self.errors.keys().cloned();
        let all: BTreeSet<PathBuf> = held.chain(bad).collect();
        all.into_iter().filter(|file| file.starts_with(path)).collect()
    }

    /// All faults, sorted by file.
    pub(super) fn errors(&self) -> Vec<ManifestError> {
        let shared = self.shared.iter().flat_map(|key| self.sharing(key));
        let mut all: Vec<_> = self.errors.values().cloned().chain(shared).collect();
        all.sort_by(|one, other| (&one.file, one.line).cmp(&(&other.file, other.line)));
        all
    }

    fn sharing(&self, key: &Key) -> Vec<ManifestError> {
        let line = |file: &Path| self.files.get(file)?.get(key).copied();
        let Some(holders) = self.holders.get(key) else { return Vec::new() };
        let Some(first) = holders.first() else { return Vec::new() };
        let taken = match line(first) {
            Some(line) => format!("{}:{line}", first.display()),
            None => first.display().to_string(),
        };
        let error = |file: &Arc<Path>| ManifestError {
            file: file.to_path_buf(),
            line: line(file),
            field: "metadata.name".to_owned(),
            message: format!("{} {} is taken from {taken}", key.0, key.1),
        };
        holders.iter().skip(1).map(error).collect()
    }
}

fn twice_in_file(path: &Path, key: &Key, first: u64, line: u64) -> ManifestError {
    ManifestError {
        file: path.to_owned(),
        line: Some(line),
        field: "metadata.name".to_owned(),
        message: format!("{} {} is taken from {}:{first}", key.0, key.1, path.display()),
    }
}

/// Orders the changes of one file so that endpoints always come before their Service.
fn rank(event: &ObjectEvent) -> u8 {
    match event {
        ObjectEvent::Applied(object) => match object.kind() {
            ObjectKind::Node => 0,
            ObjectKind::ServiceCidr => 1,
            ObjectKind::EndpointSlice => 2,
            ObjectKind::Service => 4,
        },
        ObjectEvent::Deleted(ObjectKind::Service, _) => 3,
        ObjectEvent::Deleted(..)
        | ObjectEvent::Replaced(..)
        | ObjectEvent::ReplacedExcept(..)
        | ObjectEvent::Unreadable(..) => 5,
    }
}

/// A hash of all fields of an object.
fn hash_of(object: &Object) -> u64 {
    struct Sink(DefaultHasher);
    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut sink = Sink(DefaultHasher::new());
    object.kind().hash(&mut sink.0);
    let written = match object {
        Object::Service(object) => serde_json::to_writer(&mut sink, object),
        Object::EndpointSlice(object) => serde_json::to_writer(&mut sink, object),
        Object::Node(object) => serde_json::to_writer(&mut sink, object),
        Object::ServiceCidr(object) => serde_json::to_writer(&mut sink, object),
    };
    written.expect("a Kubernetes object has string keys only and the sink takes all");
    sink.0.finish()
}
