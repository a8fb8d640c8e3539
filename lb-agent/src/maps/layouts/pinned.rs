//! The map `layouts@1`, in which agents leave the descriptions of their maps.
//!
//! A key is the name of a pin, `FRONTENDS4@1`; its value is the text of the description. An agent adds
//! its own before it pins a map, so every pinned map has one. Its layout never changes.

use std::{io, os::fd::AsFd, path::Path};

use aya_obj::generated::{BPF_F_NO_PREALLOC, bpf_map_type::BPF_MAP_TYPE_HASH};
use lb_common::abi::layout::MAPS;
use lb_sys::{NewMap, RawMap};

use super::description::{Description, pin_name};

const KEY: usize = 32;
const VALUE: usize = 16_384;
const ENTRIES: u32 = 256;

/// The descriptions in the kernel.
#[derive(Debug)]
pub struct Descriptions(Option<RawMap>);

impl Descriptions {
    /// Opens the map that is pinned at `path`; without one there are no descriptions.
    ///
    /// # Errors
    /// Those of BPF_OBJ_GET except ENOENT.
    pub fn open(path: &Path) -> io::Result<Self> {
        match lb_sys::obj_get(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self(None)),
            map => Ok(Self(Some(RawMap::new(map?)?))),
        }
    }

    /// The description of a map; `None` if there is none that this release can read or knows.
    pub fn read(&self, map: &str, version: u32) -> Option<Description> {
        self.left(map, version).or_else(|| Description::former(map, version))
    }

    /// The description of a map that an agent has left.
    fn left(&self, map: &str, version: u32) -> Option<Description> {
        let text = self.0.as_ref()?.get(&key(&pin_name(map, version))).ok()??;
        let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
        let description = Description::parse(std::str::from_utf8(&text[..end]).ok()?)?;
        (description.map == map && description.version == version).then_some(description)
    }

    /// Adds those of this release to the map at `path`, which is created if there is none. The caller
    /// holds the lock.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn write_own(path: &Path) -> io::Result<()> {
        let map = match Self::open(path)?.0 {
            Some(map) => map,
            None => create(path)?,
        };
        for layout in MAPS {
            let mut value = Description::of(layout).to_string().into_bytes();
            if value.len() >= VALUE {
                return Err(io::Error::other(format!("too long for {}", layout.name)));
            }
            value.resize(VALUE, 0);
            map.set(&key(&pin_name(layout.name, layout.version)), &value)?;
        }
        Ok(())
    }
}

fn create(path: &Path) -> io::Result<RawMap> {
    let map = RawMap::create(NewMap {
        name: "LAYOUTS",
        map_type: BPF_MAP_TYPE_HASH as u32,
        key_size: KEY as u32,
        value_size: VALUE as u32,
        max_entries: ENTRIES,
        flags: BPF_F_NO_PREALLOC,
    })?;
    lb_sys::obj_pin(map.as_fd(), path)?;
    Ok(map)
}

fn key(name: &str) -> [u8; KEY] {
    let mut key = [0; KEY];
    for (to, from) in key.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    key
}
