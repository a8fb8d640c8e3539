//! Carries out plans. It decides nothing but what must be left undone after a failure.

use std::{collections::HashSet, net::IpAddr};

use lb_common::abi::{
    address::Be16,
    backend::Backend,
    frontend::{Frontend, FrontendKey},
    service::Service,
};

use crate::{
    dataplane::{Dataplane, DataplaneError},
    desired::FrontendAddress,
    plan::{Action, BackendEntry, NOBODY, Op, Plan},
};

/// What a plan left to be done.
#[derive(Debug, Default)]
pub struct Leftover {
    /// The ops that failed, and those that must not be done before them, in order. All
    /// of them may be done again.
    pub ops: Vec<Op>,
    /// Why ops failed.
    pub errors: Vec<DataplaneError>,
}

/// Does the ops of a plan in order and gives what is left.
///
/// After a failure the later ops of the same owner are left: they would publish what was
/// not staged, or retire what is still reached. The plan's other owners do not depend on
/// it, but for those that a front end should have been taken from.
pub fn execute(plan: Plan, dataplane: &mut impl Dataplane) -> Leftover {
    let mut leftover = Leftover::default();
    let mut failed = HashSet::new();
    for op in plan.ops {
        if op.owner == NOBODY || !failed.contains(&op.owner) {
            match perform(&op, dataplane) {
                Ok(()) => continue,
                Err(error) => leftover.errors.push(error),
            }
        }
        failed.insert(op.owner);
        if let Action::UpsertFrontend { replaces: Some(owner), .. } = op.action {
            failed.insert(owner);
        }
        if !is_wipe(&op) {
            leftover.ops.push(op);
        }
    }
    leftover
}

/// Whether an op wipes what means nothing any more. It must not be done again later: by
/// then it may mean something.
fn is_wipe(op: &Op) -> bool {
    let wipes = matches!(op.action, Action::StoreBackend { .. } | Action::WipeService(_));
    op.owner == NOBODY && wipes
}

/// Does one op.
pub fn perform(op: &Op, dataplane: &mut impl Dataplane) -> Result<(), DataplaneError> {
    match &op.action {
        Action::StoreBackend { id, entry } => store_backend(*id, entry, dataplane),
        Action::StoreSlots { start, backends } => dataplane.store_slots(*start, backends),
        Action::StoreService(entry) => dataplane.store_service(op.owner, *entry),
        Action::WipeService(index) => dataplane.store_service(*index, Service::default()),
        Action::PublishCluster(range) => dataplane.publish_cluster(op.owner, *range),
        Action::PublishLocal(range) => dataplane.publish_local(op.owner, *range),
        Action::StoreName(name) => dataplane.store_name(op.owner, **name),
        Action::UpsertFrontend { frontend, kind, .. } => {
            let value = Frontend { service: op.owner, kind: *kind, ..Frontend::default() };
            match frontend.ip {
                IpAddr::V4(ip) => dataplane.upsert_frontend4(key(frontend, ip.into()), value),
                IpAddr::V6(ip) => dataplane.upsert_frontend6(key(frontend, ip.into()), value),
            }
        }
        Action::DeleteFrontend(frontend) => match frontend.ip {
            IpAddr::V4(ip) => dataplane.delete_frontend4(key(frontend, ip.into())),
            IpAddr::V6(ip) => dataplane.delete_frontend6(key(frontend, ip.into())),
        },
        Action::StoreSettings(settings) => dataplane.store_settings(settings),
    }
}

fn store_backend(
    id: u32,
    entry: &BackendEntry,
    dataplane: &mut impl Dataplane,
) -> Result<(), DataplaneError> {
    match entry.ip {
        IpAddr::V4(ip) => dataplane.store_backend4(id, backend(entry, ip.into())),
        IpAddr::V6(ip) => dataplane.store_backend6(id, backend(entry, ip.into())),
    }
}

fn backend<A>(entry: &BackendEntry, address: A) -> Backend<A> {
    Backend {
        address,
        port: Be16::new(entry.port),
        generation: entry.generation,
        sets: entry.sets,
        flags: entry.flags,
        zero: 0,
        service: entry.service,
    }
}

fn key<A>(frontend: &FrontendAddress, address: A) -> FrontendKey<A> {
    FrontendKey::new(address, Be16::new(frontend.port), frontend.protocol)
}
