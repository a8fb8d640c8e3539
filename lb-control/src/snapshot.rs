//! The parsed objects of the source, and which Services changed since the last look.
//!
//! It decides nothing about endpoints or frontends. An event marks the one Service that it
//! concerns as changed, and none if the change does not matter.

pub mod nodes;
mod reporters;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;
use k8s_openapi::{
    api::{core::v1, discovery::v1::EndpointSlice, networking::v1::ServiceCIDR},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use crate::{
    model::{
        self, IpFamily, Parsed, Refusal,
        event::{Object, ObjectEvent, ObjectKind, ObjectName, Unreadable},
        keys::TRIGGER_TIME_ANNOTATION,
        node::{self, Node},
        service::{self, Service},
        slice::{self, Slice},
    },
    options::Limits,
};

use nodes::NodeIndex;

/// The parsed objects of the source, as far as this node needs them.
#[derive(Debug)]
pub struct Snapshot {
    node_name: String,
    limits: Limits,
    awaited: BTreeSet<ObjectKind>,
    /// In boxes, because almost half of a table of this size is empty.
    services: HashMap<Arc<str>, Box<Entry>>,
    /// The Service of every slice, by `namespace/name` of the slice.
    services_of_slices: HashMap<Arc<str>, Arc<str>>,
    node: Option<Node>,
    nodes: NodeIndex,
    /// How many endpoints run on this node.
    local_endpoints: usize,
    service_cidrs: BTreeMap<String, Vec<IpNet>>,
    refusals: BTreeMap<(ObjectKind, ObjectName), Vec<Refusal>>,
    dirty: Dirty,
}

/// A Service and its slices; either may come first.
#[derive(Debug, Default)]
pub struct Entry {
    /// The Service, if there is one to program.
    pub service: Option<Service>,
    /// The slices, by name.
    slices: Vec<(Arc<str>, Slice)>,
}

impl Entry {
    /// The slices, in the order of their names.
    pub fn slices(&self) -> impl Iterator<Item = &Slice> {
        self.slices.iter().map(|(_, slice)| slice)
    }

    /// Whether any endpoint is on one of these nodes.
    fn is_on(&self, nodes: &HashSet<Arc<str>>) -> bool {
        let endpoints = self.slices().flat_map(|slice| &slice.endpoints);
        endpoints.filter_map(|endpoint| endpoint.node.as_ref()).any(|node| nodes.contains(node))
    }
}

/// What changed since the last look.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Services, as `namespace/name`, whose object or slices changed, or the address of a node
    /// of their endpoints; in no order, and some more than once.
    pub services: Vec<Arc<str>>,
    /// The zone of this node changed: every Service may choose other endpoints.
    pub everything: bool,
    /// Addresses of Nodes were added or removed.
    pub nodes: bool,
    /// The ServiceCIDRs changed.
    pub service_cidrs: bool,
    /// Refusals that were not there before.
    pub refusals: Vec<Refusal>,
    /// Objects of which less is refused than before; deleted ones among them.
    pub resolved: Vec<(ObjectKind, ObjectName)>,
    /// The causes of changes of slices that still exist.
    pub triggers: Vec<Trigger>,
}

/// The cause of a change of a slice, such as a pod that became ready or a Service that was
/// edited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trigger {
    /// The Service, as `namespace/name`.
    pub service: Arc<str>,
    /// The family of the slice.
    pub family: IpFamily,
    /// When it happened, by the clock of the cluster.
    pub at: Timestamp,
}

impl Snapshot {
    /// An empty snapshot for the node of this name. `expected` are the kinds, beside
    /// Service and EndpointSlice, whose first list completes the state.
    pub fn new(node_name: &str, expected: impl IntoIterator<Item = ObjectKind>) -> Self {
        Self {
            node_name: node_name.to_owned(),
            limits: Limits::default(),
            awaited: expected
                .into_iter()
                .chain([ObjectKind::Service, ObjectKind::EndpointSlice])
                .collect(),
            services: HashMap::new(),
            services_of_slices: HashMap::new(),
            node: None,
            nodes: NodeIndex::default(),
            local_endpoints: 0,
            service_cidrs: BTreeMap::new(),
            refusals: BTreeMap::new(),
            dirty: Dirty::default(),
        }
    }

    /// Sets what a Service may ask for; for Services that are applied from now on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Whether the first list of every expected kind has arrived.
    pub fn is_complete(&self) -> bool {
        self.awaited.is_empty()
    }

    /// The kinds whose first list is still to come.
    pub fn awaited(&self) -> impl Iterator<Item = ObjectKind> {
        self.awaited.iter().copied()
    }

    /// No longer waits for a kind, because the source does not serve it.
    pub fn expect_no(&mut self, kind: ObjectKind) {
        self.awaited.remove(&kind);
    }

    /// The Service `namespace/name`, with its slices.
    pub fn service(&self, name: &str) -> Option<&Entry> {
        self.services.get(name).map(|entry| &**entry)
    }

    /// The names of all Services and of those that only have slices, in no order.
    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.services.keys()
    }

    /// The name of this node.
    pub fn node_name(&self) -> &str {
        &self.node_name
    }

    /// This node's object as it was last, if there ever was one.
    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// The addresses of all Nodes.
    pub fn nodes(&self) -> &NodeIndex {
        &self.nodes
    }

    /// The prefixes of all ServiceCIDRs.
    pub fn service_cidrs(&self) -> impl Iterator<Item = IpNet> {
        self.service_cidrs.values().flatten().copied()
    }

    /// Everything that is refused now, except conflicts between Services.
    pub fn refusals(&self) -> impl Iterator<Item = &Refusal> {
        self.refusals.values().flatten()
    }

    /// Whether anything changed since the last [`Self::take_dirty`].
    pub fn has_changes(&self) -> bool {
        self.dirty != Dirty::default() || self.nodes.has_moved()
    }

    /// What is refused of an object itself.
    pub fn refusals_of(&self, kind: ObjectKind, name: &ObjectName) -> &[Refusal] {
        self.refusals.get(&(kind, name.clone().of_kind(kind))).map_or(&[], |list| list)
    }

    /// Whether this node's agent is the one that reports what is refused of an object. Refusals of
    /// a Node are known to its own agent alone.
    pub fn is_reporter(&self, kind: ObjectKind, name: &ObjectName) -> bool {
        if kind == ObjectKind::Node {
            return true;
        }
        let is_used = self.local_endpoints > 0;
        reporters::is_reporter(&self.node_name, is_used, self.nodes.of_endpoints(), (kind, name))
    }

    /// What changed since the last call. Only Services that match `needs_nodes` depend on the
    /// addresses of Nodes.
    pub fn take_dirty(&mut self, needs_nodes: impl Fn(&Service) -> bool) -> Dirty {
        let mut dirty = std::mem::take(&mut self.dirty);
        let moved = self.nodes.take_moved();
        // One pass over all endpoints, however many Nodes changed: it is rare.
        if !moved.is_empty() && !dirty.everything {
            let needs = |entry: &Entry| entry.service.as_ref().is_some_and(&needs_nodes);
            let on_them =
                self.services.iter().filter(|(_, entry)| needs(entry) && entry.is_on(&moved));
            dirty.services.extend(on_them.map(|(name, _)| Arc::clone(name)));
        }
        dirty
    }

    /// Applies a change of the source.
    pub fn apply(&mut self, event: ObjectEvent) {
        match event {
            ObjectEvent::Applied(object) => self.apply_object(&object),
            ObjectEvent::Deleted(kind, name) => self.delete(kind, &name),
            ObjectEvent::Replaced(kind, objects) => self.replace(kind, &objects, &[]),
            ObjectEvent::ReplacedExcept(kind, objects, unreadable) => {
                self.replace(kind, &objects, &unreadable);
            }
            ObjectEvent::Unreadable(kind, object) => self.refuse_unreadable(kind, object),
        }
    }

    /// Applies a complete list. No object of it is dropped before all are parsed: what is kept would
    /// get the memory of what is dropped, a few bytes in each page, and no page would become free.
    fn replace(&mut self, kind: ObjectKind, objects: &[Object], unreadable: &[Unreadable]) {
        let unread = unreadable.iter().map(|object| object.name.clone().of_kind(kind));
        let kept: HashSet<_> = objects.iter().map(name_of).chain(unread).collect();
        for name in self.names_of(kind) {
            if !kept.contains(&name) {
                self.delete(kind, &name);
            }
        }
        objects.iter().for_each(|object| self.apply_object(object));
        for object in unreadable {
            self.refuse_unreadable(kind, object.clone());
        }
        self.nodes.names.forget_unused();
        self.awaited.remove(&kind);
    }

    /// Keeps what is known of an object.
    fn refuse_unreadable(&mut self, kind: ObjectKind, object: Unreadable) {
        if kind == ObjectKind::Node && object.name.name != self.node_name {
            return;
        }
        let key = (kind, object.name.clone().of_kind(kind));
        let refusal = Refusal::unreadable(kind, object);
        let held = self.refusals.insert(key.clone(), vec![refusal.clone()]).unwrap_or_default();
        if held.iter().any(|other| *other != refusal) {
            self.dirty.resolved.push(key);
        }
        if !held.contains(&refusal) {
            self.dirty.refusals.push(refusal);
        }
    }

    fn apply_object(&mut self, object: &Object) {
        match object {
            Object::Service(service) => self.apply_service(service),
            Object::EndpointSlice(slice) => self.apply_slice(slice),
            Object::Node(node) => self.apply_node(node),
            Object::ServiceCidr(object) => self.apply_service_cidr(object),
        }
    }

    fn delete(&mut self, kind: ObjectKind, name: &ObjectName) {
        match kind {
            ObjectKind::Service => self.set_service(&key_of(name), None),
            ObjectKind::EndpointSlice => self.remove_slice(&key_of(name)),
            // The last state of this node's own Node stays: a Node that somebody deletes takes
            // nothing from what works.
            ObjectKind::Node if name.name == self.node_name => {}
            ObjectKind::Node => self.set_node(&name.name, None),
            ObjectKind::ServiceCidr => {
                self.dirty.service_cidrs |= self.service_cidrs.remove(&name.name).is_some();
            }
        }
        let key = (kind, name.clone().of_kind(kind));
        if self.refusals.remove(&key).is_some() {
            self.dirty.resolved.push(key);
        }
    }

    /// The names of the objects of a kind that are known now.
    fn names_of(&self, kind: ObjectKind) -> Vec<ObjectName> {
        let of_name = |name: &str| ObjectName { namespace: String::new(), name: name.to_owned() };
        let mut names: Vec<_> = match kind {
            ObjectKind::Service => {
                let held = self.services.iter().filter(|(_, entry)| entry.service.is_some());
                held.map(|(key, _)| (&**key).into()).collect()
            }
            ObjectKind::EndpointSlice => {
                self.services_of_slices.keys().map(|key| (&**key).into()).collect()
            }
            ObjectKind::Node => self.nodes.names().map(|name| of_name(name)).collect(),
            ObjectKind::ServiceCidr => {
                self.service_cidrs.keys().map(|name| of_name(name)).collect()
            }
        };
        let refused = self.refusals.keys().filter(|(of, _)| *of == kind);
        names.extend(refused.map(|(_, name)| name.clone()));
        names
    }

    fn apply_service(&mut self, object: &v1::Service) {
        let key = key_of(&model::object_name(&object.metadata));
        let parsed = service::parse(object, &self.limits);
        let service = self.accept(ObjectKind::Service, &object.metadata, parsed);
        self.set_service(&key, service);
    }

    fn set_service(&mut self, key: &str, service: Option<Service>) {
        let held = self.services.get_mut(key);
        if held.as_ref().and_then(|entry| entry.service.as_ref()) == service.as_ref() {
            return;
        }
        let name: Arc<str> = match &service {
            Some(service) => Arc::clone(&service.name),
            None => key.into(),
        };
        self.dirty.services.push(Arc::clone(&name));
        match held {
            Some(entry) => entry.service = service,
            None => {
                let entry = Entry { service, slices: Vec::new() };
                self.services.insert(name, Box::new(entry));
            }
        }
        self.drop_if_empty(key);
    }

    fn apply_slice(&mut self, object: &EndpointSlice) {
        let key = key_of(&model::object_name(&object.metadata));
        let parsed = slice::parse(object, &self.node_name, &mut self.nodes.names);
        let accepted = self.accept(ObjectKind::EndpointSlice, &object.metadata, parsed);
        let Some(mut slice) = accepted else {
            return self.remove_slice(&key);
        };
        if self.services_of_slices.get(key.as_str()).is_some_and(|held| *held != slice.service) {
            self.remove_slice(&key);
        }
        let service = match self.services.get_key_value(&slice.service) {
            Some((name, _)) => Arc::clone(name),
            None => Arc::clone(&slice.service),
        };
        // One text for the Service, its slices and the tables.
        slice.service = Arc::clone(&service);
        let family = slice.family;
        let local = slice.local_endpoints();
        let entry = self.services.entry(Arc::clone(&service)).or_default();
        match entry.slices.binary_search_by(|(name, _)| (**name).cmp(&key)) {
            Ok(position) if entry.slices[position].1 == slice => return,
            Ok(position) => {
                let before = std::mem::replace(&mut entry.slices[position].1, slice);
                self.local_endpoints = self.local_endpoints + local - before.local_endpoints();
            }
            Err(position) => {
                self.local_endpoints += local;
                let key: Arc<str> = key.into();
                if entry.slices.is_empty() {
                    // Almost every Service has one slice.
                    entry.slices.reserve_exact(1);
                }
                entry.slices.insert(position, (Arc::clone(&key), slice));
                self.services_of_slices.insert(key, Arc::clone(&service));
            }
        }
        if let Some(at) = trigger_time(object) {
            self.dirty.triggers.push(Trigger { service: Arc::clone(&service), family, at });
        }
        self.dirty.services.push(service);
    }

    fn remove_slice(&mut self, key: &str) {
        let Some(service) = self.services_of_slices.remove(key) else { return };
        if let Some(entry) = self.services.get_mut(&service)
            && let Ok(position) = entry.slices.binary_search_by(|(name, _)| (**name).cmp(key))
        {
            let (_, slice) = entry.slices.remove(position);
            self.local_endpoints -= slice.local_endpoints();
        }
        self.drop_if_empty(&service);
        // The removal has another cause than the last change of the slice.
        self.dirty.triggers.retain(|trigger| trigger.service != service);
        self.dirty.services.push(service);
    }

    fn drop_if_empty(&mut self, key: &str) {
        let is_empty = |entry: &Entry| entry.service.is_none() && entry.slices.is_empty();
        if self.services.get(key).is_some_and(|entry| is_empty(entry)) {
            self.services.remove(key);
        }
    }

    fn apply_node(&mut self, object: &v1::Node) {
        let name = object.metadata.name.as_deref().unwrap_or_default();
        let parsed = node::parse(object);
        // The agent of another Node reports what is wrong with that Node.
        let is_own = name == self.node_name;
        let node = if is_own {
            self.accept(ObjectKind::Node, &object.metadata, parsed)
        } else {
            parsed.value
        };
        self.set_node(name, node);
    }

    fn set_node(&mut self, name: &str, node: Option<Node>) {
        let addresses = node.as_ref().map(|node| node.addresses.clone());
        self.dirty.nodes |= self.nodes.set(name, addresses);
        if name == self.node_name {
            let zone = |node: &Option<Node>| node.as_ref().and_then(|node| node.zone.clone());
            self.dirty.everything |= zone(&self.node) != zone(&node);
            self.node = node;
        }
    }

    fn apply_service_cidr(&mut self, object: &ServiceCIDR) {
        let parsed = node::parse_service_cidr(object);
        let prefixes =
            self.accept(ObjectKind::ServiceCidr, &object.metadata, parsed).unwrap_or_default();
        let name = object.metadata.name.clone().unwrap_or_default();
        let held = self.service_cidrs.insert(name, prefixes.clone());
        self.dirty.service_cidrs |= held != Some(prefixes);
    }

    /// Records the refusals of an object and returns the rest of the object.
    fn accept<T>(
        &mut self,
        kind: ObjectKind,
        metadata: &ObjectMeta,
        parsed: Parsed<T>,
    ) -> Option<T> {
        if parsed.refusals.is_empty() && self.refusals.is_empty() {
            return parsed.value;
        }
        let key = (kind, model::object_name(metadata).of_kind(kind));
        let held = self.refusals.remove(&key).unwrap_or_default();
        let new = parsed.refusals.iter().filter(|refusal| !held.contains(refusal));
        self.dirty.refusals.extend(new.cloned());
        if held.iter().any(|refusal| !parsed.refusals.contains(refusal)) {
            self.dirty.resolved.push(key.clone());
        }
        if !parsed.refusals.is_empty() {
            self.refusals.insert(key, parsed.refusals);
        }
        parsed.value
    }
}

/// The time of the event that caused the last change of a slice, if the slice says it.
fn trigger_time(slice: &EndpointSlice) -> Option<Timestamp> {
    TRIGGER_TIME_ANNOTATION.annotation(&slice.metadata)?.parse().ok()
}

/// The name of an object as in the event of its deletion.
fn name_of(object: &Object) -> ObjectName {
    let (kind, metadata) = match object {
        Object::Service(object) => (ObjectKind::Service, &object.metadata),
        Object::EndpointSlice(object) => (ObjectKind::EndpointSlice, &object.metadata),
        Object::Node(object) => (ObjectKind::Node, &object.metadata),
        Object::ServiceCidr(object) => (ObjectKind::ServiceCidr, &object.metadata),
    };
    model::object_name(metadata).of_kind(kind)
}

/// `namespace/name`.
fn key_of(name: &ObjectName) -> String {
    let namespace = if name.namespace.is_empty() { "default" } else { &name.namespace };
    format!("{namespace}/{}", name.name)
}

#[cfg(test)]
mod tests;
