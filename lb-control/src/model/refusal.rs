//! Parts of objects that are not programmed, and why.

use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{
    event::{ObjectKind, ObjectName},
    object_name,
};

/// A part of an object that is not programmed, and why. It becomes a Warning Event.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Refusal {
    /// The kind of the object.
    pub kind: ObjectKind,
    /// The object.
    pub object: ObjectName,
    /// The object's uid; empty if the source gave none.
    pub uid: String,
    /// The path of the field, such as `spec.ports[1].protocol`.
    pub field: String,
    /// What kind of fault it is.
    pub reason: RefusalReason,
    /// What is wrong with the field, with its value. It is for people: no code reads it.
    pub message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ObjectName { namespace, name } = &self.object;
        write!(f, "{:?} {namespace}/{name}, {}: {}", self.kind, self.field, self.message)
    }
}

/// Why a part of an object is refused. The agent's `events::EventReason` says which `reason`
/// an Event has for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RefusalReason {
    /// The protocol is neither TCP nor UDP.
    UnsupportedProtocol,
    /// A name has characters, or a length, that it may not have.
    InvalidName,
    /// The text is not an IP address, or packets cannot be sent to that address.
    InvalidAddress,
    /// The number is not a port number.
    InvalidPort,
    /// The text is not an IP prefix.
    InvalidPrefix,
    /// The field takes one of a few words, and this is not one of them.
    UnknownValue,
    /// The number is outside the range that the field takes.
    OutOfRange,
    /// An earlier part of the same object has this value already.
    Duplicate,
    /// Another Service has the address and port.
    AddressInUse,
    /// The object has another form than this release knows.
    Unreadable,
}

impl RefusalReason {
    /// All reasons.
    pub const ALL: [Self; 10] = [
        Self::UnsupportedProtocol,
        Self::InvalidName,
        Self::InvalidAddress,
        Self::InvalidPort,
        Self::InvalidPrefix,
        Self::UnknownValue,
        Self::OutOfRange,
        Self::Duplicate,
        Self::AddressInUse,
        Self::Unreadable,
    ];
}

/// Collects the refusals of one object.
pub(super) struct Refusals<'a> {
    kind: ObjectKind,
    metadata: &'a ObjectMeta,
    pub(super) list: Vec<Refusal>,
}

impl<'a> Refusals<'a> {
    pub(super) fn new(kind: ObjectKind, metadata: &'a ObjectMeta) -> Self {
        Self { kind, metadata, list: Vec::new() }
    }

    pub(super) fn add(
        &mut self,
        reason: RefusalReason,
        field: impl Into<String>,
        message: impl Into<String>,
    ) {
        self.list.push(Refusal {
            kind: self.kind,
            object: object_name(self.metadata),
            uid: self.metadata.uid.clone().unwrap_or_default(),
            field: field.into(),
            reason,
            message: message.into(),
        });
    }
}
