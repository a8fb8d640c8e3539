//! A Kubernetes API server as a source of events.
//!
//! It keeps no objects: a list goes to the receiver as one [`ObjectEvent::Replaced`], which
//! the receiver compares with its own objects. Invariant: the watch ends only with its
//! receiver, whatever the server does.
//!
//! The protocol is client-go's reflector: a list, then changes from its version on. It is
//! [`reflector`]'s own and not kube-runtime's, because with 5,000 agents on one API server these
//! must hold, and kube-runtime's watcher cannot be configured to do any of them:
//! - a list is never older than what the agent has seen (kube-runtime asks for any version), and
//!   its fallback from streams comes from the watch cache (kube-runtime's pages are read from etcd);
//! - a stream that ends early is not opened again at once, and `Retry-After` is honoured;
//! - objects are decoded and cut one at a time, and an object that cannot be decoded costs no other
//!   (kube-runtime decodes pages as a whole, and drops the object from a streamed list);
//! - the field selector changes while the agent runs.

mod access;
mod connect;
mod decode;
mod failure;
mod learned;
mod liveness;
mod pause;
mod reading;
mod reflector;
mod scope;
mod servers;
mod transport;

pub use access::{ConnectError, Options};
pub use connect::{Connection, connect};
pub use learned::Learned;
pub use liveness::{Figures, Liveness};
pub use scope::{NodeScope, Nodes};
pub use transport::Proxies;

use std::ops::ControlFlow;

use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use lb_control::model::event::{Object, ObjectEvent, ObjectKind};
use tokio::sync::mpsc::Sender;

use reflector::Reflector;

/// Watches all kinds until the receiver is gone; Nodes as far as `nodes` says.
pub async fn watch(connection: Connection, nodes: NodeScope, sender: Sender<ObjectEvent>) {
    let of = |kind| Reflector::new(kind, &connection, &sender);
    tokio::join!(
        of(ObjectKind::Service).run(None),
        of(ObjectKind::EndpointSlice).run(None),
        of(ObjectKind::Node).run(Some(nodes)),
        of(ObjectKind::ServiceCidr).run(None),
    );
}

/// The first Node for which `is_meant`, by one list from the watch cache that is read no further
/// than that Node.
///
/// # Errors
/// A sentence, if the Nodes cannot be listed.
pub async fn find_node(
    connection: &Connection,
    is_meant: impl Fn(&Node) -> bool,
) -> Result<Option<Node>, String> {
    let any = ListParams::default().at("0");
    let mut found = None;
    let listed = reading::list(connection, ObjectKind::Node, &any, |item| match item.outcome {
        Ok(Object::Node(node)) if is_meant(&node) => {
            found = Some(*node);
            ControlFlow::Break(())
        }
        _ => ControlFlow::Continue(()),
    });
    listed.await.map_err(|failure| failure.to_string())?;
    Ok(found)
}

#[cfg(test)]
mod tests;
