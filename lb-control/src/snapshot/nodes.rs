//! The addresses of all Nodes, by the names that endpoints use for them.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use crate::model::{IpFamily, SharedNames, node::NodeAddresses};

/// The addresses of all Nodes.
#[derive(Debug, Default)]
pub struct NodeIndex {
    addresses: HashMap<Arc<str>, NodeAddresses>,
    /// The names of these Nodes and of the nodes that endpoints name.
    pub(super) names: SharedNames,
    /// Nodes whose [`NodeIndex::internal_ip`] changed since the last look.
    moved: HashSet<Arc<str>>,
}

impl NodeIndex {
    /// The address of a family at which other nodes reach this node, if it has one.
    pub fn internal_ip(&self, name: &str, family: IpFamily) -> Option<IpAddr> {
        self.addresses.get(name)?.internal_ip(family)
    }

    /// InternalIP and ExternalIP addresses of all Nodes, in no order.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.values().flat_map(|addresses| addresses.all.iter().copied())
    }

    /// The names of all Nodes, in no order.
    pub(super) fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.addresses.keys()
    }

    /// The names of the nodes that endpoints name, in no order.
    pub(super) fn of_endpoints(&self) -> impl Iterator<Item = &str> {
        let by_endpoints = |(name, shared): (&Arc<str>, usize)| {
            let here = [self.addresses.contains_key(name), self.moved.contains(name)];
            shared > here.into_iter().map(usize::from).sum()
        };
        self.names.shared().filter(move |it| by_endpoints(*it)).map(|(name, _)| &**name)
    }

    /// Sets or removes a Node, and returns whether any address was added or removed.
    pub(super) fn set(&mut self, name: &str, addresses: Option<NodeAddresses>) -> bool {
        let held = self.addresses.get(name);
        if held == addresses.as_ref() {
            return false;
        }
        let internal = |addresses: Option<&NodeAddresses>| {
            [IpFamily::V4, IpFamily::V6].map(|family| addresses?.internal_ip(family))
        };
        let all = |addresses: Option<&NodeAddresses>| {
            addresses.map(|addresses| addresses.all.clone()).unwrap_or_default()
        };
        let has_changed = all(held) != all(addresses.as_ref());
        let name = self.names.share(name);
        if internal(held) != internal(addresses.as_ref()) {
            self.moved.insert(Arc::clone(&name));
        }
        match addresses {
            Some(addresses) => self.addresses.insert(name, addresses),
            None => self.addresses.remove(&name),
        };
        has_changed
    }

    /// Whether the [`NodeIndex::internal_ip`] of any Node changed since the last
    /// [`Self::take_moved`].
    pub(super) fn has_moved(&self) -> bool {
        !self.moved.is_empty()
    }

    /// The names of the Nodes whose [`NodeIndex::internal_ip`] changed since the last call.
    pub(super) fn take_moved(&mut self) -> HashSet<Arc<str>> {
        let moved = std::mem::take(&mut self.moved);
        if !moved.is_empty() {
            self.names.forget_unused();
        }
        moved
    }
}
