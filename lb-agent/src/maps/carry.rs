//! Copies the entries of a map into a map of another size or layout.
//!
//! Indices and keys keep their meaning, because flows hold them. Nothing is copied into a map that
//! is too small for what is in use.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_ARRAY;
use lb_control::dataplane::{Capacity, DataplaneError};
use lb_sys::{Memory, RawMap};

use super::{
    flow_table,
    layouts::convert::Conversion,
    pins::Pins,
    read::{failed, read_state},
};

/// The maps that only the agent writes and whose size a flag sets.
const SIZED: [&str; 9] = [
    "FRONTENDS4",
    "FRONTENDS6",
    "RANGES4",
    "RANGES6",
    "SERVICES",
    "NAMES",
    "SLOTS",
    "BACKENDS4",
    "BACKENDS6",
];

/// How the entries of a map get into the map that replaces it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carriage {
    /// They are copied before a program sees the new map, because only the agent writes them.
    Before,
    /// They are copied at the same time, although programs write them: what they write in that
    /// moment is not counted, or a client gets another backend.
    Meanwhile,
    /// They are moved while programs look them up in both maps.
    Moved,
    /// They stay behind: only the kernel knows the sockets that they belong to, or nobody misses
    /// them.
    Left,
}

/// How the entries of the map `name` are taken over.
pub fn carriage(name: &str) -> Carriage {
    match name {
        "NODES4" | "NODES6" | "SETTINGS" | "DEVICES" => Carriage::Before,
        "FLOWS4" | "FLOWS6" | "EMBRYONIC4" | "EMBRYONIC6" | "FRAGMENTS4" | "FRAGMENTS6"
        | "DATAGRAM_PEERS" => Carriage::Moved,
        "AFFINITY" | "TRAFFIC" | "DROPS" | "COUNTERS" => Carriage::Meanwhile,
        "SOCKETS" | "FLOW_EVENTS" => Carriage::Left,
        name if flow_table::MAPS.contains(&name) => Carriage::Left,
        name if needs_room(name) => Carriage::Before,
        _ => Carriage::Left,
    }
}

/// Whether nothing of the map `name` may be left out if the new one is smaller.
pub fn needs_room(name: &str) -> bool {
    SIZED.contains(&name)
}

/// Copies all entries of the map `name` from `old` to `new`, in place of those that it has.
///
/// # Errors
/// [`DataplaneError`] if a map cannot be read or written.
pub fn copy(
    name: &'static str,
    conversion: &Conversion,
    old: &OwnedFd,
    new: &OwnedFd,
) -> Result<(), DataplaneError> {
    copy_all(conversion, old, new, |new, key, value| new.set(key, value))
        .map_err(failed(name, || "copy to a map of another layout or size".to_owned()))
}

/// Copies the entries that `new` does not have: those that it has are newer. Expired and least used
/// ones may be left out if `new` is smaller.
///
/// # Errors
/// [`DataplaneError`] if a map cannot be read or written.
pub fn copy_missing(
    name: &'static str,
    conversion: &Conversion,
    old: &OwnedFd,
    new: &OwnedFd,
) -> Result<(), DataplaneError> {
    copy_all(conversion, old, new, |new, key, value| new.add(key, value).map(drop))
        .map_err(failed(name, || "copy to a map of another layout or size".to_owned()))
}

fn copy_all(
    conversion: &Conversion,
    old: &OwnedFd,
    new: &OwnedFd,
    write: impl Fn(&RawMap, &[u8], &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let (old, new) = (RawMap::new(old.try_clone()?)?, RawMap::new(new.try_clone()?)?);
    if new.info().map_type == BPF_MAP_TYPE_ARRAY as u32 {
        return copy_array(conversion, &old, &new);
    }
    // The index of a per-CPU array.
    let limit = (new.is_per_cpu() && new.info().key_size == 4).then_some(new.info().max_entries);
    let is_per_cpu = old.is_per_cpu();
    old.visit(|key, value| {
        let index = key.try_into().map(u32::from_ne_bytes).unwrap_or(0);
        if limit.is_some_and(|limit| index >= limit || is_zero(value)) {
            return Ok(());
        }
        match conversion.key(key) {
            Some(key) => write(&new, &key, &conversion.value(value, is_per_cpu)),
            None => Ok(()),
        }
    })
}

/// By memory that is shared with the programs: an array may have a million entries.
fn copy_array(conversion: &Conversion, old: &RawMap, new: &RawMap) -> io::Result<()> {
    let memory = |map: &RawMap, writable| {
        Memory::new(map.as_fd().try_clone_to_owned()?, map.info().value_size as usize, writable)
    };
    let (mut from, mut to) = (memory(old, false)?, memory(new, true)?);
    let mut value = vec![0; old.info().value_size as usize];
    for index in 0..from.entries().min(to.entries()) {
        from.load(index, &mut value)?;
        if !is_zero(&value) {
            to.store(index, 0, &conversion.value(&value, false))?;
        }
    }
    Ok(())
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// A map is too small for the entries in use.
#[derive(Debug, thiserror::Error)]
#[error(
    "{flag} {wanted} is too small for the entries of map {map}: give at least {used}, or remove \
     Services first; nothing was changed"
)]
pub struct TooSmall {
    map: &'static str,
    flag: &'static str,
    used: u32,
    wanted: u32,
}

/// Why the sizes cannot be changed.
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    /// A map is too small.
    #[error(transparent)]
    TooSmall(#[from] TooSmall),
    /// A map cannot be read.
    #[error(transparent)]
    Read(#[from] DataplaneError),
}

/// Checks that the entries of the pinned maps fit into maps of this `capacity`.
///
/// # Errors
/// [`FitError::TooSmall`], with the flag to raise.
pub fn check_fit(pins: &Pins, capacity: &Capacity) -> Result<(), FitError> {
    let needed = read_state(pins)?.needed();
    let (services, backends) = ("--max-services", "--max-backends");
    let rows = [
        ("SERVICES", services, needed.services, capacity.services),
        ("FRONTENDS4", services, needed.frontends4.div_ceil(2), capacity.frontends4 / 2),
        ("FRONTENDS6", services, needed.frontends6.div_ceil(2), capacity.frontends6 / 2),
        ("RANGES4", services, needed.ranges4, capacity.ranges4),
        ("RANGES6", services, needed.ranges6, capacity.ranges6),
        ("SLOTS", "--max-slots", needed.slots, capacity.slots),
        ("BACKENDS4", backends, needed.backends4, capacity.backends4),
        ("BACKENDS6", backends, needed.backends6, capacity.backends6),
    ];
    for (map, flag, used, wanted) in rows {
        if used > wanted {
            return Err(TooSmall { map, flag, used, wanted }.into());
        }
    }
    Ok(())
}

/// Whether both are the same map.
pub fn is_same(one: &OwnedFd, other: &OwnedFd) -> bool {
    let id = |map: &OwnedFd| lb_sys::map_info(map.as_fd()).ok().map(|info| info.id);
    id(one).is_some() && id(one) == id(other)
}
