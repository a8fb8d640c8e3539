//! Loads the programs while another agent may still run, and pins their maps once it has ended.
//!
//! A map of the same layout and size is shared with the agent before. A map of another one is a new
//! one, which is not pinned and which no packet sees until [`Prepared::take_maps`] has filled
//! it. Invariant: before that, nothing that the other agent uses is changed.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process, thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use lb_common::{
    abi::{
        conversion,
        settings::{Settings, SettingsPair},
    },
    balance::track,
};
use lb_control::dataplane::DataplaneError;
use lb_sys::TypedMap;
use tracing::{debug, info, warn};

use super::load::{
    Constants, Conversions, LoadError, MapSource, Programs, load_object, pin_programs,
};
use crate::{
    maps::{
        bpffs,
        carry::{self, Carriage, FitError},
        flow_table,
        former::Former,
        handover::{self, PinnedAs, WORD},
        layouts::{
            convert::{self, Conversion, Mismatch},
            description::{self, Description},
        },
        pins::{Existing, PinError, PinnedMap, Pins, capacity, pinned_maps},
        timeouts,
    },
    options::sizes::Sizes,
};

/// Longer than any run of a program: after it, none still inserts into the maps before.
const LONGEST_RUN: Duration = Duration::from_millis(1);

/// Loaded programs, and the maps that they use.
#[derive(Debug)]
pub struct Prepared {
    /// The programs that stay attached.
    pub programs: Programs,
    /// Programs that also know the maps of the agent before, if maps that programs write get
    /// another layout or size.
    pub handover: Option<Programs>,
    /// The maps to move once the programs of `handover` are at every hook.
    pub flows: Option<Flows>,
    sizes: Sizes,
    maps: Vec<Used>,
}

/// Maps that programs write, with another layout or size than those of the agent before.
#[derive(Debug)]
pub struct Flows {
    word: OwnedFd,
    maps: Vec<Used>,
    /// The flows of the agent before, if they are in other maps.
    former: Option<Former>,
    /// The maps of flows of this agent, if they are new ones.
    table: Vec<Used>,
}

#[derive(Debug)]
struct Used {
    name: &'static str,
    map: OwnedFd,
    /// The map that was pinned when the programs were loaded.
    pinned: Option<OwnedFd>,
    /// The layout of that.
    before: Description,
    conversion: Conversion,
}

impl Used {
    fn is_new(&self) -> bool {
        !self.pinned.as_ref().is_some_and(|pinned| carry::is_same(pinned, &self.map))
    }

    fn pin(&self, pins: &Pins) -> Result<(), PinError> {
        pins.replace(self.name, &self.map)
    }

    /// The earlier map, if this one replaces it.
    fn replaced(&self) -> Option<&OwnedFd> {
        self.pinned.as_ref().filter(|_| self.is_new())
    }

    fn is_moved(&self) -> bool {
        carry::carriage(self.name) == Carriage::Moved && self.replaced().is_some()
    }
}

/// Loads the programs against the pinned maps, and against new ones where these are missing or have
/// another layout or size.
///
/// # Errors
/// [`LoadError`], with the remedy.
pub fn prepare(pins: &Pins, sizes: &Sizes, constants: Constants) -> Result<Prepared, LoadError> {
    bpffs::ensure(pins.base())?;
    if bpffs::dies_with_mount_namespace(pins.base()) == Some(true) {
        warn!(
            bpf_dir = %pins.base().display(),
            "this bpffs belongs to a private mount namespace: Service traffic stops when its last \
             process exits; mount the host's /sys/fs/bpf instead"
        );
    }
    let staging = Staging::make(pins)?;
    let (mut sources, mut existing) = (Vec::new(), Vec::new());
    for map in pinned_maps(sizes) {
        let found = map.existing(pins)?;
        sources.push(source(&staging, &map, found.as_ref()));
        existing.push(found);
    }
    let was_table = flow_table::fits_seed(|name| {
        let at = sources.iter().position(|source| source.name == name)?;
        existing.get(at)?.as_ref().map(|existing| &existing.found.map)
    });
    let has_new_flows = renew_flows(&staging, sizes, &existing, &mut sources);
    let former = if has_new_flows { Former::found(pins, was_table)? } else { None };
    let converted = existing.iter().flatten().filter(|found| found.before.is_some()).count();
    if converted > 0 {
        info!(
            maps = converted,
            "maps of the agent before have another layout: their entries will be converted"
        );
    }
    let programs = load_object(&sources, constants, None)?;
    let mut maps = Vec::new();
    for (source, found) in sources.iter().zip(existing) {
        maps.push(used(source, found)?);
    }
    if has_new_flows && let Some(seed) = maps.iter().find(|used| used.name == flow_table::SEED) {
        let buckets = flow_table::buckets(sizes.flows);
        let write = || flow_table::write_seed(seed.map.try_clone()?, [buckets; 2]);
        write().map_err(|source| PinError::Open { path: pins.map(seed.name), source })?;
    }
    let moved: Vec<Used> = maps.extract_if(.., |used| used.is_moved()).collect();
    let is_of_table = |used: &mut Used| former.is_some() && is_of_flows(used.name);
    let table: Vec<Used> = maps.extract_if(.., is_of_table).collect();
    let mut prepared = Prepared { programs, handover: None, flows: None, sizes: *sizes, maps };
    if moved.is_empty() && former.is_none() {
        return Ok(prepared);
    }
    for map in former.iter().flat_map(|former| &former.maps) {
        let name = Former::name_in_object(map.name);
        sources.push(MapSource { name, path: map.path.clone(), entries: 1 });
    }
    for used in &moved {
        if let Some(found) = pins.found(used.name)? {
            let name = name_before(used.name);
            sources.push(MapSource { name, path: found.path, entries: 1 });
        }
    }
    let path = staging.path(WORD);
    sources.push(MapSource { name: WORD, path: path.clone(), entries: 1 });
    let conversions = conversions(&moved, former.as_ref())?;
    prepared.handover = Some(load_object(&sources, constants, Some(&conversions))?);
    prepared.flows = Some(Flows { word: open(&path)?, maps: moved, former, table });
    Ok(prepared)
}

/// Whether the map `name` belongs to the table of flows.
fn is_of_flows(name: &str) -> bool {
    flow_table::MAPS.contains(&name)
}

fn used(source: &MapSource, found: Option<Existing>) -> Result<Used, LoadError> {
    let (name, path) = (source.name, &source.path);
    let unknown = |mismatch| {
        let (path, version) = (path.clone(), description::version(name));
        let mismatch = Box::new(mismatch);
        PinError::Convert { map: name.to_owned(), path, found: version, wanted: version, mismatch }
    };
    let own = Description::own(name)
        .ok_or_else(|| unknown(Mismatch::Unknown { version: description::version(name) }))?;
    let (pinned, before) = match found {
        Some(Existing { found, before, .. }) => (Some(found.map), before),
        None => (None, None),
    };
    let before = before.unwrap_or_else(|| own.clone());
    let conversion = Conversion::new(&before, &own).map_err(unknown)?;
    Ok(Used { name, map: open(path)?, pinned, before, conversion })
}

/// The name of the map before in the object of the handover.
fn name_before(name: &str) -> &'static str {
    match name {
        "FRAGMENTS4" => "PREVIOUS_FRAGMENTS4",
        "FRAGMENTS6" => "PREVIOUS_FRAGMENTS6",
        _ => "PREVIOUS_PEERS",
    }
}

/// How programs convert the entries of the maps that are moved, and where flows are.
fn conversions(moved: &[Used], former: Option<&Former>) -> Result<Conversions, LoadError> {
    let words = |name: &str| -> Result<conversion::ConversionWords, LoadError> {
        let Some(used) = moved.iter().find(|used| used.name == name) else {
            return Ok([0; conversion::WORDS]);
        };
        let refused = |mismatch| PinError::Convert {
            map: used.name.to_owned(),
            path: used.name.into(),
            found: used.before.version,
            wanted: description::version(used.name),
            mismatch: Box::new(mismatch),
        };
        let own = Description::own(used.name)
            .ok_or_else(|| refused(Mismatch::Unknown { version: used.before.version }))?;
        Ok(convert::words(1, &used.before, &own).map_err(refused)?)
    };
    Ok(Conversions {
        words: vec![
            ("CONVERT_FRAGMENTS4", words("FRAGMENTS4")?),
            ("CONVERT_FRAGMENTS6", words("FRAGMENTS6")?),
            ("CONVERT_PEERS", words("DATAGRAM_PEERS")?),
        ],
        flows_before: former.map_or(conversion::SAME, Former::kind),
    })
}

/// Loads the programs and pins their maps, on a node where nothing is pinned.
///
/// # Errors
/// [`LoadError`], with the remedy.
pub fn load(pins: &Pins, sizes: &Sizes, constants: Constants) -> Result<Programs, LoadError> {
    let mut prepared = prepare(pins, sizes, constants)?;
    prepared.pin_missing(pins)?;
    pin_programs(pins, &mut prepared.programs)?;
    Ok(prepared.programs)
}

/// Where the programs get a map from: its pin if that has the right layout and size, else a new
/// map.
fn source(staging: &Staging, map: &PinnedMap, existing: Option<&Existing>) -> MapSource {
    let new = MapSource { name: map.name, path: staging.path(map.name), entries: map.max_entries };
    let Some(Existing { found, entries, before }) = existing else { return new };
    if let Some(before) = before {
        let (from, to) = (before.version, description::version(map.name));
        debug!(map = map.name, from, to, "the map gets another layout");
        return new;
    }
    if *entries == map.max_entries || !map.can_resize() {
        return MapSource { path: found.path.clone(), entries: *entries, ..new };
    }
    info!(map = map.name, from = entries, to = map.max_entries, "the map gets another size");
    new
}

/// Gets all maps of flows anew if one of them is a new one, or if the seed is for other numbers of
/// buckets than the maps have: an agent may have been killed between two pins. None is of use
/// without the others. Returns whether they are new.
fn renew_flows(
    staging: &Staging,
    sizes: &Sizes,
    existing: &[Option<Existing>],
    sources: &mut [MapSource],
) -> bool {
    let new = |source: &MapSource| staging.path(source.name);
    let has_new =
        sources.iter().any(|source| is_of_flows(source.name) && source.path == new(source));
    let found = |name| {
        let at = sources.iter().position(|source| source.name == name)?;
        existing.get(at)?.as_ref()
    };
    if !has_new && flow_table::fits_seed(|name| found(name).map(|found| &found.found.map)) {
        return false;
    }
    for map in pinned_maps(sizes).iter().filter(|map| is_of_flows(map.name)) {
        if let Some(source) = sources.iter_mut().find(|source| source.name == map.name) {
            (source.path, source.entries) = (new(source), map.max_entries);
        }
    }
    true
}

fn open(path: &Path) -> Result<OwnedFd, LoadError> {
    lb_sys::obj_get(path)
        .map_err(|source| LoadError::Pin(PinError::Open { path: path.to_owned(), source }))
}

/// A directory of temporary pins, by which the loader creates and finds maps.
struct Staging(PathBuf);

impl Staging {
    fn make(pins: &Pins) -> Result<Self, LoadError> {
        // Agents in two containers may have the same process id.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let path = pins.staging(&format!("{}-{now}", process::id()));
        fs::create_dir_all(&path)
            .map_err(|source| LoadError::Directory { path: path.clone(), source })?;
        Ok(Self(path))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let removed = fs::read_dir(&self.0).and_then(|mut entries| {
            entries.try_for_each(|entry| fs::remove_file(entry?.path()))?;
            fs::remove_dir(&self.0)
        });
        if let Err(error) = removed {
            warn!(path = %self.0.display(), %error, "cannot remove temporary pins: remove this directory");
        }
    }
}

impl Prepared {
    /// Whether the same maps are pinned as when the programs were loaded.
    pub fn is_current(&self, pins: &Pins) -> bool {
        let flows = self.flows.iter().flat_map(|flows| flows.maps.iter().chain(&flows.table));
        let mut maps = self.maps.iter().chain(flows);
        let former = self.flows.iter().flat_map(|flows| &flows.former);
        let mut former = former.flat_map(|former| &former.maps);
        maps.all(|used| match (pins.found(used.name), &used.pinned) {
            (Ok(Some(now)), Some(then)) => carry::is_same(&now.map, then),
            (Ok(None), None) => true,
            _ => false,
        }) && former.all(|then| {
            pins.found(then.name)
                .is_ok_and(|now| now.is_some_and(|now| carry::is_same(&now.map, &then.map)))
        })
    }

    /// Fills the new maps, except the maps of flows, and pins them. The caller holds the lock, so no
    /// other process writes to the maps.
    ///
    /// # Errors
    /// [`TakeError`]. If the entries in use do not fit, nothing is changed.
    pub fn take_maps(&self, pins: &Pins) -> Result<(), TakeError> {
        let needs_room = |used: &Used| carry::needs_room(used.name) && used.replaced().is_some();
        if self.maps.iter().any(needs_room) {
            carry::check_fit(pins, &capacity(&self.sizes))?;
        }
        pins.describe_own()?;
        for used in &self.maps {
            if let Some(old) = used.replaced()
                && carry::carriage(used.name) != Carriage::Left
            {
                carry::copy(used.name, &used.conversion, old, &used.map)?;
            }
            if used.name == "SETTINGS" {
                complete_settings(&used.map)?;
            }
        }
        for used in &self.maps {
            if used.is_new() {
                used.pin(pins)?;
            } else {
                // Those that an agent has left which ended between two pins.
                pins.remove_others(used.name, description::version(used.name))?;
            }
        }
        Ok(self.maps.iter().try_for_each(|used| pins.keep_map(used.name, &used.map))?)
    }

    /// Pins the maps that are not pinned.
    ///
    /// # Errors
    /// [`PinError`].
    pub fn pin_missing(&self, pins: &Pins) -> Result<(), PinError> {
        pins.make_directories()?;
        pins.describe_own()?;
        let mut missing = self.maps.iter().filter(|used| used.pinned.is_none());
        missing.try_for_each(|used| used.pin(pins))
    }

    /// What programs have written to the maps before while they were replaced, and a program would
    /// miss.
    ///
    /// # Errors
    /// [`TakeError`].
    pub fn catch_up(&self) -> Result<(), TakeError> {
        for used in self.maps.iter().filter(|used| used.name == "AFFINITY") {
            if let Some(old) = used.replaced() {
                carry::copy_missing(used.name, &used.conversion, old, &used.map)?;
            }
        }
        Ok(())
    }
}

impl Flows {
    /// Moves the entries into the new maps, and pins these.
    ///
    /// # Errors
    /// [`TakeError`]. Entries then stay known to the programs of the handover, and the next agent
    /// completes the move.
    pub fn move_all(&self, pins: &Pins) -> Result<(), TakeError> {
        let pin = |name, version, map| PinnedAs { name, version, map };
        let from = self
            .maps
            .iter()
            .filter_map(|used| Some(pin(used.name, used.before.version, used.replaced()?)));
        let former = self.former.iter().flat_map(|former| &former.maps);
        let from = from.chain(former.map(|map| pin(map.name, map.version, &map.map)));
        let to = self.maps.iter().chain(&self.table);
        let to = to.map(|used| pin(used.name, description::version(used.name), &used.map));
        handover::begin(pins, &self.word, from, to)?;
        let flip = || TypedMap::<u32, u32>::new(self.word.try_clone()?)?.set(&0, &1);
        flip().map_err(|source| DataplaneError {
            map: WORD,
            operation: "switch to the new maps of flows".to_owned(),
            source,
        })?;
        thread::sleep(LONGEST_RUN);
        for used in &self.maps {
            if let Some(old) = used.replaced() {
                carry::copy_missing(used.name, &used.conversion, old, &used.map)?;
            }
            #[cfg(feature = "next-layout")]
            kill_if_asked();
        }
        if let Some(former) = &self.former {
            #[cfg(feature = "next-layout")]
            kill_if_asked();
            let new = |name: &str| {
                let used = self.table.iter().find(|used| used.name == name)?;
                used.map.try_clone().ok()
            };
            handover::move_flows(former, &new)?;
        }
        for used in self.maps.iter().chain(&self.table) {
            used.pin(pins)?;
            pins.keep_map(used.name, &used.map)?;
        }
        handover::remove_former(pins, self.former.as_ref())?;
        Ok(handover::end(pins)?)
    }
}

/// Fills in what settings of releases up to 0.1.0 do not have. This agent writes its own only once it
/// has the first lists.
fn complete_settings(map: &OwnedFd) -> Result<(), DataplaneError> {
    let complete = || -> io::Result<()> {
        let map = TypedMap::<u32, SettingsPair>::new(map.try_clone()?)?;
        let Some(mut pair) = map.get(&0)? else { return Ok(()) };
        let ticks_per_second = lb_sys::ticks_per_second()?;
        let lifetimes = track::lifetimes(&timeouts::timeouts(ticks_per_second));
        for settings in pair.copies.iter_mut().filter(|settings| settings.ticks_per_second != 0) {
            settings.time_shift = Settings::time_shift_of(ticks_per_second);
            settings.flow_lifetimes = lifetimes;
        }
        map.set(&0, &pair)
    };
    complete().map_err(|source| DataplaneError {
        map: "SETTINGS",
        operation: "complete".to_owned(),
        source,
    })
}

/// Tests only: ends this process as SIGKILL does, when one of the maps is copied.
#[cfg(feature = "next-layout")]
fn kill_if_asked() {
    if std::env::var_os("LB_KILL_WHILE_MOVING").is_some() {
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
}

/// Maps could not be taken over.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// The entries in use do not fit.
    #[error(transparent)]
    Fit(#[from] FitError),
    /// A pin could not be made.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A map could not be copied.
    #[error(transparent)]
    Map(#[from] DataplaneError),
}
