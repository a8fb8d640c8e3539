//! What the maps hold, as the planner knows it.
//!
//! There is one of these for each service port and each endpoint of the cluster: what few of them
//! need takes no room in the others.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use lb_common::abi::{
    backend::{IN_CLUSTER_SET, IN_LOCAL_SET},
    service::Service,
};

use crate::{
    desired::{FrontendAddress, PortKey},
    ids::{
        Numbers,
        slots::{Block, Blocks},
    },
    model::IpFamily,
};

/// The first backend id that is handed out. A slot that holds 0 was never used.
pub const FIRST_BACKEND: u32 = 1;

/// The bits of [`HeldBackend::sets`], in the order of [`HeldPort::sets`].
pub(super) const SETS: [u8; 2] = [IN_CLUSTER_SET, IN_LOCAL_SET];

/// What is still free in each map.
#[derive(Debug)]
pub struct Ids {
    /// Indices into SERVICES.
    pub services: Numbers,
    /// Indices into BACKENDS4 and BACKENDS6.
    pub backends: [Numbers; 2],
    /// Blocks of SLOTS.
    pub blocks: Blocks,
    /// How many entries the maps have.
    pub capacity: crate::dataplane::Capacity,
}

/// An entry of SERVICES with all entries of other maps that belong to it.
#[derive(Debug)]
pub struct HeldPort {
    /// Its index.
    pub index: u32,
    /// Its name within the Service.
    pub key: PortKey,
    /// The entry.
    pub entry: Service,
    /// The cluster set and the local set.
    pub sets: HeldSets,
    /// The backends, in the order of addresses.
    pub backends: Vec<HeldBackend>,
    /// The nodes that the backends run on.
    pub nodes: BackendNodes,
    /// The frontends that were made to lead here; another service port may have one by now.
    pub frontends: Vec<FrontendAddress>,
    /// The clients that restricted frontends admit, in order.
    pub ranges: Vec<IpNet>,
}

/// The position of a family in a pair of maps.
pub(super) fn index_of_family(family: IpFamily) -> usize {
    match family {
        IpFamily::V4 => 0,
        IpFamily::V6 => 1,
    }
}

/// The cluster set and the local set of a service port; a ClusterIP as a whole has neither.
#[derive(Debug, Default)]
pub struct HeldSets(Option<Box<[HeldSet; 2]>>);

impl HeldSets {
    /// The block of the set at this place of [`SETS`].
    pub(super) fn block(&self, number: usize) -> Option<Block> {
        self.0.as_ref()?[number].block
    }

    /// The blocks of both.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Block> {
        self.0.iter().flat_map(|sets| sets.iter()).filter_map(|set| set.block)
    }

    /// The set at this place of [`SETS`].
    pub(super) fn get_mut(&mut self, number: usize) -> &mut HeldSet {
        &mut self.0.get_or_insert_default()[number]
    }
}

/// The addresses of the nodes that backends run on, where that is another node and known: only
/// Services with direct server return have any.
#[expect(clippy::box_collection, reason = "one word, not three, where there are none")]
#[derive(Debug, Default)]
pub struct BackendNodes(Option<Box<BTreeMap<u32, IpAddr>>>);

impl BackendNodes {
    /// That of the backend of this id.
    pub(super) fn of(&self, id: u32) -> Option<IpAddr> {
        self.0.as_ref()?.get(&id).copied()
    }

    /// Sets that of a backend.
    pub(super) fn set(&mut self, id: u32, node: Option<IpAddr>) {
        match (node, &mut self.0) {
            (Some(node), nodes) => {
                nodes.get_or_insert_default().insert(id, node);
            }
            (None, Some(nodes)) => {
                nodes.remove(&id);
                if nodes.is_empty() {
                    self.0 = None;
                }
            }
            (None, None) => {}
        }
    }
}

/// A set of a service port, as slots.
#[derive(Debug, Default)]
pub struct HeldSet {
    /// The block, if there is any slot.
    pub block: Option<Block>,
    /// The backend ids in the slots.
    pub slots: Vec<u32>,
    /// Positions of slots with a wrong or repeated id; found at adoption only.
    pub faulty: Vec<usize>,
}

/// A backend of a service port.
#[derive(Clone, Copy, Debug)]
pub struct HeldBackend {
    /// The address.
    pub ip: IpAddr,
    /// The id.
    pub id: u32,
    /// The port.
    pub port: u16,
    /// The generation.
    pub generation: u16,
    /// The sets that the entry says it is a member of.
    pub sets: u8,
    /// The sets that have a slot for it.
    pub slotted: u8,
    /// The flags.
    pub flags: u8,
}

const _: () = assert!(size_of::<HeldBackend>() == 28, "there are hundreds of thousands of these");

impl HeldBackend {
    /// Identifies it among the backends of the service port.
    pub fn address(&self) -> (IpAddr, u16) {
        (self.ip, self.port)
    }
}
