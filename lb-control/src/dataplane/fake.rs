//! A dataplane in host memory, for tests: it counts writes and fails on demand.

use std::collections::{BTreeMap, BTreeSet};

use bytemuck::Zeroable;
use lb_common::abi::{
    address::{Address4, Address6},
    backend::Backend,
    frontend::{Frontend, FrontendKey},
    range::RangeKey,
    service::{Name, Service, SlotRange},
    settings::Settings,
};

use super::{Capacity, Dataplane, DataplaneError, PinnedState};

/// Maps in host memory.
#[derive(Clone, Debug)]
pub struct Fake {
    capacity: Capacity,
    /// FRONTENDS4.
    pub frontends4: BTreeMap<FrontendKey<Address4>, Frontend>,
    /// FRONTENDS6.
    pub frontends6: BTreeMap<FrontendKey<Address6>, Frontend>,
    /// RANGES4.
    pub ranges4: BTreeSet<RangeKey<Address4>>,
    /// RANGES6.
    pub ranges6: BTreeSet<RangeKey<Address6>>,
    /// NODES4.
    pub nodes4: BTreeSet<Address4>,
    /// NODES6.
    pub nodes6: BTreeSet<Address6>,
    /// NAMES.
    pub names: Vec<Name>,
    /// SERVICES.
    pub services: Vec<Service>,
    /// SLOTS.
    pub slots: Vec<u32>,
    /// BACKENDS4.
    pub backends4: Vec<Backend<Address4>>,
    /// BACKENDS6.
    pub backends6: Vec<Backend<Address6>>,
    /// SETTINGS.
    pub settings: Settings,
    /// The writes so far.
    pub writes: Writes,
    faults: Faults,
}

/// How many writes there were, by what they cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Writes {
    /// Stores into mapped memory; each slot counts.
    pub stores: usize,
    /// Words published.
    pub published: usize,
    /// Calls into the kernel that add or replace an entry.
    pub upserts: usize,
    /// Calls into the kernel that delete an entry.
    pub deletes: usize,
}

/// Which writes fail.
#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    percent: u64,
    random: u64,
}

impl Fake {
    /// Empty maps.
    pub fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            frontends4: BTreeMap::new(),
            frontends6: BTreeMap::new(),
            ranges4: BTreeSet::new(),
            ranges6: BTreeSet::new(),
            nodes4: BTreeSet::new(),
            nodes6: BTreeSet::new(),
            names: vec![Name::zeroed(); capacity.services as usize],
            services: vec![Service::default(); capacity.services as usize],
            slots: vec![0; capacity.slots as usize],
            backends4: vec![Backend::default(); capacity.backends4 as usize],
            backends6: vec![Backend::default(); capacity.backends6 as usize],
            settings: Settings::default(),
            writes: Writes::default(),
            faults: Faults::default(),
        }
    }

    /// From now on `percent` of all writes fail, chosen by `seed`.
    pub fn fail(&mut self, percent: u64, seed: u64) {
        self.faults = Faults { percent, random: seed | 1 };
    }

    /// The writes since the last call.
    pub fn take_writes(&mut self) -> Writes {
        std::mem::take(&mut self.writes)
    }

    fn may_fail(&mut self, map: &'static str, operation: impl Fn() -> String) -> Outcome {
        let random = &mut self.faults.random;
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        if *random % 100 < self.faults.percent {
            let source = std::io::Error::other("made to fail");
            return Err(DataplaneError { map, operation: operation(), source });
        }
        Ok(())
    }

    fn store<T>(
        &mut self,
        map: &'static str,
        index: u32,
        value: T,
        list: fn(&mut Self) -> &mut [T],
    ) -> Outcome {
        let operation = || format!("store of {index}");
        self.may_fail(map, operation)?;
        self.writes.stores += 1;
        let missing = || DataplaneError {
            map,
            operation: operation(),
            source: std::io::ErrorKind::InvalidInput.into(),
        };
        *list(self).get_mut(index as usize).ok_or_else(missing)? = value;
        Ok(())
    }

    fn upsert<K: Ord + std::fmt::Debug>(
        &mut self,
        map: &'static str,
        (key, value): (K, Frontend),
        limit: u32,
        entries: fn(&mut Self) -> &mut BTreeMap<K, Frontend>,
    ) -> Outcome {
        let operation = || format!("upsert of {key:?}");
        self.may_fail(map, operation)?;
        self.writes.upserts += 1;
        let is_full = entries(self).len() >= limit as usize && !entries(self).contains_key(&key);
        if is_full {
            let source = std::io::ErrorKind::StorageFull.into();
            return Err(DataplaneError { map, operation: operation(), source });
        }
        entries(self).insert(key, value);
        Ok(())
    }

    fn insert<K: Ord + std::fmt::Debug>(
        &mut self,
        map: &'static str,
        key: K,
        limit: u32,
        entries: fn(&mut Self) -> &mut BTreeSet<K>,
    ) -> Outcome {
        let operation = || format!("insertion of {key:?}");
        self.may_fail(map, operation)?;
        self.writes.upserts += 1;
        if entries(self).len() >= limit as usize && !entries(self).contains(&key) {
            let source = std::io::ErrorKind::StorageFull.into();
            return Err(DataplaneError { map, operation: operation(), source });
        }
        entries(self).insert(key);
        Ok(())
    }

    fn delete<K: Ord + std::fmt::Debug>(
        &mut self,
        map: &'static str,
        key: &K,
        entries: fn(&mut Self) -> &mut BTreeSet<K>,
    ) -> Outcome {
        self.may_fail(map, || format!("deletion of {key:?}"))?;
        self.writes.deletes += 1;
        entries(self).remove(key);
        Ok(())
    }
}

type Outcome = Result<(), DataplaneError>;

impl Dataplane for Fake {
    fn store_backend4(&mut self, id: u32, value: Backend<Address4>) -> Outcome {
        self.store("BACKENDS4", id, value, |fake| &mut fake.backends4)
    }

    fn store_backend6(&mut self, id: u32, value: Backend<Address6>) -> Outcome {
        self.store("BACKENDS6", id, value, |fake| &mut fake.backends6)
    }

    fn store_slots(&mut self, start: u32, backends: &[u32]) -> Outcome {
        for (slot, id) in (start..).zip(backends) {
            self.store("SLOTS", slot, *id, |fake| &mut fake.slots)?;
        }
        Ok(())
    }

    fn store_service(&mut self, index: u32, value: Service) -> Outcome {
        self.store("SERVICES", index, value, |fake| &mut fake.services)
    }

    fn publish_cluster(&mut self, index: u32, range: SlotRange) -> Outcome {
        self.may_fail("SERVICES", || format!("publishing the cluster set of {index}"))?;
        self.writes.published += 1;
        self.services[index as usize].cluster = range;
        Ok(())
    }

    fn publish_local(&mut self, index: u32, range: SlotRange) -> Outcome {
        self.may_fail("SERVICES", || format!("publishing the local set of {index}"))?;
        self.writes.published += 1;
        self.services[index as usize].local = range;
        Ok(())
    }

    fn store_name(&mut self, index: u32, name: Name) -> Outcome {
        self.store("NAMES", index, name, |fake| &mut fake.names)
    }

    fn upsert_frontend4(&mut self, key: FrontendKey<Address4>, value: Frontend) -> Outcome {
        let limit = self.capacity.frontends4;
        self.upsert("FRONTENDS4", (key, value), limit, |fake| &mut fake.frontends4)
    }

    fn upsert_frontend6(&mut self, key: FrontendKey<Address6>, value: Frontend) -> Outcome {
        let limit = self.capacity.frontends6;
        self.upsert("FRONTENDS6", (key, value), limit, |fake| &mut fake.frontends6)
    }

    fn delete_frontend4(&mut self, key: FrontendKey<Address4>) -> Outcome {
        self.may_fail("FRONTENDS4", || format!("deletion of {key:?}"))?;
        self.writes.deletes += 1;
        self.frontends4.remove(&key);
        Ok(())
    }

    fn delete_frontend6(&mut self, key: FrontendKey<Address6>) -> Outcome {
        self.may_fail("FRONTENDS6", || format!("deletion of {key:?}"))?;
        self.writes.deletes += 1;
        self.frontends6.remove(&key);
        Ok(())
    }

    fn insert_range4(&mut self, key: RangeKey<Address4>) -> Outcome {
        self.insert("RANGES4", key, self.capacity.ranges4, |fake| &mut fake.ranges4)
    }

    fn insert_range6(&mut self, key: RangeKey<Address6>) -> Outcome {
        self.insert("RANGES6", key, self.capacity.ranges6, |fake| &mut fake.ranges6)
    }

    fn delete_range4(&mut self, key: RangeKey<Address4>) -> Outcome {
        self.delete("RANGES4", &key, |fake| &mut fake.ranges4)
    }

    fn delete_range6(&mut self, key: RangeKey<Address6>) -> Outcome {
        self.delete("RANGES6", &key, |fake| &mut fake.ranges6)
    }

    fn insert_node4(&mut self, address: Address4) -> Outcome {
        self.insert("NODES4", address, self.capacity.nodes4, |fake| &mut fake.nodes4)
    }

    fn insert_node6(&mut self, address: Address6) -> Outcome {
        self.insert("NODES6", address, self.capacity.nodes6, |fake| &mut fake.nodes6)
    }

    fn delete_node4(&mut self, address: Address4) -> Outcome {
        self.delete("NODES4", &address, |fake| &mut fake.nodes4)
    }

    fn delete_node6(&mut self, address: Address6) -> Outcome {
        self.delete("NODES6", &address, |fake| &mut fake.nodes6)
    }

    fn store_settings(&mut self, settings: &Settings) -> Outcome {
        self.may_fail("SETTINGS", || "store".to_owned())?;
        self.settings = *settings;
        Ok(())
    }

    fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn read_state(&self) -> Result<PinnedState, DataplaneError> {
        let names = (0..).zip(&self.names).filter(|(_, name)| name.length != 0);
        Ok(PinnedState {
            frontends4: self.frontends4.iter().map(|(key, value)| (*key, *value)).collect(),
            frontends6: self.frontends6.iter().map(|(key, value)| (*key, *value)).collect(),
            ranges4: self.ranges4.iter().copied().collect(),
            ranges6: self.ranges6.iter().copied().collect(),
            nodes4: self.nodes4.iter().copied().collect(),
            nodes6: self.nodes6.iter().copied().collect(),
            names: names.map(|(index, name)| (index, *name)).collect(),
            services: self.services.clone(),
            slots: self.slots.clone(),
            backends4: self.backends4.clone(),
            backends6: self.backends6.clone(),
            settings: self.settings,
        })
    }
}
