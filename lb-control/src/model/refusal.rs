//! Parts of objects that are not programmed, and why.

use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{
    event::{ObjectKind, ObjectName, Unreadable},
    object_name,
    text::{Clean, Cut},
};

/// At most so many parts of one object are named; one more refusal has the number of the others.
/// An object with ten thousand bad parts is one bad object.
pub const MAX_REFUSALS: usize = 16;

/// The most bytes of a message. No text of the object in it is longer than
/// [`MAX_SHOWN`](super::text::MAX_SHOWN) bytes.
const MAX_MESSAGE: usize = 512;

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
    /// No Service may have this address.
    ForbiddenAddress,
    /// The object asks for more than a [limit](crate::options::Limits) allows.
    TooLarge,
    /// The object has another form than this release knows.
    Unreadable,
}

impl RefusalReason {
    /// All reasons.
    pub const ALL: [Self; 12] = [
        Self::UnsupportedProtocol,
        Self::InvalidName,
        Self::InvalidAddress,
        Self::InvalidPort,
        Self::InvalidPrefix,
        Self::UnknownValue,
        Self::OutOfRange,
        Self::Duplicate,
        Self::AddressInUse,
        Self::ForbiddenAddress,
        Self::TooLarge,
        Self::Unreadable,
    ];
}

impl Refusal {
    /// The refusal of an object that cannot be read.
    pub fn unreadable(kind: ObjectKind, object: Unreadable) -> Self {
        let Unreadable { name, uid, field, error } = object;
        let error = Cut(&error);
        let message = format!("{error}: the object cannot be read, what was known of it stays");
        let (object, field) = (name.of_kind(kind), Cut(&field).to_string());
        Self { kind, object, uid, field, reason: RefusalReason::Unreadable, message }
    }
}

/// Adds refusals of one object to a list, at most one more than [`MAX_REFUSALS`].
pub fn add_some(list: &mut Vec<Refusal>, mut refusals: impl Iterator<Item = Refusal>) {
    list.extend(refusals.by_ref().take(MAX_REFUSALS));
    let Some(mut more) = refusals.next() else { return };
    let left_out = 1 + refusals.count();
    more.message = format!("{left_out} more parts are refused");
    list.push(more);
}

/// Collects the refusals of one object.
pub(super) struct Refusals<'a> {
    kind: ObjectKind,
    metadata: &'a ObjectMeta,
    list: Vec<Refusal>,
    left_out: usize,
}

impl<'a> Refusals<'a> {
    pub(super) fn new(kind: ObjectKind, metadata: &'a ObjectMeta) -> Self {
        Self { kind, metadata, list: Vec::new(), left_out: 0 }
    }

    pub(super) fn add(
        &mut self,
        reason: RefusalReason,
        field: impl Into<String>,
        message: impl Into<String>,
    ) {
        if self.list.len() >= MAX_REFUSALS {
            self.left_out += 1;
            return;
        }
        let refusal = self.refusal(reason, field.into(), &message.into());
        self.list.push(refusal);
    }

    /// The refusals, at most one more than [`MAX_REFUSALS`].
    pub(super) fn into_list(mut self) -> Vec<Refusal> {
        if let (1.., Some(last)) = (self.left_out, self.list.last()) {
            let message = format!("{} more parts are refused", self.left_out);
            let more = self.refusal(last.reason, "metadata.name".to_owned(), &message);
            self.list.push(more);
        }
        self.list
    }

    fn refusal(&self, reason: RefusalReason, field: String, message: &str) -> Refusal {
        let cut = &message[..message.floor_char_boundary(MAX_MESSAGE)];
        Refusal {
            kind: self.kind,
            object: object_name(self.metadata).of_kind(self.kind),
            uid: self.metadata.uid.clone().unwrap_or_default(),
            field,
            reason,
            message: Clean(cut).to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_with_many_bad_parts_has_few_refusals() {
        let metadata = ObjectMeta::default();
        let list = |count: usize| {
            let mut refusals = Refusals::new(ObjectKind::Service, &metadata);
            for index in 0..count {
                refusals.add(RefusalReason::InvalidPort, format!("spec.ports[{index}]"), "bad");
            }
            refusals.into_list()
        };
        assert_eq!(list(MAX_REFUSALS).len(), MAX_REFUSALS);
        let many = list(10_000);
        assert_eq!(many.len(), MAX_REFUSALS + 1);
        assert_eq!(many[MAX_REFUSALS].message, "9984 more parts are refused");
    }
}
