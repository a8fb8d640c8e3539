//! Says so if this node's name is not that of its Node object.
//!
//! A wrong name makes every endpoint one of another node: `externalTrafficPolicy: Local` drops,
//! and health checks fail. Whether there is another Node with this node's addresses shows
//! whether the name is wrong or the Node is only not there yet.

use std::{net::IpAddr, time::Duration};

use k8s_openapi::api::core::v1::Node;
use lb_control::model::network::NodeNetwork;
use tokio::{sync::watch, time::timeout};

use super::own_node::OwnNode;
use crate::{
    health::{Health, Severity},
    watch::api::{Connection, find_node},
};

/// How long the Node may take to appear before others are looked at, and how long the pause before
/// the next look is: doubled each time, because all Nodes are listed.
const PATIENCE: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(3600);
/// The fault that [`Health`] has while the name is wrong.
const FAULT: &str = "node name";

/// Compares until the agent ends.
pub(super) async fn check(
    connection: Connection,
    name: String,
    network: watch::Receiver<NodeNetwork>,
    mut node: watch::Receiver<OwnNode>,
    health: Health,
) {
    let mut wait = PATIENCE;
    loop {
        let is_absent = *node.borrow_and_update() == OwnNode::Absent;
        if !is_absent {
            health.set(FAULT, Severity::Misconfigured, None);
            wait = PATIENCE;
            if node.changed().await.is_err() {
                return;
            }
            continue;
        }
        match timeout(wait, node.changed()).await {
            Ok(Ok(())) => continue,
            Ok(Err(_)) => return,
            Err(_) => {}
        }
        let addresses = network.borrow().addresses.clone();
        match named(&connection, &addresses).await {
            Ok(Some(other)) => {
                health.set(FAULT, Severity::Misconfigured, Some(wrong(&name, &other)));
            }
            Ok(None) => {
                health.set(FAULT, Severity::Misconfigured, None);
                if wait == PATIENCE {
                    tracing::warn!(
                        node = name,
                        "no Node has this name or one of this node's addresses: endpoints on this node count as remote until the kubelet registers the Node; if the Node has another name, give --hostname-override"
                    );
                }
            }
            Err(error) => tracing::debug!(%error, "cannot list Nodes"),
        }
        wait = (wait * 2).clamp(AGAIN, LONGEST);
    }
}

fn wrong(name: &str, other: &str) -> String {
    format!(
        "no Node is called {name:?}; this node's addresses are those of Node {other:?}: endpoints \
         on this node count as remote; give --hostname-override {other} (or NODE_NAME)"
    )
}

/// The name of the Node that has one of these addresses.
async fn named(connection: &Connection, addresses: &[IpAddr]) -> Result<Option<String>, String> {
    let found = find_node(connection, |node| has_address(node, addresses)).await?;
    Ok(found.and_then(|node| node.metadata.name))
}

fn has_address(node: &Node, addresses: &[IpAddr]) -> bool {
    let reported = node.status.as_ref().and_then(|status| status.addresses.as_deref());
    let ips =
        reported.unwrap_or_default().iter().filter_map(|address| address.address.parse().ok());
    let mut ips = ips.filter(|ip: &IpAddr| !ip.is_loopback() && !ip.is_unspecified());
    ips.any(|ip| addresses.contains(&ip))
}
