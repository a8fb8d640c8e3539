//! Objects as a source sends them, and how they change.

use std::fmt;

use k8s_openapi::{
    api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
        networking::v1::ServiceCIDR,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

/// The kinds of object that the agent watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    /// Service.
    Service,
    /// EndpointSlice.
    EndpointSlice,
    /// Node.
    Node,
    /// ServiceCIDR; older API servers do not serve it.
    ServiceCidr,
}

impl ObjectKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Service, Self::EndpointSlice, Self::Node, Self::ServiceCidr];

    /// The name that Kubernetes gives the kind.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
        }
    }

    /// Group and version of the objects that are read.
    pub const fn api_version(self) -> &'static str {
        match self {
            Self::Service | Self::Node => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::ServiceCidr => "networking.k8s.io/v1",
        }
    }

    /// Whether objects of the kind live in a namespace.
    pub const fn is_namespaced(self) -> bool {
        matches!(self, Self::Service | Self::EndpointSlice)
    }
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// An object as the source sent it, not validated.
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

impl Object {
    /// The kind of the object.
    pub fn kind(&self) -> ObjectKind {
        match self {
            Self::Service(_) => ObjectKind::Service,
            Self::EndpointSlice(_) => ObjectKind::EndpointSlice,
            Self::Node(_) => ObjectKind::Node,
            Self::ServiceCidr(_) => ObjectKind::ServiceCidr,
        }
    }

    /// The object's metadata.
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Self::Service(object) => &object.metadata,
            Self::EndpointSlice(object) => &object.metadata,
            Self::Node(object) => &object.metadata,
            Self::ServiceCidr(object) => &object.metadata,
        }
    }

    /// The object's metadata, to be changed.
    pub fn metadata_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Self::Service(object) => &mut object.metadata,
            Self::EndpointSlice(object) => &mut object.metadata,
            Self::Node(object) => &mut object.metadata,
            Self::ServiceCidr(object) => &mut object.metadata,
        }
    }

    /// Namespace and name; empty where the object has none.
    pub fn name(&self) -> ObjectName {
        let metadata = self.metadata();
        ObjectName {
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: metadata.name.clone().unwrap_or_default(),
        }
    }
}

macro_rules! object_from {
    ($($type:ident => $variant:ident),+ $(,)?) => {$(
        impl From<$type> for Object {
            fn from(object: $type) -> Self {
                Self::$variant(Box::new(object))
            }
        }
    )+};
}
object_from! {
    Service => Service,
    EndpointSlice => EndpointSlice,
    Node => Node,
    ServiceCIDR => ServiceCidr,
}

/// Namespace (empty for cluster-scoped kinds) and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// The namespace, or empty.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl ObjectName {
    /// The name without a namespace, if objects of the kind have none.
    #[must_use]
    pub fn of_kind(mut self, kind: ObjectKind) -> Self {
        if !kind.is_namespaced() {
            self.namespace.clear();
        }
        self
    }
}

impl From<&str> for ObjectName {
    /// Reads `namespace/name`, or a name alone.
    fn from(text: &str) -> Self {
        let (namespace, name) = text.split_once('/').unwrap_or(("", text));
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            formatter.write_str(&self.name)
        } else {
            write!(formatter, "{}/{}", self.namespace, self.name)
        }
    }
}

/// An object that the source has and that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Its name; empty if that cannot be read either.
    pub name: ObjectName,
    /// Its uid, or empty.
    pub uid: String,
    /// The path of the field that cannot be read.
    pub field: String,
    /// What is wrong there.
    pub error: String,
}

/// A change of the objects of the source.
#[derive(Clone, Debug, PartialEq)]
pub enum ObjectEvent {
    /// The complete list of a kind: every other object of the kind is gone. With the first
    /// list of a kind, all its objects are known.
    Replaced(ObjectKind, Vec<Object>),
    /// The same, but for objects that cannot be read: what was known of them stays.
    ReplacedExcept(ObjectKind, Vec<Object>, Vec<Unreadable>),
    /// An object was created or changed.
    Applied(Object),
    /// An object was created or changed and cannot be read: what was known of it stays.
    Unreadable(ObjectKind, Unreadable),
    /// An object was deleted.
    Deleted(ObjectKind, ObjectName),
}

impl ObjectEvent {
    /// The kind of its objects.
    pub fn kind(&self) -> ObjectKind {
        match self {
            Self::Replaced(kind, _)
            | Self::ReplacedExcept(kind, ..)
            | Self::Unreadable(kind, _)
            | Self::Deleted(kind, _) => *kind,
            Self::Applied(object) => object.kind(),
        }
    }

    /// The objects of a list that can be read, if it is one.
    pub fn listed(&self) -> Option<&[Object]> {
        match self {
            Self::Replaced(_, objects) | Self::ReplacedExcept(_, objects, _) => Some(objects),
            Self::Applied(_) | Self::Unreadable(..) | Self::Deleted(..) => None,
        }
    }

    /// Whether it says that there is an object of this name, which cannot be read.
    pub fn has_unreadable(&self, name: &str) -> bool {
        let is_it = |object: &Unreadable| object.name.name == name;
        match self {
            Self::ReplacedExcept(_, _, unreadable) => unreadable.iter().any(is_it),
            Self::Unreadable(_, object) => is_it(object),
            Self::Replaced(..) | Self::Applied(_) | Self::Deleted(..) => false,
        }
    }
}
