//! Which Nodes are watched.
//!
//! Every kubelet writes its Node every few minutes, so the agents of a large cluster must not
//! watch all Nodes without need.

use std::time::Duration;

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

/// How long all Nodes are still watched after the last need: whoever deletes and creates a Service
/// again and again must not make every agent list all Nodes each time.
const LINGER: Duration = Duration::from_secs(300);

/// Which Nodes are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nodes {
    /// This node's.
    Own,
    /// All: their addresses are those that direct server return tunnels to, and accepts tunnels
    /// from.
    All,
}

/// Follows which Nodes are needed.
#[derive(Debug)]
pub struct NodeScope {
    node_name: String,
    /// `None` until it is known.
    needed: watch::Receiver<Option<Nodes>>,
    watched: Option<Nodes>,
    /// When all Nodes are not watched any longer.
    ends_at: Option<Instant>,
}

impl NodeScope {
    /// The scope of the node of this name. Nothing is watched before something is needed.
    pub fn new(node_name: &str, needed: watch::Receiver<Option<Nodes>>) -> Self {
        let node_name = node_name.to_owned();
        Self { node_name, needed, watched: None, ends_at: None }
    }

    /// Waits until other Nodes are to be watched, and returns their field selector. It may be
    /// dropped and called again.
    pub(super) async fn changed(&mut self) -> Option<String> {
        loop {
            let needed = *self.needed.borrow_and_update();
            let is_change = needed.is_some() && needed != self.watched;
            if is_change && self.watched != Some(Nodes::All) {
                return self.watch(needed);
            }
            if !is_change {
                self.ends_at = None;
            }
            let ends_at =
                is_change.then(|| *self.ends_at.get_or_insert_with(|| Instant::now() + LINGER));
            tokio::select! {
                changed = self.needed.changed() => if changed.is_err() {
                    // The agent ends.
                    return std::future::pending().await;
                },
                () = at(ends_at) => return self.watch(needed),
            }
        }
    }

    fn watch(&mut self, nodes: Option<Nodes>) -> Option<String> {
        self.watched = nodes;
        self.ends_at = None;
        (nodes == Some(Nodes::Own)).then(|| format!("metadata.name={}", self.node_name))
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
