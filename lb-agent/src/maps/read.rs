//! Reads pinned maps, for the commands and for the next agent.

use std::{io, os::fd::OwnedFd};

use bytemuck::Pod;
use lb_common::abi::{
    frontend::{Frontend, FrontendKey},
    service::{Name, Slot},
    settings::{Settings, SettingsPair},
};
use lb_control::{
    dataplane::{DataplaneError, PinnedState},
    model::text::Clean,
};
use lb_sys::{RawMap, TypedMap};

use super::{
    layouts::{
        convert::{Conversion, Mismatch},
        description::Description,
    },
    mapped::MappedArray,
    pins::{PinError, Pins},
};

/// Opens the pinned map `name` by `open`.
pub(crate) fn opened<T>(
    pins: &Pins,
    name: &'static str,
    open: impl FnOnce(OwnedFd) -> io::Result<T>,
) -> Result<T, PinError> {
    open(pins.open(name)?).map_err(|source| PinError::Open { path: pins.map(name), source })
}

/// Every entry of a pinned array, which is mapped only while it is read: the kernel counts a mapped
/// array as memory of the process.
pub fn read_array<T: Pod>(pins: &Pins, map: &'static str) -> Result<Vec<T>, DataplaneError> {
    let read = || -> io::Result<Vec<T>> {
        if let Some(entries) = converted::<u32, T>(pins, map)? {
            return Ok(entries.into_iter().map(|(_, value)| value).collect());
        }
        let descriptor = pins.open(map).map_err(io::Error::other)?;
        MappedArray::readable(descriptor)?.load_all()
    };
    read().map_err(failed(map, || "read of every entry".to_owned()))
}

/// The whole pinned state.
///
/// # Errors
/// [`DataplaneError`] if a map is missing or cannot be read.
pub fn read_state(pins: &Pins) -> Result<PinnedState, DataplaneError> {
    let names = read_array::<Name>(pins, "NAMES")?;
    let slots = read_array::<Slot>(pins, "SLOTS")?;
    Ok(PinnedState {
        frontends4: read_frontends(pins, "FRONTENDS4")?,
        frontends6: read_frontends(pins, "FRONTENDS6")?,
        ranges4: read_keys(pins, "RANGES4")?,
        ranges6: read_keys(pins, "RANGES6")?,
        nodes4: read_keys(pins, "NODES4")?,
        nodes6: read_keys(pins, "NODES6")?,
        names: (0..).zip(names).filter(|(_, name)| name.length > 0).collect(),
        services: read_array(pins, "SERVICES")?,
        slots: slots.into_iter().map(|slot| slot.backend).collect(),
        backends4: read_array(pins, "BACKENDS4")?,
        backends6: read_array(pins, "BACKENDS6")?,
        settings: read_settings(pins)?,
    })
}

/// The settings in force.
///
/// # Errors
/// [`DataplaneError`] if the map is missing or cannot be read.
pub fn read_settings(pins: &Pins) -> Result<Settings, DataplaneError> {
    let pair = read_array::<SettingsPair>(pins, "SETTINGS")?;
    Ok(pair.first().map(settings_in_force).unwrap_or_default())
}

fn read_frontends<A>(
    pins: &Pins,
    map: &'static str,
) -> Result<Vec<(FrontendKey<A>, Frontend)>, DataplaneError>
where
    FrontendKey<A>: Pod,
{
    let failed = |error| failed(map, || "open".to_owned())(error);
    if let Some(entries) = converted(pins, map).map_err(failed)? {
        return Ok(entries);
    }
    let table = opened(pins, map, TypedMap::new).map_err(io::Error::other).map_err(failed)?;
    read_hash(&table, map)
}

/// Every entry of a map that an agent with another layout has pinned, converted; `None` if the map
/// has the layout of this release.
fn converted<K: Pod, V: Pod>(pins: &Pins, map: &str) -> io::Result<Option<Vec<(K, V)>>> {
    let Some(found) = pins.found(map).map_err(io::Error::other)? else { return Ok(None) };
    let Some(own) = Description::own(map).filter(|own| own.version != found.version) else {
        return Ok(None);
    };
    let descriptions = pins.descriptions().map_err(io::Error::other)?;
    let unknown = Mismatch::Unknown { version: found.version };
    let conversion = descriptions
        .read(map, found.version)
        .ok_or(unknown)
        .and_then(|before| Conversion::new(&before, &own))
        .map_err(|mismatch| io::Error::other(PinError::unconvertible(map, &found, mismatch)))?;
    let mut entries = Vec::new();
    RawMap::new(found.map)?.visit(|key, value| {
        if let Some(key) = conversion.key(key) {
            let value = conversion.value(value, false);
            entries.push((read_unaligned(&key)?, read_unaligned(&value)?));
        }
        Ok(())
    })?;
    Ok(Some(entries))
}

fn read_unaligned<T: Pod>(bytes: &[u8]) -> io::Result<T> {
    bytemuck::try_pod_read_unaligned(bytes).map_err(|error| io::Error::other(error.to_string()))
}

/// Every entry of a hash.
pub(crate) fn read_hash<K: Pod, V: Pod>(
    map: &TypedMap<K, V>,
    name: &'static str,
) -> Result<Vec<(K, V)>, DataplaneError> {
    let mut entries = Vec::new();
    map.visit(|keys, values| {
        entries.extend(keys.iter().copied().zip(values.iter().copied()));
        true
    })
    .map_err(failed(name, || "read of every entry".to_owned()))?;
    Ok(entries)
}

/// Every entry of a trie, with two system calls each: kernels before 5.13 have no batches of tries.
pub(crate) fn read_trie<K: Pod, V: Pod>(
    map: &TypedMap<K, V>,
    name: &'static str,
) -> Result<Vec<(K, V)>, DataplaneError> {
    let read = || -> io::Result<Vec<(K, V)>> {
        let entry = |key| Ok(map.get(&key)?.map(|value| (key, value)));
        map.keys()?.into_iter().filter_map(|key| entry(key).transpose()).collect()
    };
    read().map_err(failed(name, || "read of every entry".to_owned()))
}

/// Every key of a map that is a set.
pub(crate) fn read_keys<K: Pod>(pins: &Pins, map: &'static str) -> Result<Vec<K>, DataplaneError> {
    let read = || {
        if let Some(entries) = converted::<K, u32>(pins, map)? {
            return Ok(entries.into_iter().map(|(key, _)| key).collect());
        }
        opened(pins, map, TypedMap::<K, u32>::new).map_err(io::Error::other)?.keys()
    };
    read().map_err(failed(map, || "read of every key".to_owned()))
}

/// The active copy of the settings.
pub(crate) fn settings_in_force(pair: &SettingsPair) -> Settings {
    pair.copies[usize::from(pair.active == 1)]
}

/// Wraps an I/O error with its map and operation.
pub(crate) fn failed<F: FnOnce() -> String>(
    map: &'static str,
    operation: F,
) -> impl FnOnce(io::Error) -> DataplaneError + use<F> {
    move |source| DataplaneError { map, operation: operation(), source }
}

/// The text of a name, fit for a terminal whatever the map holds.
pub(crate) fn text_of(name: &Name) -> String {
    let text = name.text.get(..usize::from(name.length)).unwrap_or(&name.text);
    Clean(&String::from_utf8_lossy(text)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_fit_for_a_terminal() {
        let mut name =
            Name { text: [0; Name::CAPACITY], length: 0, family: 4, protocol: 6, zero: 0 };
        for (text, shown) in
            [("shop/web:http", "shop/web:http"), ("a\x1b[31mb\n", r"a\u{1b}[31mb\n")]
        {
            name.text[..text.len()].copy_from_slice(text.as_bytes());
            name.length = text.len() as u8;
            assert_eq!(text_of(&name), shown);
        }
    }
}
