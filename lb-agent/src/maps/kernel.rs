//! The pinned maps as a [`Dataplane`].
//!
//! It decides the order of the stores within one entry, and nothing about which entries are
//! stored.

use std::{
    fmt::Debug,
    io,
    mem::offset_of,
    thread,
    time::{Duration, Instant},
};

use bytemuck::Pod;
use lb_common::abi::{
    address::{Address4, Address6},
    backend::Backend,
    frontend::{Frontend, FrontendKey},
    range::RangeKey,
    service::{Name, Service, Slot, SlotRange},
    settings::{Settings, SettingsPair},
};
use lb_control::dataplane::{Capacity, Dataplane, DataplaneError, PinnedState};
use lb_sys::TypedMap;

use super::{
    mapped::{MappedArray, word_of},
    pins::{PinError, Pins},
    read::{failed, opened, read_state},
    traffic::Counts,
};

/// The pinned maps, opened for writing.
#[derive(Debug)]
pub struct KernelDataplane {
    pins: Pins,
    frontends4: TypedMap<FrontendKey<Address4>, Frontend>,
    frontends6: TypedMap<FrontendKey<Address6>, Frontend>,
    ranges4: TypedMap<RangeKey<Address4>, u32>,
    ranges6: TypedMap<RangeKey<Address6>, u32>,
    nodes4: TypedMap<Address4, u32>,
    nodes6: TypedMap<Address6, u32>,
    services: MappedArray<Service>,
    names: MappedArray<Name>,
    slots: MappedArray<Slot>,
    backends4: MappedArray<Backend<Address4>>,
    backends6: MappedArray<Backend<Address6>>,
    settings: MappedArray<SettingsPair>,
    counts: Counts,
    flipped: Option<Instant>,
}

/// Longer than any run of a program: after it, no program reads the inactive copy of the
/// settings.
const LONGEST_RUN: Duration = Duration::from_millis(1);

impl KernelDataplane {
    /// Opens the maps that [`load`](crate::programs::prepare::load) has pinned.
    ///
    /// # Errors
    /// [`PinError`] if one is missing or of another layout.
    pub fn open(pins: &Pins) -> Result<Self, PinError> {
        let mut counts = Counts::open(pins)?;
        let unread = |source| PinError::Open { path: pins.map("TRAFFIC"), source };
        counts.adopt().map_err(unread)?;
        Ok(Self {
            pins: pins.clone(),
            frontends4: opened(pins, "FRONTENDS4", TypedMap::new)?,
            frontends6: opened(pins, "FRONTENDS6", TypedMap::new)?,
            ranges4: opened(pins, "RANGES4", TypedMap::new)?,
            ranges6: opened(pins, "RANGES6", TypedMap::new)?,
            nodes4: opened(pins, "NODES4", TypedMap::new)?,
            nodes6: opened(pins, "NODES6", TypedMap::new)?,
            services: opened(pins, "SERVICES", MappedArray::writable)?,
            names: opened(pins, "NAMES", MappedArray::writable)?,
            slots: opened(pins, "SLOTS", MappedArray::writable)?,
            backends4: opened(pins, "BACKENDS4", MappedArray::writable)?,
            backends6: opened(pins, "BACKENDS6", MappedArray::writable)?,
            settings: opened(pins, "SETTINGS", MappedArray::writable)?,
            counts,
            flipped: None,
        })
    }

    /// Unmaps what few changes access: after a list, all of every array is mapped.
    ///
    /// # Errors
    /// Those of mmap(2). The arrays can be used nevertheless.
    pub fn unmap(&mut self) -> io::Result<()> {
        self.services.unmap()?;
        self.names.unmap()?;
        self.slots.unmap()?;
        self.backends4.unmap()?;
        self.backends6.unmap()
    }
}

fn upsert<K: Pod + Debug, V: Pod>(
    map: &TypedMap<K, V>,
    name: &'static str,
    key: &K,
    value: &V,
) -> Result<(), DataplaneError> {
    map.set(key, value).map_err(|source| {
        // A full hash returns E2BIG, a full LPM trie ENOSPC.
        let full = matches!(source.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC));
        let hint = if full { " (the map is full: raise --max-services)" } else { "" };
        DataplaneError { map: name, operation: format!("upsert of {key:?}{hint}"), source }
    })
}

fn insert_node<A: Pod + Debug>(
    map: &TypedMap<A, u32>,
    name: &'static str,
    address: &A,
) -> Result<(), DataplaneError> {
    map.set(address, &1).map_err(failed(name, || format!("insertion of {address:?}")))
}

fn delete<K: Pod + Debug, V: Pod>(
    map: &TypedMap<K, V>,
    name: &'static str,
    key: &K,
) -> Result<(), DataplaneError> {
    map.remove(key).map(drop).map_err(failed(name, || format!("deletion of {key:?}")))
}

impl Dataplane for KernelDataplane {
    fn store_backend4(&mut self, id: u32, value: Backend<Address4>) -> Result<(), DataplaneError> {
        const NODE: usize = offset_of!(Backend<Address4>, node);
        const { assert!(NODE == 16) }
        self.backends4
            .store_part(id, NODE, &value.node)
            .and_then(|()| self.backends4.publish(id, 8, word_of(&value, 8)))
            // Address, port and generation are one store: no packet reads the address of one
            // backend with the generation of another.
            .and_then(|()| self.backends4.publish(id, 0, word_of(&value, 0)))
            .map_err(failed("BACKENDS4", || format!("store of backend {id}")))
    }

    fn store_backend6(&mut self, id: u32, value: Backend<Address6>) -> Result<(), DataplaneError> {
        const LAST: usize = offset_of!(Backend<Address6>, port);
        const SERVICE: usize = offset_of!(Backend<Address6>, service);
        const NODE: usize = offset_of!(Backend<Address6>, node);
        const { assert!(LAST == 16 && SERVICE == LAST + 8 && NODE == SERVICE + 4) }
        self.backends6
            .store_part(id, 0, &value.address)
            .and_then(|()| self.backends6.store_part(id, SERVICE, &value.service))
            .and_then(|()| self.backends6.store_part(id, NODE, &value.node))
            .and_then(|()| self.backends6.publish(id, LAST, word_of(&value, LAST)))
            .map_err(failed("BACKENDS6", || format!("store of backend {id}")))
    }

    fn store_slots(&mut self, start: u32, backends: &[u32]) -> Result<(), DataplaneError> {
        for (slot, backend) in (u64::from(start)..).zip(backends) {
            u32::try_from(slot)
                .map_err(io::Error::other)
                .and_then(|slot| self.slots.store(slot, &Slot { backend: *backend }))
                .map_err(failed("SLOTS", || format!("store of slot {slot}")))?;
        }
        Ok(())
    }

    fn store_service(&mut self, index: u32, value: Service) -> Result<(), DataplaneError> {
        const FLAGS: usize = offset_of!(Service, affinity_seconds);
        self.services
            .store_part(index, FLAGS, &[value.affinity_seconds, value.flags])
            .map_err(failed("SERVICES", || format!("store of service {index}")))?;
        self.publish_local(index, value.local)?;
        self.publish_cluster(index, value.cluster)
    }

    fn publish_cluster(&mut self, index: u32, range: SlotRange) -> Result<(), DataplaneError> {
        self.services
            .publish(index, offset_of!(Service, cluster), range.start_and_length)
            .map_err(failed("SERVICES", || format!("publication of cluster set {index}")))
    }

    fn publish_local(&mut self, index: u32, range: SlotRange) -> Result<(), DataplaneError> {
        self.services
            .publish(index, offset_of!(Service, local), range.start_and_length)
            .map_err(failed("SERVICES", || format!("publication of local set {index}")))
    }

    fn store_name(&mut self, index: u32, name: Name) -> Result<(), DataplaneError> {
        if name.length == 0 {
            self.counts.retire(index);
        } else {
            let clear = || format!("reset of the counts of service {index}");
            self.counts.begin(index).map_err(failed("TRAFFIC", clear))?;
        }
        self.names.store(index, &name).map_err(failed("NAMES", || format!("store of name {index}")))
    }

    fn upsert_frontend4(
        &mut self,
        key: FrontendKey<Address4>,
        value: Frontend,
    ) -> Result<(), DataplaneError> {
        upsert(&self.frontends4, "FRONTENDS4", &key, &value)
    }

    fn upsert_frontend6(
        &mut self,
        key: FrontendKey<Address6>,
        value: Frontend,
    ) -> Result<(), DataplaneError> {
        upsert(&self.frontends6, "FRONTENDS6", &key, &value)
    }

    fn delete_frontend4(&mut self, key: FrontendKey<Address4>) -> Result<(), DataplaneError> {
        delete(&self.frontends4, "FRONTENDS4", &key)
    }

    fn delete_frontend6(&mut self, key: FrontendKey<Address6>) -> Result<(), DataplaneError> {
        delete(&self.frontends6, "FRONTENDS6", &key)
    }

    fn insert_range4(&mut self, key: RangeKey<Address4>) -> Result<(), DataplaneError> {
        upsert(&self.ranges4, "RANGES4", &key, &1)
    }

    fn insert_range6(&mut self, key: RangeKey<Address6>) -> Result<(), DataplaneError> {
        upsert(&self.ranges6, "RANGES6", &key, &1)
    }

    fn delete_range4(&mut self, key: RangeKey<Address4>) -> Result<(), DataplaneError> {
        delete(&self.ranges4, "RANGES4", &key)
    }

    fn delete_range6(&mut self, key: RangeKey<Address6>) -> Result<(), DataplaneError> {
        delete(&self.ranges6, "RANGES6", &key)
    }

    fn insert_node4(&mut self, address: Address4) -> Result<(), DataplaneError> {
        insert_node(&self.nodes4, "NODES4", &address)
    }

    fn insert_node6(&mut self, address: Address6) -> Result<(), DataplaneError> {
        insert_node(&self.nodes6, "NODES6", &address)
    }

    fn delete_node4(&mut self, address: Address4) -> Result<(), DataplaneError> {
        delete(&self.nodes4, "NODES4", &address)
    }

    fn delete_node6(&mut self, address: Address6) -> Result<(), DataplaneError> {
        delete(&self.nodes6, "NODES6", &address)
    }

    fn store_settings(&mut self, settings: &Settings) -> Result<(), DataplaneError> {
        const COPIES: usize = offset_of!(SettingsPair, copies);
        if let Some(flipped) = self.flipped {
            thread::sleep(LONGEST_RUN.saturating_sub(flipped.elapsed()));
        }
        let mut store = || -> io::Result<()> {
            let active = self.settings.load(0)?.active;
            let next = u32::from(active == 0);
            let offset = COPIES + next as usize * size_of::<Settings>();
            self.settings.store_part(0, offset, settings)?;
            self.settings.publish(0, 0, word_of(&[next, 0], 0))
        };
        store().map_err(failed("SETTINGS", || "store".to_owned()))?;
        self.flipped = Some(Instant::now());
        Ok(())
    }

    fn capacity(&self) -> Capacity {
        Capacity {
            services: self.services.entries().min(self.names.entries()),
            slots: self.slots.entries(),
            backends4: self.backends4.entries(),
            backends6: self.backends6.entries(),
            frontends4: self.frontends4.max_entries(),
            frontends6: self.frontends6.max_entries(),
            ranges4: self.ranges4.max_entries(),
            ranges6: self.ranges6.max_entries(),
            nodes4: self.nodes4.max_entries(),
            nodes6: self.nodes6.max_entries(),
        }
    }

    fn read_state(&self) -> Result<PinnedState, DataplaneError> {
        read_state(&self.pins)
    }
}
