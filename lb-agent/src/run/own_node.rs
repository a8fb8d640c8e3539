//! The state of this node's Node object, for the tasks that act on it.

use k8s_openapi::api::core::v1::Node;
use lb_control::model::event::{Object, ObjectEvent, ObjectKind};
use tokio::sync::watch;

/// What is known of this node's Node object.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum OwnNode {
    /// Nodes are not listed yet.
    #[default]
    Unknown,
    /// There is none.
    Absent,
    /// This one.
    Present(Box<Node>),
}

impl OwnNode {
    /// What an event says of the Node of this name; none if it says nothing.
    fn of(event: &ObjectEvent, name: &str) -> Option<Self> {
        let own = |object: &Object| match object {
            Object::Node(node) if node.metadata.name.as_deref() == Some(name) => {
                Some(Self::Present(node.clone()))
            }
            _ => None,
        };
        if event.kind() != ObjectKind::Node || event.has_unreadable(name) {
            return None;
        }
        match event {
            ObjectEvent::Applied(object) => own(object),
            ObjectEvent::Deleted(_, deleted) => (deleted.name == name).then_some(Self::Absent),
            ObjectEvent::Unreadable(..) => None,
            ObjectEvent::Replaced(_, objects) | ObjectEvent::ReplacedExcept(_, objects, _) => {
                Some(objects.iter().find_map(own).unwrap_or(Self::Absent))
            }
        }
    }
}

/// Publishes the state of the Node of this name after an event.
pub(super) fn publish(event: &ObjectEvent, name: &str, own: &watch::Sender<OwnNode>) {
    if let Some(now) = OwnNode::of(event, name) {
        own.send_if_modified(|before| {
            let is_changed = *before != now;
            *before = now;
            is_changed
        });
    }
}
