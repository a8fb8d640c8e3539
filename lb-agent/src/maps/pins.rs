//! The paths of pinned maps and links, and the layouts and sizes of the maps.
//!
//! The meaning of a pin never changes: a map of another layout has another version, which is in the
//! name of its pin, `maps/FRONTENDS4@1`, and comes from `lb_common::abi::layout`.

use std::{
    fmt, fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use aya_obj::generated::{
    BPF_F_MMAPABLE, BPF_F_NO_PREALLOC,
    bpf_map_type::{
        self, BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_LPM_TRIE, BPF_MAP_TYPE_LRU_HASH,
        BPF_MAP_TYPE_LRU_PERCPU_HASH, BPF_MAP_TYPE_PERCPU_ARRAY, BPF_MAP_TYPE_SK_STORAGE,
    },
};
use lb_common::abi::{
    address::{Address4, Address6},
    affinity::{Affinity, AffinityKey},
    backend::Backend,
    counter,
    flow_table::{Bucket, EVENTS, FlowBucket, FlowFilter, FlowSeed, REPLY_ROOM},
    fragment::{Fragment, FragmentKey},
    frontend::{Frontend, FrontendKey},
    range::RangeKey,
    service::{Name, Service, Slot},
    settings::{Device, MAX_DEVICES, SettingsPair},
    socket::{CONNECTED_BUCKETS, ConnectedBucket, ConnectedPeer, DatagramKey, Peer},
    source::SourceKey,
    traffic::{DirectFlows, DropKey, Traffic},
};
use lb_control::dataplane::Capacity;

use super::{
    flow_names::{self, FlowAddress as _},
    kept::Kept,
    layouts::{
        convert::{Conversion, Mismatch},
        description::{self, Description},
        pinned::Descriptions,
    },
};
use crate::options::sizes::Sizes;

/// The directory of one agent on a bpffs; clones share what this process keeps pinned there.
#[derive(Clone, Debug)]
pub struct Pins {
    base: PathBuf,
    maps: PathBuf,
    links: PathBuf,
    kept: Kept,
}

/// The version of the maps of [`BEFORE`].
const VERSION_BEFORE: u32 = 1;
/// The directory of the release whose pins had one version for all. Its maps are those of
/// version 1.
const BEFORE: &str = "v3";

impl Pins {
    /// The pins below `bpf_dir`.
    pub fn new(bpf_dir: &Path) -> Self {
        Self {
            base: bpf_dir.to_owned(),
            maps: bpf_dir.join("maps"),
            links: bpf_dir.join("links"),
            kept: Kept::default(),
        }
    }

    /// What this process keeps pinned.
    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// Pins again what this process keeps and what is lost: maps first and links last, so that no
    /// agent that starts in the meantime finds a link without its maps. Returns how much it was.
    ///
    /// # Errors
    /// [`PinError::Open`] at the first failure; a second call continues.
    pub fn restore(&self) -> Result<Restored, PinError> {
        let mut lost = self.kept.lost();
        let kind = |path: &Path| match path.parent() {
            Some(parent) if parent == self.maps || path == self.layouts() => Kind::Map,
            Some(parent) if parent == self.links => Kind::Link,
            _ => Kind::Program,
        };
        lost.sort_by_key(|path| kind(path));
        let mut restored = Restored::default();
        for path in lost {
            self.kept
                .restore(&path)
                .map_err(|source| PinError::Pin { path: path.clone(), source })?;
            match kind(&path) {
                Kind::Map => restored.maps += 1,
                Kind::Program => restored.programs += 1,
                Kind::Link => restored.links += 1,
            }
        }
        Ok(restored)
    }

    /// `--bpf-dir` itself.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// The directory of the maps.
    pub fn maps(&self) -> &Path {
        &self.maps
    }

    /// The path of the map `name`.
    pub fn map(&self, name: &str) -> PathBuf {
        self.map_of(name, description::version(name))
    }

    /// The path of the map `name` with the layout of `version`.
    pub fn map_of(&self, name: &str, version: u32) -> PathBuf {
        self.maps.join(description::pin_name(name, version))
    }

    /// The directory of the maps that are taken over, while they are.
    pub fn handover(&self) -> PathBuf {
        self.base.join("handover")
    }

    /// The directory of the links.
    pub fn links(&self) -> &Path {
        &self.links
    }

    /// The path of the program `clock`, with which tools compute ages.
    pub fn clock(&self) -> PathBuf {
        self.base.join("clock")
    }

    /// The path of the map that describes the layouts of maps. Its own layout never changes.
    pub fn layouts(&self) -> PathBuf {
        self.base.join("layouts@1")
    }

    /// The descriptions of the maps that are pinned, and were.
    ///
    /// # Errors
    /// [`PinError::Open`].
    pub fn descriptions(&self) -> Result<Descriptions, PinError> {
        let path = self.layouts();
        Descriptions::open(&path).map_err(|source| PinError::Open { path, source })
    }

    /// Adds the descriptions of this release's maps. The caller holds the lock.
    ///
    /// # Errors
    /// [`PinError::Open`].
    pub fn describe_own(&self) -> Result<(), PinError> {
        let path = self.layouts();
        let keep = || {
            Descriptions::write_own(&path)?;
            self.kept.keep(&path, Arc::new(lb_sys::obj_get(&path)?));
            Ok(())
        };
        keep().map_err(|source| PinError::Open { path: path.clone(), source })
    }

    /// A directory for pins that live only while programs are loaded.
    pub fn staging(&self, name: &str) -> PathBuf {
        self.base.join(format!("loading-{name}"))
    }

    /// The directory of the release before pins had versions of their own.
    pub fn before(&self) -> PathBuf {
        self.base.join(BEFORE)
    }

    /// The map `name`, if it is pinned: with the layout of this release, by the release whose pins
    /// had one version for all, or with another layout.
    ///
    /// # Errors
    /// [`PinError`] if a pin cannot be read.
    pub fn found(&self, name: &str) -> Result<Option<Found>, PinError> {
        let own = description::version(name);
        let before = (self.before().join(name), VERSION_BEFORE);
        for (path, version) in [(self.map(name), own), before] {
            if let Some(map) = opened_at(&path)? {
                return Ok(Some(Found { path, version, map }));
            }
        }
        let mut others = self.versions(name)?;
        others.sort_unstable();
        let Some(version) = others.pop() else { return Ok(None) };
        let path = self.map_of(name, version);
        Ok(opened_at(&path)?.map(|map| Found { path, version, map }))
    }

    /// The versions in which the map `name` is pinned.
    fn versions(&self, name: &str) -> Result<Vec<u32>, PinError> {
        let failed = |source| PinError::Open { path: self.maps.clone(), source };
        let mut versions = Vec::new();
        let entries = match fs::read_dir(&self.maps) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(versions),
            entries => entries.map_err(failed)?,
        };
        for entry in entries {
            let file = entry.map_err(failed)?.file_name();
            let version = file.to_str().and_then(|file| file.split_once('@'));
            versions.extend(version.and_then(|(map, version)| {
                if map == name { version.parse::<u32>().ok() } else { None }
            }));
        }
        Ok(versions)
    }

    /// Removes the pins of the map `name` with other layouts than that of `version`.
    ///
    /// # Errors
    /// [`PinError::Open`].
    pub fn remove_others(&self, name: &str, version: u32) -> Result<(), PinError> {
        for other in self.versions(name)?.into_iter().filter(|other| *other != version) {
            let path = self.map_of(name, other);
            fs::remove_file(&path).map_err(|source| PinError::Open { path, source })?;
        }
        Ok(())
    }

    /// The path of the program `name`, by which tools and the next agent recognise it.
    pub fn program(&self, name: &str) -> PathBuf {
        self.base.join(format!("program-{name}"))
    }

    /// Opens the pinned map `name`.
    ///
    /// # Errors
    /// [`PinError`]; [`PinError::Missing`] if nothing is pinned at the path.
    pub fn open(&self, name: &'static str) -> Result<OwnedFd, PinError> {
        let wanted = description::version(name);
        match self.found(name)? {
            None => Err(PinError::Missing { path: self.map(name) }),
            Some(found) if found.version == wanted => Ok(found.map),
            Some(Found { path, version, .. }) => Err(PinError::Version { path, version, wanted }),
        }
    }

    /// Makes the directories of maps and links.
    ///
    /// # Errors
    /// [`PinError::Open`].
    pub fn make_directories(&self) -> Result<(), PinError> {
        for path in [&self.maps, &self.links] {
            fs::create_dir_all(path)
                .map_err(|source| PinError::Open { path: path.clone(), source })?;
        }
        Ok(())
    }

    /// Keeps `map`, which is pinned as `name`.
    ///
    /// # Errors
    /// [`PinError::Open`].
    pub fn keep_map(&self, name: &str, map: &OwnedFd) -> Result<(), PinError> {
        let path = self.map(name);
        match map.try_clone() {
            Ok(map) => self.kept.keep(&path, Arc::new(map)),
            Err(source) => return Err(PinError::Open { path, source }),
        }
        Ok(())
    }

    /// Pins `map` as `name`, in place of what is pinned there: at each moment one of the two is.
    ///
    /// # Errors
    /// [`PinError::Open`].
    pub fn replace(&self, name: &str, map: &OwnedFd) -> Result<(), PinError> {
        self.replace_version(name, description::version(name), map)
    }

    /// The same, with the layout of `version`. Pins of the map with other layouts are removed.
    ///
    /// # Errors
    /// [`PinError::Open`].
    pub fn replace_version(&self, name: &str, version: u32, map: &OwnedFd) -> Result<(), PinError> {
        self.make_directories()?;
        let path = self.map_of(name, version);
        let unfinished = self.maps.join(format!("{name}@new"));
        let pin = || {
            if unfinished.exists() {
                fs::remove_file(&unfinished)?;
            }
            lb_sys::obj_pin(map.as_fd(), &unfinished)?;
            fs::rename(&unfinished, &path)
        };
        pin().map_err(|source| PinError::Open { path: path.clone(), source })?;
        self.remove_others(name, version)
    }

    /// Moves the pins of the release before to where this one has them: the maps are the same, and
    /// its links stay attached. Its agent has ended.
    ///
    /// # Errors
    /// [`PinError::Open`]; the next call goes on where this one stopped.
    pub fn adopt_before(&self) -> Result<bool, PinError> {
        let before = self.before();
        if !before.is_dir() {
            return Ok(false);
        }
        self.make_directories()?;
        let links = before.join("links");
        self.move_all(&before, |name| match name.strip_prefix("program-") {
            Some(program) => self.program(program),
            None => self.map_of(name, VERSION_BEFORE),
        })?;
        self.move_all(&links, |name| self.links.join(name))?;
        for path in [links, before] {
            match fs::remove_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(PinError::Open { path, source }),
                Ok(()) => {}
            }
        }
        Ok(true)
    }

    fn move_all(&self, from: &Path, to: impl Fn(&str) -> PathBuf) -> Result<(), PinError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| PinError::Open { path, source }
        };
        let entries = match fs::read_dir(from) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(failed(from))?,
        };
        for entry in entries {
            let path = entry.map_err(failed(from))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if path.is_dir() {
                continue;
            }
            if name != "clock" {
                let object = lb_sys::obj_get(&path).map_err(failed(&path))?;
                match lb_sys::obj_pin(object.as_fd(), &to(name)) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    result => result.map_err(failed(&path))?,
                }
            }
            fs::remove_file(&path).map_err(failed(&path))?;
        }
        Ok(())
    }
}

/// A map that is pinned.
#[derive(Debug)]
pub struct Found {
    /// The path of the pin.
    pub path: PathBuf,
    /// The version of its layout.
    pub version: u32,
    /// The map.
    pub map: OwnedFd,
}

/// The map that is pinned at `path`, if there is one.
pub(super) fn opened_at(path: &Path) -> Result<Option<OwnedFd>, PinError> {
    match lb_sys::obj_get(path) {
        Ok(map) => Ok(Some(map)),
        Err(source) => match source.kind() {
            io::ErrorKind::NotFound => Ok(None),
            io::ErrorKind::PermissionDenied => Err(PinError::Denied { path: path.to_owned() }),
            _ => Err(PinError::Open { path: path.to_owned(), source }),
        },
    }
}

/// What is pinned, in the order in which it is pinned again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Map,
    Program,
    Link,
}

/// How much was pinned again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Maps.
    pub maps: usize,
    /// Programs.
    pub programs: usize,
    /// Links.
    pub links: usize,
}

impl Restored {
    /// All together.
    pub fn pins(self) -> usize {
        self.maps + self.programs + self.links
    }
}

/// A pin could not be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// Nothing is pinned there.
    #[error(
        "nothing is pinned at {}: no lb-agent has run with this --bpf-dir, or its maps were cleaned up",
        path.display()
    )]
    Missing {
        /// The path of the pin.
        path: PathBuf,
    },
    /// The caller lacks CAP_BPF.
    #[error("cannot open {}: needs CAP_BPF (root)", path.display())]
    Denied {
        /// The path of the pin.
        path: PathBuf,
    },
    /// The pin could not be opened or read for another reason.
    #[error("cannot open {}", path.display())]
    Open {
        /// The path of the pin.
        path: PathBuf,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// Another release has pinned the map.
    #[error(
        "{} has layout version {version}, and this lb-agent has version {wanted}: use the lb-agent \
         that runs on this node",
        path.display()
    )]
    Version {
        /// The path of the pin.
        path: PathBuf,
        /// The version of its layout.
        version: u32,
        /// The version of this release.
        wanted: u32,
    },
    /// The entries of a map with another layout cannot be converted.
    #[error(
        "map {map} cannot be taken over: {} has layout version {found}, this lb-agent has version \
         {wanted}, and {mismatch}. Nothing is changed, and the programs that are attached serve on. \
         Start the lb-agent that was here before, or one of a release in between; or remove \
         everything with its `lb-agent cleanup --drain`, and start this one then",
        path.display()
    )]
    Convert {
        /// The name of the map.
        map: String,
        /// The path of the pin.
        path: PathBuf,
        /// The version of its layout.
        found: u32,
        /// The version of this release.
        wanted: u32,
        /// What is in the way.
        mismatch: Box<Mismatch>,
    },
    /// The pin could not be made again.
    #[error("cannot pin {}", path.display())]
    Pin {
        /// The path of the pin.
        path: PathBuf,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// The map has another layout.
    #[error(
        "{} has another layout than in this version of lb-agent ({found}, not {wanted}): remove it \
         with `lb-agent cleanup`",
        path.display()
    )]
    Layout {
        /// The path of the pin.
        path: PathBuf,
        /// The layout of the pinned map.
        found: Layout,
        /// The layout of this version.
        wanted: Layout,
    },
}

impl PinError {
    /// A map whose entries cannot be converted.
    pub(super) fn unconvertible(map: &str, found: &Found, mismatch: Mismatch) -> Self {
        Self::Convert {
            map: map.to_owned(),
            path: found.path.clone(),
            found: found.version,
            wanted: description::version(map),
            mismatch: mismatch.into(),
        }
    }
}

/// The type of a map and the sizes of its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `enum bpf_map_type`.
    pub map_type: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// BPF_F_*.
    pub flags: u32,
}

impl fmt::Display for Layout {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "type {}, flags {:#x}, keys of {} and values of {} bytes",
            self.map_type, self.flags, self.key_size, self.value_size
        )
    }
}

impl From<lb_sys::MapInfo> for Layout {
    fn from(info: lb_sys::MapInfo) -> Self {
        let lb_sys::MapInfo { map_type, key_size, value_size, flags, .. } = info;
        Self { map_type, key_size, value_size, flags }
    }
}

/// A map that is pinned.
#[derive(Clone, Copy, Debug)]
pub struct PinnedMap {
    /// Its name, in the object and in bpffs.
    pub name: &'static str,
    /// Its layout.
    pub layout: Layout,
    /// The number of entries.
    pub max_entries: u32,
    /// The flag that sets `max_entries`, if one does.
    pub flag: Option<&'static str>,
}

const fn map<K, V>(
    name: &'static str,
    map_type: bpf_map_type,
    flags: u32,
    max_entries: u32,
    flag: Option<&'static str>,
) -> PinnedMap {
    let layout = Layout {
        map_type: map_type as u32,
        key_size: size_of::<K>() as u32,
        value_size: size_of::<V>() as u32,
        flags,
    };
    PinnedMap { name, layout, max_entries, flag }
}

const fn array<V>(name: &'static str, entries: u32, flag: Option<&'static str>) -> PinnedMap {
    map::<u32, V>(name, BPF_MAP_TYPE_ARRAY, BPF_F_MMAPABLE, entries, flag)
}

const fn lru<K, V>(name: &'static str, entries: u32, flag: Option<&'static str>) -> PinnedMap {
    map::<K, V>(name, BPF_MAP_TYPE_LRU_HASH, 0, entries, flag)
}

const fn hash<K, V>(name: &'static str, entries: u32, flag: Option<&'static str>) -> PinnedMap {
    map::<K, V>(name, BPF_MAP_TYPE_HASH, BPF_F_NO_PREALLOC, entries, flag)
}

const fn trie<K, V>(name: &'static str, entries: u32, flag: Option<&'static str>) -> PinnedMap {
    map::<K, V>(name, BPF_MAP_TYPE_LPM_TRIE, BPF_F_NO_PREALLOC, entries, flag)
}

/// Capacity of FRAGMENTS in each family: fragmented datagrams tracked at once.
const FRAGMENTS: u32 = 16_384;
/// Capacity of NODES in each family.
const NODES: u32 = 16_384;
/// Capacity of SOURCES in each family: prefixes of routes.
pub(super) const SOURCES: u32 = 16_384;
/// Capacity of AFFINITY: clients of Services with session affinity tracked at once.
const AFFINITY: u32 = 65_536;
/// Capacity of DATAGRAM_PEERS: (socket, peer) pairs of unconnected sockets tracked at once.
const DATAGRAM_PEERS: u32 = 65_536;

/// Maximum memory of TRAFFIC on all CPUs together. On machines with more than 64 CPUs, service
/// ports beyond its capacity are not counted.
const TRAFFIC_BYTES: u32 = 64 << 20;
/// Capacity of DROPS: (service port, reason) pairs counted at once.
const DROPS: u32 = 4_096;

/// The number of CPUs for which the kernel allocates memory of per-CPU maps.
pub(super) fn possible_cpus() -> u32 {
    aya::util::nr_cpus().map_or(1, |cpus| cpus.max(1) as u32)
}

/// Every pinned map, with its capacity according to `sizes`.
pub fn pinned_maps(sizes: &Sizes) -> Vec<PinnedMap> {
    let services = Some("--max-services");
    let backends = Some("--max-backends");
    let flows = Some("--max-flows");
    // A service port may have more than one frontend. NodePorts, which have one more for any
    // node, are few and not counted.
    let frontends = sizes.services.saturating_mul(2);
    let buckets = flow_names::buckets(sizes.flows);
    let replies = buckets.saturating_mul(REPLY_ROOM);
    let traffic = sizes.services.min(TRAFFIC_BYTES / size_of::<Traffic>() as u32 / possible_cpus());
    vec![
        hash::<FrontendKey<Address4>, Frontend>("FRONTENDS4", frontends, services),
        hash::<FrontendKey<Address6>, Frontend>("FRONTENDS6", frontends, services),
        trie::<RangeKey<Address4>, u32>("RANGES4", sizes.services, services),
        trie::<RangeKey<Address6>, u32>("RANGES6", sizes.services, services),
        trie::<SourceKey<Address4>, Address4>("SOURCES4", SOURCES, None),
        trie::<SourceKey<Address6>, Address6>("SOURCES6", SOURCES, None),
        hash::<Address4, u32>("NODES4", NODES, None),
        hash::<Address6, u32>("NODES6", NODES, None),
        array::<Service>("SERVICES", sizes.services, services),
        array::<Name>("NAMES", sizes.services, services),
        array::<Slot>("SLOTS", sizes.slots, Some("--max-slots")),
        array::<Backend<Address4>>("BACKENDS4", sizes.backends, backends),
        array::<Backend<Address6>>("BACKENDS6", sizes.backends, backends),
        array::<SettingsPair>("SETTINGS", 1, None),
        array::<Device>("DEVICES", MAX_DEVICES, None),
        array::<FlowSeed>(flow_names::SEED, 1, None),
        array::<FlowBucket<Address4>>(Address4::TABLE, buckets, flows),
        array::<FlowBucket<Address6>>(Address6::TABLE, buckets, flows),
        array::<Bucket>(Address4::REPLIES, replies, flows),
        array::<Bucket>(Address6::REPLIES, replies, flows),
        array::<FlowFilter>(Address4::FILTER, buckets, flows),
        array::<FlowFilter>(Address6::FILTER, buckets, flows),
        lru::<FragmentKey<Address4>, Fragment>("FRAGMENTS4", FRAGMENTS, None),
        lru::<FragmentKey<Address6>, Fragment>("FRAGMENTS6", FRAGMENTS, None),
        lru::<AffinityKey, Affinity>("AFFINITY", AFFINITY, None),
        lru::<DatagramKey, Peer>("DATAGRAM_PEERS", DATAGRAM_PEERS, None),
        array::<ConnectedBucket>("CONNECTED_PEERS", CONNECTED_BUCKETS, None),
        map::<i32, ConnectedPeer>("SOCKETS", BPF_MAP_TYPE_SK_STORAGE, BPF_F_NO_PREALLOC, 0, None),
        map::<u32, u64>("FLOW_EVENTS", BPF_MAP_TYPE_PERCPU_ARRAY, 0, EVENTS as u32, None),
        array::<DirectFlows>("DIRECT_FLOWS", 1, None),
        map::<u32, u64>("COUNTERS", BPF_MAP_TYPE_PERCPU_ARRAY, 0, counter::COUNTERS, None),
        map::<u32, Traffic>("TRAFFIC", BPF_MAP_TYPE_PERCPU_ARRAY, 0, traffic, services),
        map::<DropKey, u64>("DROPS", BPF_MAP_TYPE_LRU_PERCPU_HASH, 0, DROPS, None),
    ]
}

impl PinnedMap {
    /// Whether the map may get another size: flags set it.
    pub fn can_resize(&self) -> bool {
        self.flag.is_some()
    }

    /// The pinned map; `None` if it is not pinned yet.
    ///
    /// # Errors
    /// [`PinError::Layout`] if something else is pinned there; [`PinError::Convert`] if its entries
    /// cannot be converted.
    pub fn existing(&self, pins: &Pins) -> Result<Option<Existing>, PinError> {
        let Some(found) = pins.found(self.name)? else { return Ok(None) };
        let info = lb_sys::map_info(found.map.as_fd())
            .map_err(|source| PinError::Open { path: found.path.clone(), source })?;
        let (entries, layout) = (info.max_entries, Layout::from(info));
        let refused = |mismatch| PinError::unconvertible(self.name, &found, mismatch);
        let described = pins.descriptions()?.read(self.name, found.version);
        let Some(own) = Description::own(self.name) else {
            return Err(refused(Mismatch::Unknown { version: found.version }));
        };
        if found.version == own.version {
            if layout != self.layout {
                let path = pins.map(self.name);
                return Err(PinError::Layout { path, found: layout, wanted: self.layout });
            }
            if described.is_some_and(|described| described != own) {
                return Err(refused(Mismatch::SameVersion { version: own.version }));
            }
            return Ok(Some(Existing { found, entries, before: None }));
        }
        let Some(before) = described else {
            return Err(refused(Mismatch::Unknown { version: found.version }));
        };
        let is_as_described = layout.map_type == self.layout.map_type
            && layout.flags == self.layout.flags
            && (layout.key_size as usize, layout.value_size as usize)
                == (before.key.size, before.value.size);
        if !is_as_described {
            let path = found.path;
            return Err(PinError::Layout { path, found: layout, wanted: self.layout });
        }
        let conversion = Conversion::new(&before, &own).map_err(refused)?;
        // So that an agent of that release can take over again.
        Conversion::new(&own, &before).map_err(refused)?;
        if self.layout.map_type == BPF_MAP_TYPE_LPM_TRIE as u32 && !conversion.keeps_keys() {
            return Err(refused(Mismatch::Prefix));
        }
        Ok(Some(Existing { found, entries, before: Some(before) }))
    }
}

/// A map that an agent before has pinned.
#[derive(Debug)]
pub struct Existing {
    /// The pin.
    pub found: Found,
    /// The number of entries.
    pub entries: u32,
    /// Its layout, if that is another one; it can be converted.
    pub before: Option<Description>,
}

/// What the maps that only the agent writes hold at most, by `sizes`.
pub fn capacity(sizes: &Sizes) -> Capacity {
    let frontends = sizes.services.saturating_mul(2);
    Capacity {
        services: sizes.services,
        slots: sizes.slots,
        backends4: sizes.backends,
        backends6: sizes.backends,
        frontends4: frontends,
        frontends6: frontends,
        ranges4: sizes.services,
        ranges6: sizes.services,
        nodes4: NODES,
        nodes6: NODES,
    }
}
