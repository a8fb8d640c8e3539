//! Removes the taint that keeps pods off this node until Services work on it
//! (`--startup-taint`).
//!
//! Invariant: no other taint changes. Each patch tests that the taint is still where it was
//! seen, so one that comes too late is refused and made again.

use std::time::Duration;

use axum::http::Request;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use serde_json::{Value, json};
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;

use super::own_node::OwnNode;

/// How soon a patch that failed is made again, at first and at most.
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// Removes the taint `key`, whatever its effect, once `programmed` is cancelled, and again if it
/// comes back. Runs until the agent ends.
pub(super) async fn remove(
    client: Client,
    name: String,
    key: String,
    programmed: CancellationToken,
    mut node: watch::Receiver<OwnNode>,
) {
    programmed.cancelled().await;
    let mut retry = FIRST_RETRY;
    loop {
        let operations = match &*node.borrow_and_update() {
            OwnNode::Present(node) => operations(node, &key),
            OwnNode::Unknown | OwnNode::Absent => Vec::new(),
        };
        if operations.is_empty() {
            if node.changed().await.is_err() {
                return;
            }
            continue;
        }
        match patch(&client, &name, &operations).await {
            Ok(()) => {
                tracing::info!(taint = key, "Services work on this node: startup taint removed");
                retry = FIRST_RETRY;
                // The Node without it is still to come.
                if node.changed().await.is_err() {
                    return;
                }
            }
            Err(error) => {
                log_failure(&key, &error, retry);
                // A change of the Node is a reason to try again at once.
                if matches!(timeout(retry, node.changed()).await, Ok(Err(_))) {
                    return;
                }
                retry = (retry * 2).min(LAST_RETRY);
            }
        }
    }
}

fn log_failure(key: &str, error: &kube::Error, retry_in: Duration) {
    let remedy = match error {
        kube::Error::Api(status) if status.code == 403 => {
            "allow patch of nodes: manifests/components/startup-taint"
        }
        _ => "",
    };
    tracing::warn!(taint = key, %error, remedy, ?retry_in, "cannot remove the startup taint: pods without a toleration stay off this node");
}

/// The JSON patch that removes every taint of a key: from the last to the first, so that those
/// before keep their places.
fn operations(node: &Node, key: &str) -> Vec<Value> {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let own = taints.iter().enumerate().rev().filter(|(_, taint)| taint.key == key);
    let operations = own.flat_map(|(place, _)| {
        let path = format!("/spec/taints/{place}");
        [
            json!({"op": "test", "path": format!("{path}/key"), "value": key}),
            json!({"op": "remove", "path": path}),
        ]
    });
    operations.collect()
}

async fn patch(client: &Client, name: &str, operations: &[Value]) -> Result<(), kube::Error> {
    let request = Request::patch(format!("/api/v1/nodes/{name}?fieldManager=lb-agent"))
        .header("Content-Type", "application/json-patch+json")
        .header("Accept", "application/json")
        .body(serde_json::to_vec(operations).map_err(kube::Error::SerdeError)?)
        .map_err(kube::Error::HttpError)?;
    client.request::<Value>(request).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_taints_of_the_key_are_removed_whatever_their_effect() {
        let node = json!({"metadata": {"name": "a"}, "spec": {"taints": [
            {"key": "lb-agent/not-ready", "effect": "NoSchedule"},
            {"key": "other", "effect": "NoExecute"},
            {"key": "lb-agent/not-ready", "effect": "NoExecute", "value": "x"},
        ]}});
        let node: Node = serde_json::from_value(node).unwrap();
        let test = |place: usize| {
            json!({"op": "test", "path": format!("/spec/taints/{place}/key"),
                   "value": "lb-agent/not-ready"})
        };
        let remove =
            |place: usize| json!({"op": "remove", "path": format!("/spec/taints/{place}")});
        let expected = [test(2), remove(2), test(0), remove(0)];
        assert_eq!(operations(&node, "lb-agent/not-ready"), expected);
        assert!(operations(&node, "lb-agent").is_empty());
        assert!(operations(&Node::default(), "other").is_empty());
    }
}
