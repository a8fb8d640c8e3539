//! Connects to the source of objects: an API server or a directory of manifests.

use std::{
    pin::{Pin, pin},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use lb_control::model::event::ObjectEvent;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::agent::Agent;
use crate::{
    config::Source,
    events::Refusals,
    health::{Health, Severity},
    watch::{
        api::{self, NodeScope, Nodes},
        manifests,
    },
};

/// Capacity of the queue of events for the reconciler.
const EVENTS: usize = 1024;
/// How often the age of a broken watch is checked.
const LIVENESS: Duration = Duration::from_secs(1);

/// A source of objects.
pub(super) struct Objects {
    /// The watch, which sends to `events` until this is dropped.
    pub(super) watch: Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>>,
    /// The changes of objects.
    pub(super) events: mpsc::Receiver<ObjectEvent>,
    /// Publishes what is refused to where the objects come from.
    pub(super) refusals: Refusals,
    /// The API server, if that is the source.
    pub(super) api: Option<api::Connection>,
}

/// Connects to the source of `agent`. Of an API server, only the Nodes that `nodes` asks for are
/// watched.
///
/// # Errors
/// If the API server's configuration is invalid.
pub(super) async fn connect(
    agent: &Agent,
    nodes: watch::Receiver<Option<Nodes>>,
) -> anyhow::Result<Objects> {
    let (sender, events) = mpsc::channel(EVENTS);
    match &agent.config.source {
        Source::Manifests(dir) => {
            let problems = manifests::Problems::default();
            agent.metrics.set_problems(problems.clone());
            agent.reporter.set_problems(&problems);
            let dir = dir.clone();
            let watch = async move { Ok(manifests::watch(dir, sender, problems).await?) };
            if agent.config.startup_taint.is_some() {
                tracing::warn!(
                    "--startup-taint has no effect with --manifests: there is no API server to change the Node at"
                );
            }
            let refusals = Refusals::logged();
            agent.metrics.set_refusals(&refusals);
            agent.reporter.set_refusals(&refusals);
            Ok(Objects { watch: spawned(watch), events, refusals, api: None })
        }
        Source::Api(options) => {
            let connection = api::connect(options).await?;
            let refusals = Refusals::published(connection.client.clone(), &agent.config.node_name);
            agent.metrics.set_refusals(&refusals);
            let liveness = connection.liveness().clone();
            agent.reporter.set_refusals(&refusals);
            agent.reporter.set_liveness(&liveness);
            agent.metrics.set_liveness(liveness.clone());
            let scope = NodeScope::new(&agent.config.node_name, nodes);
            let api = Some(connection.clone());
            let (limit, health) = (agent.config.watch_timeout, agent.health.clone());
            let watch = async move {
                tokio::select! {
                    () = api::watch(connection, scope, sender) => {}
                    () = follow_liveness(liveness, limit, health) => {}
                }
                Ok(())
            };
            Ok(Objects { watch: spawned(watch), events, refusals, api })
        }
    }
}

/// Runs the watch as a task of its own, until the future is dropped: objects are decoded while others
/// are planned, and the allocator keeps them, which are soon dropped, apart from what is kept.
fn spawned(
    watch: impl Future<Output = anyhow::Result<()>> + Send + 'static,
) -> Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>> {
    let watch = AbortOnDropHandle::new(tokio::spawn(watch));
    Box::pin(async { watch.await.context("the watch panicked")? })
}

/// Runs `work`, which ends with the events of `watch`, until the watch ends. The result is the
/// watch's, also where `work` is the first to see the end: only the watch knows the reason.
///
/// # Errors
/// Why the watch ended.
pub(super) async fn until_its_end(
    watch: impl Future<Output = anyhow::Result<()>>,
    work: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let mut watch = pin!(watch);
    let result = tokio::select! {
        result = &mut watch => result,
        () = work => watch.await,
    };
    result.context("the watch of objects failed")
}

/// Makes `/healthz` fail while a watch has been broken for longer than `limit`, if that is not 0. A
/// broken watch is shown by the log, `status` and `lb_watch_age_seconds` in any case; it takes no
/// node out of its load balancers, because an outage of the control plane breaks the watches of all
/// nodes at once.
async fn follow_liveness(liveness: api::Liveness, limit: Duration, health: Health) {
    let mut ticks = tokio::time::interval(LIVENESS);
    loop {
        ticks.tick().await;
        let dead = liveness.dead(limit, Instant::now()).filter(|_| limit > Duration::ZERO);
        health.set("watch", Severity::NotReady, dead);
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn a_watch_that_fails_is_heard_though_its_events_end_first() {
        let (sender, mut events) = mpsc::channel::<ObjectEvent>(1);
        let (seen, is_seen) = oneshot::channel();
        let watch = async move {
            drop(sender);
            is_seen.await.expect("the work has seen the end");
            anyhow::bail!("no such directory")
        };
        let work = async move {
            assert!(events.recv().await.is_none());
            seen.send(()).expect("the watch waits");
        };
        let error = until_its_end(watch, work).await.expect_err("the reason");
        assert_eq!(format!("{error:#}"), "the watch of objects failed: no such directory");
    }
}
