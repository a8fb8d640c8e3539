//! Executes plans. Its only decision is which ops must wait after a failure.

use std::{collections::HashSet, net::IpAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lb_common::abi::{
    address::{Address4, Address6, Be16},
    backend::Backend,
    frontend::{Frontend, FrontendKey},
    range::RangeKey,
    service::Service,
};

use crate::{
    dataplane::{Dataplane, DataplaneError},
    desired::{DesiredFrontend, FrontendAddress},
    plan::{BackendEntry, NO_OWNER, Op, Plan, Write},
};

/// The part of a plan that was not done.
#[derive(Debug, Default)]
pub struct Unfinished {
    /// The ops that failed, and those that must not be done before them, in order. All
    /// of them may be repeated.
    pub ops: Vec<Op>,
    /// Why ops failed.
    pub errors: Vec<DataplaneError>,
}

/// Does the ops of a plan in order and returns the ops that were not done.
///
/// After a failure the later ops of the same owner wait, because they would publish entries
/// that were not staged, or retire entries that packets still reach. Later ops on the same
/// frontend wait too, and those of the owner that the frontend should have been taken from;
/// and later ops on the same address of a node, and on the settings. No other op depends on
/// one that failed.
pub fn execute(plan: Plan, dataplane: &mut impl Dataplane) -> Unfinished {
    let mut unfinished = Unfinished::default();
    let mut owners = HashSet::new();
    let mut shared = HashSet::new();
    for op in plan.ops {
        let entry = Shared::of(&op.write);
        let replaces = match op.write {
            Write::UpsertFrontend { replaces, .. } => replaces,
            _ => None,
        };
        let must_wait =
            owners.contains(&op.owner) || entry.is_some_and(|entry| shared.contains(&entry));
        if !must_wait {
            match perform(&op, dataplane) {
                Ok(()) => continue,
                Err(error) => unfinished.errors.push(error),
            }
        }
        owners.extend([op.owner].into_iter().filter(|owner| *owner != NO_OWNER).chain(replaces));
        shared.extend(entry);
        if !is_wipe(&op) {
            unfinished.ops.push(op);
        }
    }
    unfinished
}

/// An entry that ops of several owners, or of none, write: the later op must win.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Shared {
    Frontend(FrontendAddress),
    Node(IpAddr),
    Settings,
}

impl Shared {
    fn of(write: &Write) -> Option<Self> {
        match write {
            Write::UpsertFrontend { frontend, .. } => Some(Self::Frontend(frontend.at)),
            Write::DeleteFrontend(frontend) => Some(Self::Frontend(*frontend)),
            Write::InsertNode(ip) | Write::DeleteNode(ip) => Some(Self::Node(*ip)),
            Write::StoreSettings(_) => Some(Self::Settings),
            _ => None,
        }
    }
}

/// Whether an op wipes an entry that is free. Such an op must not be repeated later, because
/// the entry may be in use again by then.
fn is_wipe(op: &Op) -> bool {
    let wipes = matches!(op.write, Write::StoreBackend { .. } | Write::WipeService(_));
    op.owner == NO_OWNER && wipes
}

/// Does one op.
pub fn perform(op: &Op, dataplane: &mut impl Dataplane) -> Result<(), DataplaneError> {
    match &op.write {
        Write::StoreBackend { id, entry } => store_backend(*id, entry, dataplane),
        Write::StoreSlots { start, backends } => dataplane.store_slots(*start, backends),
        Write::StoreService(entry) => dataplane.store_service(op.owner, *entry),
        Write::WipeService(index) => dataplane.store_service(*index, Service::default()),
        Write::PublishCluster(range) => dataplane.publish_cluster(op.owner, *range),
        Write::PublishLocal(range) => dataplane.publish_local(op.owner, *range),
        Write::StoreName(name) => dataplane.store_name(op.owner, **name),
        Write::UpsertFrontend { frontend: DesiredFrontend { at, kind, flags }, .. } => {
            let value = Frontend { service: op.owner, kind: *kind, flags: *flags, zero: 0 };
            match at.ip {
                IpAddr::V4(ip) => dataplane.upsert_frontend4(key(at, ip.into()), value),
                IpAddr::V6(ip) => dataplane.upsert_frontend6(key(at, ip.into()), value),
            }
        }
        Write::DeleteFrontend(frontend) => match frontend.ip {
            IpAddr::V4(ip) => dataplane.delete_frontend4(key(frontend, ip.into())),
            IpAddr::V6(ip) => dataplane.delete_frontend6(key(frontend, ip.into())),
        },
        Write::InsertRange(IpNet::V4(net)) => dataplane.insert_range4(range4(op.owner, *net)),
        Write::InsertRange(IpNet::V6(net)) => dataplane.insert_range6(range6(op.owner, *net)),
        Write::DeleteRange(IpNet::V4(net)) => dataplane.delete_range4(range4(op.owner, *net)),
        Write::DeleteRange(IpNet::V6(net)) => dataplane.delete_range6(range6(op.owner, *net)),
        Write::InsertNode(IpAddr::V4(ip)) => dataplane.insert_node4((*ip).into()),
        Write::InsertNode(IpAddr::V6(ip)) => dataplane.insert_node6((*ip).into()),
        Write::DeleteNode(IpAddr::V4(ip)) => dataplane.delete_node4((*ip).into()),
        Write::DeleteNode(IpAddr::V6(ip)) => dataplane.delete_node6((*ip).into()),
        Write::StoreSettings(settings) => dataplane.store_settings(settings),
    }
}

fn store_backend(
    id: u32,
    entry: &BackendEntry,
    dataplane: &mut impl Dataplane,
) -> Result<(), DataplaneError> {
    match entry.ip {
        IpAddr::V4(ip) => {
            let node = if let Some(IpAddr::V4(node)) = entry.node {
                node.into()
            } else {
                Address4::default()
            };
            dataplane.store_backend4(id, backend(entry, ip.into(), node))
        }
        IpAddr::V6(ip) => {
            let node = if let Some(IpAddr::V6(node)) = entry.node {
                node.into()
            } else {
                Address6::default()
            };
            dataplane.store_backend6(id, backend(entry, ip.into(), node))
        }
    }
}

fn backend<A: Default>(entry: &BackendEntry, address: A, node: A) -> Backend<A> {
    Backend {
        address,
        port: Be16::new(entry.port),
        generation: entry.generation,
        sets: entry.sets,
        flags: entry.flags,
        service: entry.service,
        node,
        ..Backend::default()
    }
}

fn range4(service: u32, net: Ipv4Net) -> RangeKey<Address4> {
    RangeKey::new(service, net.network().into(), net.prefix_len().into())
}

fn range6(service: u32, net: Ipv6Net) -> RangeKey<Address6> {
    RangeKey::new(service, net.network().into(), net.prefix_len().into())
}

fn key<A>(frontend: &FrontendAddress, address: A) -> FrontendKey<A> {
    FrontendKey::new(address, Be16::new(frontend.port), frontend.protocol)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use lb_common::abi::{frontend::FrontendKind, service::SlotRange};

    use super::*;
    use crate::dataplane::{Capacity, fake::Fake};

    const FULL: Capacity = Capacity {
        services: 8,
        slots: 8,
        backends4: 8,
        backends6: 8,
        frontends4: 0,
        frontends6: 8,
        ranges4: 8,
        ranges6: 8,
        nodes4: 8,
        nodes6: 8,
    };

    const FRONTEND: FrontendAddress =
        FrontendAddress { ip: IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), port: 80, protocol: 6 };

    fn upsert(owner: u32, replaces: Option<u32>) -> Op {
        let frontend = DesiredFrontend { at: FRONTEND, kind: FrontendKind::CLUSTER_IP, flags: 0 };
        Op { owner, write: Write::UpsertFrontend { frontend, replaces } }
    }

    fn publish(owner: u32) -> Op {
        Op { owner, write: Write::PublishCluster(SlotRange::new(owner, 1)) }
    }

    /// FRONTENDS4 is full: the ops that are left, and the service ports that are published.
    #[track_caller]
    fn check(ops: &[Op], left: &[usize], published: &[u32]) {
        let mut fake = Fake::new(FULL);
        let unfinished = execute(Plan { ops: ops.to_vec() }, &mut fake);
        let expected: Vec<_> = left.iter().map(|at| ops[*at].clone()).collect();
        assert_eq!(unfinished.ops, expected);
        let set = |index: &u32| fake.services[*index as usize].cluster != SlotRange::EMPTY;
        assert_eq!(
            (0..8).filter(set).collect::<BTreeSet<_>>(),
            published.iter().copied().collect()
        );
    }

    #[test]
    fn later_ops_of_the_same_owner_wait() {
        check(&[publish(1), upsert(2, None), publish(2), publish(3)], &[1, 2], &[1, 3]);
    }

    #[test]
    fn the_owner_that_a_frontend_was_to_be_taken_from_waits() {
        check(&[upsert(2, Some(1)), publish(1), publish(3)], &[0, 1], &[3]);
    }

    #[test]
    fn later_ops_on_the_same_frontend_wait() {
        let delete = Op { owner: 4, write: Write::DeleteFrontend(FRONTEND) };
        let ops = [upsert(2, None), delete, upsert(3, None), publish(4), publish(5)];
        check(&ops, &[0, 1, 2, 3], &[5]);
    }

    #[test]
    fn later_ops_on_the_same_address_of_a_node_wait() {
        let node = |write: fn(IpAddr) -> Write, last| Op {
            owner: NO_OWNER,
            write: write([192, 0, 2, last].into()),
        };
        let mut fake = Fake::new(Capacity { nodes4: 1, ..FULL });
        let full = [node(Write::InsertNode, 1), node(Write::InsertNode, 2)];
        let ops = [&full[..], &[node(Write::DeleteNode, 2), node(Write::DeleteNode, 1)]].concat();
        let unfinished = execute(Plan { ops: ops.clone() }, &mut fake);
        assert_eq!((unfinished.ops, unfinished.errors.len()), (ops[1..3].to_vec(), 1));
        assert!(fake.nodes4.is_empty());
    }

    #[test]
    fn what_failed_to_be_wiped_is_not_wiped_later() {
        let mut fake = Fake::new(FULL);
        let plan = Plan { ops: vec![Op { owner: NO_OWNER, write: Write::WipeService(8) }] };
        let unfinished = execute(plan, &mut fake);
        assert_eq!((unfinished.ops.len(), unfinished.errors.len()), (0, 1));
    }
}
