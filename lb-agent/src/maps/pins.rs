//! The paths of pinned maps and links, and the layouts and sizes of the maps.
//!
//! The meaning of a pin never changes: a change of layout changes [`ABI_VERSION`], and thereby the
//! directory.

use std::{
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya_obj::generated::{
    BPF_F_MMAPABLE, BPF_F_NO_COMMON_LRU, BPF_F_NO_PREALLOC,
    bpf_map_type::{
        self, BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_LPM_TRIE, BPF_MAP_TYPE_LRU_HASH,
        BPF_MAP_TYPE_LRU_PERCPU_HASH, BPF_MAP_TYPE_PERCPU_ARRAY, BPF_MAP_TYPE_SK_STORAGE,
    },
};
use lb_common::abi::{
    ABI_VERSION,
    address::{Address4, Address6},
    affinity::{Affinity, AffinityKey},
    backend::Backend,
    counter,
    flow::{Flow, FlowKey},
    fragment::{Fragment, FragmentKey},
    frontend::{Frontend, FrontendKey},
    range::RangeKey,
    service::{Name, Service, Slot},
    settings::{Device, MAX_DEVICES, SettingsPair},
    socket::{ConnectedPeer, DatagramKey, Peer},
    traffic::{DropKey, Traffic},
};

use crate::options::sizes::Sizes;

/// The directory of one agent below a bpffs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pins {
    base: PathBuf,
    version: PathBuf,
}

impl Pins {
    /// The pins of this version of the layout below `bpf_dir`.
    pub fn new(bpf_dir: &Path) -> Self {
        Self { base: bpf_dir.to_owned(), version: bpf_dir.join(format!("v{ABI_VERSION}")) }
    }

    /// `--bpf-dir` itself.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// The directory of the maps.
    pub fn maps(&self) -> &Path {
        &self.version
    }

    /// The path of the map `name`.
    pub fn map(&self, name: &str) -> PathBuf {
        self.version.join(name)
    }

    /// The directory of the links.
    pub fn links(&self) -> PathBuf {
        self.version.join("links")
    }

    /// The path of the program `clock`, with which tools compute ages.
    pub fn clock(&self) -> PathBuf {
        self.version.join("clock")
    }

    /// Opens the pinned map `name`.
    ///
    /// # Errors
    /// [`PinError`]; [`PinError::Missing`] if nothing is pinned at the path.
    pub fn open(&self, name: &'static str) -> Result<OwnedFd, PinError> {
        let path = self.map(name);
        lb_sys::obj_get(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => PinError::Missing { path },
            io::ErrorKind::PermissionDenied => PinError::Denied { path },
            _ => PinError::Open { path, source },
        })
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

/// An LRU map in which every CPU has its own share and evicts only from that.
const fn shared_lru<K, V>(name: &'static str, entries: u32) -> PinnedMap {
    map::<K, V>(name, BPF_MAP_TYPE_LRU_HASH, BPF_F_NO_COMMON_LRU, entries, None)
}

/// Minimum capacity of EMBRYONIC in each family.
const EMBRYONIC: u32 = 16_384;
/// Minimum capacity of EMBRYONIC for each CPU.
const EMBRYONIC_PER_CPU: u32 = 2_048;
/// Capacity of FRAGMENTS in each family: fragmented datagrams tracked at once.
const FRAGMENTS: u32 = 16_384;
/// Capacity of NODES in each family.
const NODES: u32 = 16_384;
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
fn possible_cpus() -> u32 {
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
    let embryonic = EMBRYONIC.max(EMBRYONIC_PER_CPU.saturating_mul(possible_cpus()));
    let traffic = sizes.services.min(TRAFFIC_BYTES / size_of::<Traffic>() as u32 / possible_cpus());
    vec![
        hash::<FrontendKey<Address4>, Frontend>("FRONTENDS4", frontends, services),
        hash::<FrontendKey<Address6>, Frontend>("FRONTENDS6", frontends, services),
        trie::<RangeKey<Address4>, u32>("RANGES4", sizes.services, services),
        trie::<RangeKey<Address6>, u32>("RANGES6", sizes.services, services),
        hash::<Address4, u32>("NODES4", NODES, None),
        hash::<Address6, u32>("NODES6", NODES, None),
        array::<Service>("SERVICES", sizes.services, services),
        array::<Name>("NAMES", sizes.services, services),
        array::<Slot>("SLOTS", sizes.slots, Some("--max-slots")),
        array::<Backend<Address4>>("BACKENDS4", sizes.backends, backends),
        array::<Backend<Address6>>("BACKENDS6", sizes.backends, backends),
        array::<SettingsPair>("SETTINGS", 1, None),
        array::<Device>("DEVICES", MAX_DEVICES, None),
        lru::<FlowKey<Address4>, Flow<Address4>>("FLOWS4", sizes.flows, flows),
        lru::<FlowKey<Address6>, Flow<Address6>>("FLOWS6", sizes.flows, flows),
        shared_lru::<FlowKey<Address4>, Flow<Address4>>("EMBRYONIC4", embryonic),
        shared_lru::<FlowKey<Address6>, Flow<Address6>>("EMBRYONIC6", embryonic),
        lru::<FragmentKey<Address4>, Fragment>("FRAGMENTS4", FRAGMENTS, None),
        lru::<FragmentKey<Address6>, Fragment>("FRAGMENTS6", FRAGMENTS, None),
        lru::<AffinityKey, Affinity>("AFFINITY", AFFINITY, None),
        lru::<DatagramKey, Peer>("DATAGRAM_PEERS", DATAGRAM_PEERS, None),
        map::<i32, ConnectedPeer>("SOCKETS", BPF_MAP_TYPE_SK_STORAGE, BPF_F_NO_PREALLOC, 0, None),
        map::<u32, u64>("COUNTERS", BPF_MAP_TYPE_PERCPU_ARRAY, 0, counter::COUNTERS, None),
        map::<u32, Traffic>("TRAFFIC", BPF_MAP_TYPE_PERCPU_ARRAY, 0, traffic, None),
        map::<DropKey, u64>("DROPS", BPF_MAP_TYPE_LRU_PERCPU_HASH, 0, DROPS, None),
    ]
}

impl PinnedMap {
    /// How many entries the pinned map has; `None` if it is not pinned yet.
    ///
    /// # Errors
    /// [`PinError::Layout`] if something else is pinned there.
    pub fn existing_entries(&self, pins: &Pins) -> Result<Option<u32>, PinError> {
        let descriptor = match pins.open(self.name) {
            Err(PinError::Missing { .. }) => return Ok(None),
            result => result?,
        };
        let path = pins.map(self.name);
        let info = lb_sys::map_info(descriptor.as_fd())
            .map_err(|source| PinError::Open { path: path.clone(), source })?;
        if Layout::from(info) != self.layout {
            return Err(PinError::Layout { path, found: info.into(), wanted: self.layout });
        }
        Ok(Some(info.max_entries))
    }
}
