//! What is pinned while maps that programs write are moved, so that the next agent can continue
//! where one was killed.
//!
//! `handover/` has the map that the programs read to know where entries are, and for each map that is
//! moved the one before and the new one: `from-FLOWS4@1`, `to-FLOWS4@2`. Invariant: the directory
//! is complete before the programs are switched, and the pins below `maps/` stay those of the maps
//! before until all entries are copied.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use lb_common::abi::layout::MAPS;
use lb_control::dataplane::DataplaneError;
use lb_sys::TypedMap;

use super::{
    carry,
    former::{Former, FormerMap},
    layouts::{
        convert::Conversion,
        description::{Description, pin_name},
        pinned::Descriptions,
    },
    pins::{Found, PinError, Pins, opened_at},
};

/// The map that says where entries are, as the object has it.
pub const WORD: &str = "HANDOVER";

/// A map, and what it is pinned as.
#[derive(Debug)]
pub struct PinnedAs<'a> {
    /// Its name.
    pub name: &'a str,
    /// The version of its layout.
    pub version: u32,
    /// The map.
    pub map: &'a OwnedFd,
}

/// Pins `word` and the maps before and after.
///
/// # Errors
/// [`PinError::Open`].
pub fn begin<'a>(
    pins: &Pins,
    word: &OwnedFd,
    from: impl Iterator<Item = PinnedAs<'a>>,
    to: impl Iterator<Item = PinnedAs<'a>>,
) -> Result<(), PinError> {
    end(pins)?;
    let directory = pins.handover();
    let pin = |name: &str, map: &OwnedFd| {
        let path = directory.join(name);
        lb_sys::obj_pin(map.as_fd(), &path).map_err(|source| PinError::Open { path, source })
    };
    fs::create_dir_all(&directory)
        .map_err(|source| PinError::Open { path: directory.clone(), source })?;
    for PinnedAs { name, version, map } in from {
        pin(&format!("from-{}", pin_name(name, version)), map)?;
    }
    for PinnedAs { name, version, map } in to {
        pin(&format!("to-{}", pin_name(name, version)), map)?;
    }
    pin(WORD, word)
}

/// Moves the flows of the agent before into the maps that `new` finds by their names.
///
/// # Errors
/// Those of the maps.
pub fn move_flows(
    former: &Former,
    new: &dyn Fn(&str) -> Option<OwnedFd>,
) -> Result<(), DataplaneError> {
    let moved = former.move_into(new).map_err(|source| DataplaneError {
        map: "FLOW_TABLE4",
        operation: "move flows of the agent before".to_owned(),
        source,
    })?;
    tracing::info!(flows = moved.flows, lost = moved.lost, "flows were moved to new maps");
    Ok(())
}

/// Removes the pins of maps of flows that this release does not have.
///
/// # Errors
/// [`PinError::Open`].
pub fn remove_former(pins: &Pins, former: Option<&Former>) -> Result<(), PinError> {
    for map in former.iter().flat_map(|former| &former.maps) {
        let is_own = Description::own(map.name).is_some();
        if !is_own && let Some(found) = pins.found(map.name)? {
            let path = found.path;
            fs::remove_file(&path).map_err(|source| PinError::Open { path, source })?;
        }
    }
    Ok(())
}

/// Removes the directory.
///
/// # Errors
/// [`PinError::Open`].
pub fn end(pins: &Pins) -> Result<(), PinError> {
    let directory = pins.handover();
    for path in entries(&directory)? {
        fs::remove_file(&path).map_err(|source| PinError::Open { path, source })?;
    }
    match fs::remove_dir(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(|source| PinError::Open { path: directory, source }),
    }
}

/// Completes a move that an agent, which was killed, had begun. Returns whether there was one. The
/// caller holds the lock.
///
/// # Errors
/// [`FinishError`]. The next call goes on where this one stopped.
pub fn finish(pins: &Pins) -> Result<bool, FinishError> {
    let directory = pins.handover();
    if !directory.is_dir() {
        return Ok(false);
    }
    // Before the switch all entries are in the maps before, which are pinned as ever.
    if is_switched(&directory)? {
        let descriptions = pins.descriptions()?;
        let maps = entries(&directory)?;
        let named = |prefix: &str| -> Vec<Found> {
            maps.iter().filter_map(|path| found(path, prefix)).collect()
        };
        let (from, to) = (named("from-"), named("to-"));
        for new in &to {
            // A map that this release does not have is of no use to it.
            let Some(name) = known(name_of(new)) else { continue };
            if Former::known(name).is_some() {
                continue;
            }
            let Some(old) = from.iter().find(|old| name_of(old) == name) else { continue };
            let conversion = conversion(&descriptions, name, old, new)?;
            carry::copy_missing(name, &conversion, &old.map, &new.map)?;
        }
        let former = from.iter().filter_map(|old| {
            let name = Former::known(name_of(old))?;
            let (version, path) = (old.version, old.path.clone());
            Some(FormerMap { name, version, path, map: old.map.try_clone().ok()? })
        });
        let former = Former::of(former.collect());
        if let Some(former) = &former {
            let new = |name: &str| to.iter().find(|new| name_of(new) == name)?.map.try_clone().ok();
            move_flows(former, &new)?;
        }
        for new in &to {
            pins.replace_version(name_of(new), new.version, &new.map)?;
        }
        remove_former(pins, former.as_ref())?;
    }
    end(pins)?;
    Ok(true)
}

fn is_switched(directory: &Path) -> Result<bool, FinishError> {
    let path = directory.join(WORD);
    let Some(word) = opened_at(&path)? else { return Ok(false) };
    let read = || TypedMap::<u32, u32>::new(word)?.get(&0);
    let value = read().map_err(|source| PinError::Open { path, source })?;
    Ok(value == Some(1))
}

fn conversion(
    descriptions: &Descriptions,
    name: &str,
    old: &Found,
    new: &Found,
) -> Result<Conversion, FinishError> {
    let describe = |found: &Found| {
        let own = Description::own(name).filter(|own| own.version == found.version);
        descriptions.read(name, found.version).or(own)
    };
    let (Some(from), Some(to)) = (describe(old), describe(new)) else {
        return Err(FinishError::Unknown { map: name.to_owned() });
    };
    Conversion::new(&from, &to)
        .map_err(|mismatch| PinError::unconvertible(name, old, mismatch).into())
}

/// The map that is pinned at `path`, if its name begins with `prefix`.
fn found(path: &Path, prefix: &str) -> Option<Found> {
    let name = path.file_name()?.to_str()?.strip_prefix(prefix)?;
    let version = name.split_once('@')?.1.parse().ok()?;
    let map = opened_at(path).ok()??;
    Some(Found { path: path.to_owned(), version, map })
}

/// The name, as this release has it.
fn known(name: &str) -> Option<&'static str> {
    MAPS.iter().map(|map| map.name).find(|known| *known == name)
}

fn name_of(found: &Found) -> &str {
    let file = found.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let name = file.split_once('-').map_or(file, |(_, name)| name);
    name.split_once('@').map_or(name, |(name, _)| name)
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, PinError> {
    let failed = |source| PinError::Open { path: directory.to_owned(), source };
    match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries
            .map_err(failed)?
            .map(|entry| entry.map(|entry| entry.path()).map_err(failed))
            .collect(),
    }
}

/// An interrupted move could not be completed.
#[derive(Debug, thiserror::Error)]
pub enum FinishError {
    /// A pin cannot be used.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// Entries could not be copied.
    #[error(transparent)]
    Copy(#[from] DataplaneError),
    /// A layout is not known.
    #[error(
        "an agent was killed while it moved map {map}, and the kernel has no description of its \
         layouts: start the lb-agent that was killed"
    )]
    Unknown {
        /// The map.
        map: String,
    },
}
