//! Where objects come from: an API server or a directory of manifests, both as the
//! same stream of [`Event`]s.

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
    networking::v1::ServiceCIDR,
};

/// The kinds of object that the agent watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Service.
    Service,
    /// EndpointSlice.
    EndpointSlice,
    /// Node.
    Node,
    /// ServiceCIDR; an older API server does not serve it.
    ServiceCidr,
}

/// An object as the source gave it, not yet validated.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A Service.
    Service(Box<Service>),
    /// An EndpointSlice.
    EndpointSlice(Box<EndpointSlice>),
    /// A Node.
    Node(Box<Node>),
    /// A ServiceCIDR.
    ServiceCidr(Box<ServiceCIDR>),
}

/// Namespace (empty for cluster-scoped kinds) and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// The namespace, or empty.
    pub namespace: String,
    /// The name.
    pub name: String,
}

/// A change of what the source holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The complete list of a kind: every other object of the kind is gone. The first
    /// one of each kind tells that the kind is known at all.
    Replaced(Kind, Vec<Object>),
    /// An object was created or changed.
    Applied(Object),
    /// An object was deleted.
    Deleted(Kind, ObjectName),
}
