//! Carries out plans. It decides nothing but what must be left undone after a failure.

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
/// not staged, or retire what is still reached. So are later ops on the same front end,
/// and those of the owner that it should have been taken from; and those on the same
/// address of a node, and on the settings. Nothing else depends on an op that failed.
pub fn execute(plan: Plan, dataplane: &mut impl Dataplane) -> Leftover {
    let mut leftover = Leftover::default();
    let mut owners = HashSet::new();
    let mut shared = HashSet::new();
    for op in plan.ops {
        let entry = Shared::of(&op.action);
        let replaces = match op.action {
            Action::UpsertFrontend { replaces, .. } => replaces,
            _ => None,
        };
        let must_wait =
            owners.contains(&op.owner) || entry.is_some_and(|entry| shared.contains(&entry));
        if !must_wait {
            match perform(&op, dataplane) {
                Ok(()) => continue,
                Err(error) => leftover.errors.push(error),
            }
        }
        owners.extend([op.owner].into_iter().filter(|owner| *owner != NOBODY).chain(replaces));
        shared.extend(entry);
        if !is_wipe(&op) {
            leftover.ops.push(op);
        }
    }
    leftover
}

/// What ops of several owners, or of nobody, write: of two such ops the later one holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Shared {
    Frontend(FrontendAddress),
    Node(IpAddr),
    Settings,
}

impl Shared {
    fn of(action: &Action) -> Option<Self> {
        match action {
            Action::UpsertFrontend { frontend, .. } => Some(Self::Frontend(frontend.at)),
            Action::DeleteFrontend(frontend) => Some(Self::Frontend(*frontend)),
            Action::InsertNode(ip) | Action::DeleteNode(ip) => Some(Self::Node(*ip)),
            Action::StoreSettings(_) => Some(Self::Settings),
            _ => None,
        }
    }
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
        Action::UpsertFrontend { frontend: DesiredFrontend { at, kind, flags }, .. } => {
            let value = Frontend { service: op.owner, kind: *kind, flags: *flags, zero: 0 };
            match at.ip {
                IpAddr::V4(ip) => dataplane.upsert_frontend4(key(at, ip.into()), value),
                IpAddr::V6(ip) => dataplane.upsert_frontend6(key(at, ip.into()), value),
            }
        }
        Action::DeleteFrontend(frontend) => match frontend.ip {
            IpAddr::V4(ip) => dataplane.delete_frontend4(key(frontend, ip.into())),
            IpAddr::V6(ip) => dataplane.delete_frontend6(key(frontend, ip.into())),
        },
        Action::InsertRange(IpNet::V4(net)) => dataplane.insert_range4(range4(op.owner, *net)),
        Action::InsertRange(IpNet::V6(net)) => dataplane.insert_range6(range6(op.owner, *net)),
        Action::DeleteRange(IpNet::V4(net)) => dataplane.delete_range4(range4(op.owner, *net)),
        Action::DeleteRange(IpNet::V6(net)) => dataplane.delete_range6(range6(op.owner, *net)),
        Action::InsertNode(IpAddr::V4(ip)) => dataplane.insert_node4((*ip).into()),
        Action::InsertNode(IpAddr::V6(ip)) => dataplane.insert_node6((*ip).into()),
        Action::DeleteNode(IpAddr::V4(ip)) => dataplane.delete_node4((*ip).into()),
        Action::DeleteNode(IpAddr::V6(ip)) => dataplane.delete_node6((*ip).into()),
        Action::StoreSettings(settings) => dataplane.store_settings(settings),
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

fn backend<A>(entry: &BackendEntry, address: A, node: A) -> Backend<A> {
    Backend {
        address,
        port: Be16::new(entry.port),
        generation: entry.generation,
        sets: entry.sets,
        flags: entry.flags,
        zero: 0,
        service: entry.service,
        node,
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
        Op { owner, action: Action::UpsertFrontend { frontend, replaces } }
    }

    fn publish(owner: u32) -> Op {
        Op { owner, action: Action::PublishCluster(SlotRange::new(owner, 1)) }
    }

    /// Front ends of IPv4 cannot be added: what is left, and who was published?
    #[track_caller]
    fn check(ops: &[Op], left: &[usize], published: &[u32]) {
        let mut fake = Fake::new(FULL);
        let leftover = execute(Plan { ops: ops.to_vec() }, &mut fake);
        let expected: Vec<_> = left.iter().map(|at| ops[*at].clone()).collect();
        assert_eq!(leftover.ops, expected);
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
    fn the_owner_that_a_front_end_was_to_be_taken_from_waits() {
        check(&[upsert(2, Some(1)), publish(1), publish(3)], &[0, 1], &[3]);
    }

    #[test]
    fn later_ops_on_the_same_front_end_wait() {
        let delete = Op { owner: 4, action: Action::DeleteFrontend(FRONTEND) };
        let ops = [upsert(2, None), delete, upsert(3, None), publish(4), publish(5)];
        check(&ops, &[0, 1, 2, 3], &[5]);
    }

    #[test]
    fn later_ops_on_the_same_address_of_a_node_wait() {
        let node = |action: fn(IpAddr) -> Action, last| Op {
            owner: NOBODY,
            action: action([192, 0, 2, last].into()),
        };
        let mut fake = Fake::new(Capacity { nodes4: 1, ..FULL });
        let full = [node(Action::InsertNode, 1), node(Action::InsertNode, 2)];
        let ops = [&full[..], &[node(Action::DeleteNode, 2), node(Action::DeleteNode, 1)]].concat();
        let leftover = execute(Plan { ops: ops.clone() }, &mut fake);
        assert_eq!((leftover.ops, leftover.errors.len()), (ops[1..3].to_vec(), 1));
        assert!(fake.nodes4.is_empty());
    }

    #[test]
    fn what_failed_to_be_wiped_is_not_wiped_later() {
        let mut fake = Fake::new(FULL);
        let plan = Plan { ops: vec![Op { owner: NOBODY, action: Action::WipeService(8) }] };
        let leftover = execute(plan, &mut fake);
        assert_eq!((leftover.ops.len(), leftover.errors.len()), (0, 1));
    }
}
