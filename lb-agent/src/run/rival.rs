//! Tells when kube-proxy's rules are on the node while the agent runs.
//!
//! The programs see packets before the rules do, so both together still work. But nobody updates
//! rules that are left over, and node processes follow them to endpoints that are gone.

use std::time::Duration;

use super::agent::Agent;
use crate::{
    events::Refusals,
    takeover::{Sign, signs},
};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(10);

const CLEANUP: &str = "stop kube-proxy if it runs, then run `lb-agent cleanup --kube-proxy` on the \
                       node: its rules send node processes to endpoints that may be gone";

/// Starts to look.
pub(super) fn start(agent: &Agent, refusals: &Refusals) {
    let (metrics, refusals, cancel) =
        (agent.metrics.clone(), refusals.clone(), agent.cancel.clone());
    let node = agent.config.node_name.clone();
    agent.tasks.spawn(async move {
        let mut ticks = tokio::time::interval(INTERVAL);
        let mut before = None;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = cancel.cancelled() => return,
            }
            let found = match signs() {
                Ok(found) => found,
                Err(error) => {
                    tracing::debug!(%error, "cannot check for kube-proxy's rules: lb_kube_proxy_rules keeps its value");
                    continue;
                }
            };
            let now = !found.is_empty();
            metrics.set_kube_proxy_rules(now);
            match before.replace(now) {
                None if now => log("kube-proxy's rules are on this node", &found),
                Some(false) if now => {
                    log("kube-proxy is back: its rules are on this node again", &found);
                    let note = format!("kube-proxy's rules are back: {CLEANUP}");
                    refusals.kube_proxy_is_back(&node, note);
                }
                Some(true) if !now => tracing::info!("kube-proxy's rules are gone"),
                _ => {}
            }
        }
    });
}

fn log(what: &str, found: &[Sign]) {
    let found: Vec<String> = found.iter().map(ToString::to_string).collect();
    tracing::warn!(found = found.join(", "), "{what}: {CLEANUP}");
}
