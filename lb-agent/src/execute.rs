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

/// Does the ops of a plan in order and gives what failed.
///
/// After a failure the later ops of the same owner are left out: they would publish
/// what was not staged, or retire what is still reached. The plan's other owners do not
/// depend on it, but for those that a front end should have been taken from.
pub fn execute(plan: &Plan, dataplane: &mut impl Dataplane) -> Vec<DataplaneError> {
    let mut errors = Vec::new();
    let mut failed = HashSet::new();
    for op in &plan.ops {
        let is_left_out = failed.contains(&op.owner);
        if !is_left_out {
            match perform(op, dataplane) {
                Ok(()) => continue,
                Err(error) => errors.push(error),
            }
        }
        if op.owner != NOBODY {
            failed.insert(op.owner);
        }
        if let Action::UpsertFrontend { replaces: Some(owner), .. } = op.action {
            failed.insert(owner);
        }
    }
    errors
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
