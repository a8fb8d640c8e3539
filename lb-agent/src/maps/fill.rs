//! How full the pinned maps are.

use std::{io, os::fd::AsFd};

use bytemuck::Pod;
use lb_common::abi::{
    address::{Address4, Address6},
    affinity::{Affinity, AffinityKey},
    flow_table::WAYS,
    fragment::{Fragment, FragmentKey},
    service::Service,
    settings::Device,
    socket::{DatagramKey, Peer},
};
use lb_control::dataplane::{DataplaneError, PinnedState};
use lb_sys::TypedMap;
use serde::Serialize;

use super::{
    flow_table::{FlowAddress, FlowTable, Flows as _},
    pins::{PinError, Pins, pinned_maps},
    read::{failed, opened, read_array, read_state},
};
use crate::options::sizes::Sizes;

/// A pinned map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fill {
    /// Its name.
    pub map: &'static str,
    /// The used entries; null where no entry is ever free, or they cannot be counted.
    pub entries: Option<u64>,
    /// The capacity; 0 if there is no limit.
    pub max_entries: u64,
    /// The flag of `run` that sets the capacity, if one does.
    pub flag: Option<&'static str>,
}

/// The maps could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// A map is missing or has another layout.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A map could not be read.
    #[error(transparent)]
    Read(#[from] DataplaneError),
}

/// The fill of every pinned map.
///
/// # Errors
/// [`FillError`]
pub fn fills(pins: &Pins) -> Result<Vec<Fill>, FillError> {
    // If nothing is pinned, this error says so, instead of naming one missing map.
    pins.open("SETTINGS")?;
    let state = read_state(pins)?;
    // Names and flags; the capacities are those of the kernel's maps.
    let maps = pinned_maps(&Sizes { services: 1, backends: 1, slots: 1, flows: 1 });
    maps.iter()
        .map(|map| {
            let path = pins.map(map.name);
            let info = lb_sys::map_info(pins.open(map.name)?.as_fd())
                .map_err(|source| PinError::Open { path, source })?;
            Ok(Fill {
                map: map.name,
                entries: entries(pins, &state, map.name)?,
                max_entries: u64::from(info.max_entries) * places(map.name),
                flag: map.flag,
            })
        })
        .collect()
}

/// How many entries there is room for in each element of a map.
fn places(map: &str) -> u64 {
    if [Address4::TABLE, Address6::TABLE].contains(&map) { WAYS as u64 } else { 1 }
}

fn entries(
    pins: &Pins,
    state: &PinnedState,
    map: &'static str,
) -> Result<Option<u64>, DataplaneError> {
    let used = match map {
        "FRONTENDS4" => state.frontends4.len() as u64,
        "FRONTENDS6" => state.frontends6.len() as u64,
        "RANGES4" => state.ranges4.len() as u64,
        "RANGES6" => state.ranges6.len() as u64,
        "NODES4" => state.nodes4.len() as u64,
        "NODES6" => state.nodes6.len() as u64,
        "SERVICES" | "NAMES" => state.names.len() as u64,
        "SLOTS" => slots(state),
        "BACKENDS4" => state.backends4.iter().filter(|backend| backend.sets != 0).count() as u64,
        "BACKENDS6" => state.backends6.iter().filter(|backend| backend.sets != 0).count() as u64,
        "DEVICES" => {
            let devices = read_array::<Device>(pins, map)?;
            devices.iter().filter(|device| device.ifindex != 0).count() as u64
        }
        Address4::TABLE => flows::<Address4>(pins)?,
        Address6::TABLE => flows::<Address6>(pins)?,
        "FRAGMENTS4" => count::<FragmentKey<Address4>, Fragment>(pins, map)?,
        "FRAGMENTS6" => count::<FragmentKey<Address6>, Fragment>(pins, map)?,
        "AFFINITY" => count::<AffinityKey, Affinity>(pins, map)?,
        "DATAGRAM_PEERS" => count::<DatagramKey, Peer>(pins, map)?,
        _ => return Ok(None),
    };
    Ok(Some(used))
}

/// The slots of all sets, without the rest of their blocks.
fn slots(state: &PinnedState) -> u64 {
    let services = state.names.iter().filter_map(|(index, _)| state.services.get(*index as usize));
    let ports = services.filter(|service| service.flags & Service::ADDRESS == 0);
    ports.map(|port| u64::from(port.cluster.length()) + u64::from(port.local.length())).sum()
}

fn flows<A: FlowAddress>(pins: &Pins) -> Result<u64, DataplaneError> {
    let counted = || Ok(FlowTable::<A>::readable(pins).map_err(io::Error::other)?.live().count());
    let counted = counted().map_err(failed(A::TABLE, || "count of flows".to_owned()))?;
    Ok(counted as u64)
}

fn count<K: Pod, V: Pod>(pins: &Pins, map: &'static str) -> Result<u64, DataplaneError> {
    let counted = || -> io::Result<u64> {
        let table = opened(pins, map, TypedMap::<K, V>::new).map_err(io::Error::other)?;
        let mut count = 0;
        table.visit(|keys, _| {
            count += keys.len() as u64;
            true
        })?;
        Ok(count)
    };
    counted().map_err(failed(map, || "count of entries".to_owned()))
}
