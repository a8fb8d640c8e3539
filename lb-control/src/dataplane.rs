//! The maps that the programs read, as the agent writes them.
//!
//! It decides nothing: the [plan](crate::plan) says what is written, and in which order. Every method is one write, or one read of
//! everything; none of them is atomic with another.

pub mod fake;

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use lb_common::abi::{
    address::{Address4, Address6},
    backend::Backend,
    frontend::{Frontend, FrontendKey},
    range::RangeKey,
    service::{Name, Service, SlotRange},
    settings::Settings,
};

use crate::ids::slots::{Block, order_of};

/// The maps, as plans are executed on them.
///
/// A store returns once the programs can see it. Methods named `publish_*` store one
/// aligned 8-byte word, those named `store_*` may be seen half done and are therefore
/// used on what no packet reaches yet, or where each half is right by itself.
pub trait Dataplane {
    /// Stores an entry of BACKENDS4.
    fn store_backend4(&mut self, id: u32, value: Backend<Address4>) -> Result<(), DataplaneError>;

    /// Stores an entry of BACKENDS6.
    fn store_backend6(&mut self, id: u32, value: Backend<Address6>) -> Result<(), DataplaneError>;

    /// Stores backend ids into SLOTS, from `start` on; each slot is one 4-byte store.
    fn store_slots(&mut self, start: u32, backends: &[u32]) -> Result<(), DataplaneError>;

    /// Stores an entry of SERVICES, each field by one aligned store of its size.
    fn store_service(&mut self, index: u32, value: Service) -> Result<(), DataplaneError>;

    /// Replaces the cluster set of a service port.
    fn publish_cluster(&mut self, index: u32, range: SlotRange) -> Result<(), DataplaneError>;

    /// Replaces the local set of a service port.
    fn publish_local(&mut self, index: u32, range: SlotRange) -> Result<(), DataplaneError>;

    /// Stores an entry of NAMES.
    fn store_name(&mut self, index: u32, name: Name) -> Result<(), DataplaneError>;

    /// Adds or replaces an entry of FRONTENDS4.
    fn upsert_frontend4(
        &mut self,
        key: FrontendKey<Address4>,
        value: Frontend,
    ) -> Result<(), DataplaneError>;

    /// Adds or replaces an entry of FRONTENDS6.
    fn upsert_frontend6(
        &mut self,
        key: FrontendKey<Address6>,
        value: Frontend,
    ) -> Result<(), DataplaneError>;

    /// Deletes an entry of FRONTENDS4; one that is not there counts as deleted.
    fn delete_frontend4(&mut self, key: FrontendKey<Address4>) -> Result<(), DataplaneError>;

    /// Deletes an entry of FRONTENDS6; one that is not there counts as deleted.
    fn delete_frontend6(&mut self, key: FrontendKey<Address6>) -> Result<(), DataplaneError>;

    /// Adds an entry of RANGES4; one that is there stays.
    fn insert_range4(&mut self, key: RangeKey<Address4>) -> Result<(), DataplaneError>;

    /// Adds an entry of RANGES6; one that is there stays.
    fn insert_range6(&mut self, key: RangeKey<Address6>) -> Result<(), DataplaneError>;

    /// Deletes an entry of RANGES4; one that is not there counts as deleted.
    fn delete_range4(&mut self, key: RangeKey<Address4>) -> Result<(), DataplaneError>;

    /// Deletes an entry of RANGES6; one that is not there counts as deleted.
    fn delete_range6(&mut self, key: RangeKey<Address6>) -> Result<(), DataplaneError>;

    /// Adds an entry of NODES4; one that is there stays.
    fn insert_node4(&mut self, address: Address4) -> Result<(), DataplaneError>;

    /// Adds an entry of NODES6; one that is there stays.
    fn insert_node6(&mut self, address: Address6) -> Result<(), DataplaneError>;

    /// Deletes an entry of NODES4; one that is not there counts as deleted.
    fn delete_node4(&mut self, address: Address4) -> Result<(), DataplaneError>;

    /// Deletes an entry of NODES6; one that is not there counts as deleted.
    fn delete_node6(&mut self, address: Address6) -> Result<(), DataplaneError>;

    /// Replaces the settings as a whole: no packet sees half of them.
    fn store_settings(&mut self, settings: &Settings) -> Result<(), DataplaneError>;

    /// How many entries the maps have.
    fn capacity(&self) -> Capacity;

    /// Everything that the maps hold.
    fn read_state(&self) -> Result<PinnedState, DataplaneError>;
}

/// How many entries each map has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// SERVICES and NAMES (`--max-services`).
    pub services: u32,
    /// SLOTS (`--max-slots`).
    pub slots: u32,
    /// BACKENDS4 (`--max-backends`).
    pub backends4: u32,
    /// BACKENDS6 (`--max-backends`).
    pub backends6: u32,
    /// FRONTENDS4 (`--max-services`).
    pub frontends4: u32,
    /// FRONTENDS6 (`--max-services`).
    pub frontends6: u32,
    /// RANGES4 (`--max-services`).
    pub ranges4: u32,
    /// RANGES6 (`--max-services`).
    pub ranges6: u32,
    /// NODES4.
    pub nodes4: u32,
    /// NODES6.
    pub nodes6: u32,
}

/// Everything that the maps hold, in host memory.
#[derive(Clone, Debug, Default)]
pub struct PinnedState {
    /// FRONTENDS4, in any order.
    pub frontends4: Vec<(FrontendKey<Address4>, Frontend)>,
    /// FRONTENDS6, in any order.
    pub frontends6: Vec<(FrontendKey<Address6>, Frontend)>,
    /// RANGES4, in any order.
    pub ranges4: Vec<RangeKey<Address4>>,
    /// RANGES6, in any order.
    pub ranges6: Vec<RangeKey<Address6>>,
    /// NODES4, in any order.
    pub nodes4: Vec<Address4>,
    /// NODES6, in any order.
    pub nodes6: Vec<Address6>,
    /// The entries of NAMES whose length is not 0, with their index.
    pub names: Vec<(u32, Name)>,
    /// SERVICES, every entry.
    pub services: Vec<Service>,
    /// SLOTS, every entry.
    pub slots: Vec<u32>,
    /// BACKENDS4, every entry.
    pub backends4: Vec<Backend<Address4>>,
    /// BACKENDS6, every entry.
    pub backends6: Vec<Backend<Address6>>,
    /// The settings in force; all zeros if none were ever stored.
    pub settings: Settings,
}

impl PinnedState {
    /// NODES4 and NODES6.
    pub fn nodes(&self) -> impl Iterator<Item = IpAddr> {
        let v4 = self.nodes4.iter().map(|address| IpAddr::V4(Ipv4Addr::from(*address)));
        let v6 = self.nodes6.iter().map(|address| IpAddr::V6(Ipv6Addr::from(*address)));
        v4.chain(v6)
    }

    /// The least capacity of maps that hold what is in use, at the indices and ids that it has.
    pub fn needed(&self) -> Capacity {
        let end = |last: Option<u32>| last.map_or(0, |last| last.saturating_add(1));
        let named: BTreeSet<u32> = self.names.iter().map(|(index, _)| *index).collect();
        let entries = named.iter().filter_map(|index| self.services.get(*index as usize));
        let sets = entries.flat_map(|entry| [entry.cluster, entry.local]);
        let blocks = sets.filter(|set| set.length() > 0).map(|set| {
            set.start().saturating_add(Block { start: 0, order: order_of(set.length()) }.capacity())
        });
        let ids4 = (0..).zip(&self.backends4).filter(|(_, entry)| named.contains(&entry.service));
        let ids6 = (0..).zip(&self.backends6).filter(|(_, entry)| named.contains(&entry.service));
        let ids4 = ids4.filter(|(_, entry)| entry.address != Address4::default());
        let ids6 = ids6.filter(|(_, entry)| entry.address != Address6::default());
        Capacity {
            services: end(named.last().copied()),
            slots: blocks.max().unwrap_or(0),
            backends4: end(ids4.map(|(id, _)| id).last()),
            backends6: end(ids6.map(|(id, _)| id).last()),
            frontends4: self.frontends4.len() as u32,
            frontends6: self.frontends6.len() as u32,
            ranges4: self.ranges4.len() as u32,
            ranges6: self.ranges6.len() as u32,
            nodes4: self.nodes4.len() as u32,
            nodes6: self.nodes6.len() as u32,
        }
    }

    /// RANGES4 and RANGES6: the source ranges, with the index of their service port. Keys that
    /// the agent never writes are left out.
    pub fn ranges(&self) -> impl Iterator<Item = (u32, IpNet)> {
        fn net<A: Copy>(key: &RangeKey<A>, ip: impl Into<IpAddr>) -> Option<(u32, IpNet)> {
            let length = key.prefix_length.checked_sub(u32::BITS)?;
            let net = IpNet::new(ip.into(), u8::try_from(length).ok()?).ok()?;
            Some((key.range.service, net))
        }
        let v4 = self.ranges4.iter();
        let v4 = v4.filter_map(|key| net(key, Ipv4Addr::from(key.range.address)));
        let v6 = self.ranges6.iter();
        v4.chain(v6.filter_map(|key| net(key, Ipv6Addr::from(key.range.address))))
    }
}

/// A map could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("map {map}, {operation}")]
pub struct DataplaneError {
    /// The map's name, such as `FRONTENDS4`.
    pub map: &'static str,
    /// What was tried and with which key, such as `upsert of 10.96.0.1:443/6`.
    pub operation: String,
    /// Why it failed.
    #[source]
    pub source: std::io::Error,
}
