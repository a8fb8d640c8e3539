//! The pinned maps of one family, opened for reading.

use std::{
    cell::{Cell, RefCell},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
};

use bytemuck::Pod;
use ipnet::IpNet;
use lb_common::abi::{
    address::{Address4, Address6, Family, Ipv4, Ipv6},
    affinity::{Affinity, AffinityKey},
    backend::{Backend, IN_SLICE},
    frontend::{Frontend, FrontendKey},
    range::RangeKey,
    service::{Name, Service, Slot},
    settings::{Device, MAX_DEVICES, Settings, SettingsPair},
    source::SourceKey,
};
use lb_sys::TypedMap;

use super::{ExplainError, tables::Reader};
use crate::maps::{
    flow_table::{FlowAddress, FlowTable},
    mapped::MappedArray,
    pins::{PinError, Pins},
    read::{opened, settings_in_force, text_of},
};

/// An address family, with its maps and its address type outside of the maps.
pub(super) trait PinnedFamily: Family<Address: FlowAddress> {
    /// FRONTENDS, RANGES, NODES, BACKENDS and SOURCES of the family.
    const MAPS: [&'static str; 5];
    /// Bits of an address.
    const BITS: u8;
    /// The address for display.
    fn ip(address: Self::Address) -> IpAddr;
    /// The address, if it is of this family.
    fn address(ip: IpAddr) -> Option<Self::Address>;
}

impl PinnedFamily for Ipv4 {
    const MAPS: [&'static str; 5] = ["FRONTENDS4", "RANGES4", "NODES4", "BACKENDS4", "SOURCES4"];
    const BITS: u8 = 32;

    fn ip(address: Address4) -> IpAddr {
        Ipv4Addr::from(address).into()
    }

    fn address(ip: IpAddr) -> Option<Address4> {
        if let IpAddr::V4(ip) = ip { Some(ip.into()) } else { None }
    }
}

impl PinnedFamily for Ipv6 {
    const MAPS: [&'static str; 5] = ["FRONTENDS6", "RANGES6", "NODES6", "BACKENDS6", "SOURCES6"];
    const BITS: u8 = 128;

    fn ip(address: Address6) -> IpAddr {
        Ipv6Addr::from(address).into()
    }

    fn address(ip: IpAddr) -> Option<Address6> {
        if let IpAddr::V6(ip) = ip { Some(ip.into()) } else { None }
    }
}

/// The maps of one family. An entry that cannot be read counts as absent, and
/// [`Pinned::checked`] returns the error.
pub(super) struct Pinned<F: PinnedFamily> {
    settings: Settings,
    now: u32,
    frontends: TypedMap<FrontendKey<F::Address>, Frontend>,
    ranges: TypedMap<RangeKey<F::Address>, u32>,
    nodes: TypedMap<F::Address, u32>,
    sources: TypedMap<SourceKey<F::Address>, F::Address>,
    flows: FlowTable<F::Address>,
    affinity: TypedMap<AffinityKey, Affinity>,
    services: RefCell<MappedArray<Service>>,
    names: RefCell<MappedArray<Name>>,
    slots: RefCell<MappedArray<Slot>>,
    backends: RefCell<MappedArray<Backend<F::Address>>>,
    devices: RefCell<MappedArray<Device>>,
    failure: Cell<Option<(&'static str, io::Error)>>,
}

impl<F: PinnedFamily> Pinned<F> {
    /// Opens the maps.
    ///
    /// # Errors
    /// [`ExplainError`] if one is missing, or no agent has ever programmed them.
    pub(super) fn open(pins: &Pins) -> Result<Self, ExplainError> {
        let [frontends, ranges, nodes, backends, sources] = F::MAPS;
        let settings = settings(pins)?;
        if settings.ticks_per_second == 0 {
            return Err(ExplainError::NothingProgrammed(pins.base().to_owned()));
        }
        let clock = pins.clock();
        let now = lb_sys::obj_get(&clock)
            .and_then(|program| lb_sys::ticks_now(program.as_fd()))
            .map_err(|source| PinError::Open { path: clock, source })?;
        Ok(Self {
            settings,
            now,
            frontends: opened(pins, frontends, TypedMap::new)?,
            ranges: opened(pins, ranges, TypedMap::new)?,
            nodes: opened(pins, nodes, TypedMap::new)?,
            sources: opened(pins, sources, TypedMap::new)?,
            flows: FlowTable::readable(pins)?,
            affinity: opened(pins, "AFFINITY", TypedMap::new)?,
            services: mapped(pins, "SERVICES")?,
            names: mapped(pins, "NAMES")?,
            slots: mapped(pins, "SLOTS")?,
            backends: mapped(pins, backends)?,
            devices: mapped(pins, "DEVICES")?,
            failure: Cell::new(None),
        })
    }

    /// Whether every lookup so far succeeded.
    ///
    /// # Errors
    /// [`ExplainError::Read`] for the last map that could not be read.
    pub(super) fn checked(&self) -> Result<(), ExplainError> {
        match self.failure.take() {
            Some((map, source)) => Err(ExplainError::Read { map, source }),
            None => Ok(()),
        }
    }

    fn noted<T>(&self, map: &'static str, result: io::Result<Option<T>>) -> Option<T> {
        result.unwrap_or_else(|error| {
            self.failure.set(Some((map, error)));
            None
        })
    }

    fn entry<T: Pod>(
        &self,
        map: &'static str,
        array: &RefCell<MappedArray<T>>,
        index: u32,
    ) -> Option<T> {
        let mut array = array.borrow_mut();
        let found = (index < array.entries()).then(|| array.load(index)).transpose();
        self.noted(map, found)
    }
}

fn mapped<T: Pod>(pins: &Pins, map: &'static str) -> Result<RefCell<MappedArray<T>>, PinError> {
    opened(pins, map, MappedArray::readable).map(RefCell::new)
}

fn settings(pins: &Pins) -> Result<Settings, PinError> {
    let mut pair = opened(pins, "SETTINGS", MappedArray::<SettingsPair>::readable)?;
    let pair =
        pair.load(0).map_err(|source| PinError::Open { path: pins.map("SETTINGS"), source })?;
    Ok(settings_in_force(&pair))
}

impl<F: PinnedFamily> Reader<F> for Pinned<F> {
    type Flows = FlowTable<F::Address>;

    fn settings(&self) -> Settings {
        self.settings
    }

    fn now(&self) -> u32 {
        self.now
    }

    fn frontend(&self, key: &FrontendKey<F::Address>) -> Option<Frontend> {
        self.noted(F::MAPS[0], self.frontends.get(key))
    }

    fn is_in_range(&self, service: u32, client: F::Address) -> bool {
        let key = RangeKey::new(service, client, F::BITS.into());
        self.noted(F::MAPS[1], self.ranges.get(&key)).is_some()
    }

    fn is_node(&self, address: F::Address) -> bool {
        self.noted(F::MAPS[2], self.nodes.get(&address)).is_some()
    }

    fn route_source(&self, destination: F::Address) -> Option<F::Address> {
        let key = SourceKey { prefix_length: F::BITS.into(), address: destination };
        self.noted(F::MAPS[4], self.sources.get(&key))
    }

    fn service(&self, index: u32) -> Option<Service> {
        self.entry("SERVICES", &self.services, index)
    }

    fn slot(&self, position: u32) -> Option<u32> {
        self.entry("SLOTS", &self.slots, position).map(|slot| slot.backend)
    }

    fn backend(&self, id: u32) -> Option<Backend<F::Address>> {
        self.entry(F::MAPS[3], &self.backends, id)
    }

    fn device(&self, ifindex: u32) -> Option<u32> {
        (0..MAX_DEVICES).find(|index| {
            let device = self.entry("DEVICES", &self.devices, *index);
            device.is_some_and(|device| device.ifindex == ifindex)
        })
    }

    fn flows(&self) -> &FlowTable<F::Address> {
        &self.flows
    }

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.noted("AFFINITY", self.affinity.get(key))
    }

    fn name(&self, service: u32) -> String {
        match self.entry("NAMES", &self.names, service) {
            Some(name) if name.length > 0 => text_of(&name),
            _ => format!("#{service}"),
        }
    }

    fn ranges(&self, service: u32) -> Vec<String> {
        let keys = self.noted(F::MAPS[1], self.ranges.keys().map(Some)).unwrap_or_default();
        let of_it = keys.iter().filter(|key| key.range.service == service);
        let nets = of_it.filter_map(|key| {
            let length = u8::try_from(key.prefix_length.checked_sub(u32::BITS)?).ok()?;
            IpNet::new(F::ip(key.range.address), length).ok()
        });
        let mut nets: Vec<IpNet> = nets.collect();
        nets.sort_unstable();
        nets.iter().map(ToString::to_string).collect()
    }

    fn backends_of(&self, service: u32) -> Vec<(u32, Backend<F::Address>)> {
        let all = self.backends.borrow_mut().load_all();
        let all = self.noted(F::MAPS[3], all.map(Some)).unwrap_or_default();
        let is_its = |backend: &Backend<F::Address>| {
            (backend.sets != 0 || backend.flags & IN_SLICE != 0) && backend.service == service
        };
        (0..).zip(all).filter(|(_, backend)| is_its(backend)).collect()
    }
}
