//! Attaches the connect-time hooks, and checks every few seconds that they are still attached.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use super::agent::Agent;
use crate::{
    config::Config,
    health::{Health, Severity},
    maps::bpffs,
    metrics::Metrics,
    options::modes::SocketLb,
    programs::{
        cgroup::{self, Hooks},
        load::Programs,
        tc::AttachError,
    },
};

/// How often the hooks are checked.
const INTERVAL: Duration = Duration::from_secs(2);
/// The name of their fault in [`Health`].
const FAULT: &str = "connect-time hooks";

/// Attaches the hooks. Without a cgroup2 mount they are off, and all connections are translated
/// packet by packet; so are those of a hook that cannot be attached.
///
/// # Errors
/// [`AttachError::NoCgroup`].
pub(super) fn start(agent: &Agent, programs: &Arc<Programs>) -> Result<(), AttachError> {
    let Some(hooks) = attach(agent, programs)? else { return Ok(()) };
    let Agent { health, metrics, cancel, .. } = agent;
    let (health, metrics) = (health.clone(), metrics.clone());
    let following = follow(hooks, Arc::clone(programs), health, metrics, cancel.clone());
    agent.tasks.spawn(following);
    Ok(())
}

/// Attaches the hooks, or replaces the programs there; `None` if they are off.
///
/// # Errors
/// [`AttachError::NoCgroup`].
pub(super) fn attach(
    agent: &Agent,
    programs: &Arc<Programs>,
) -> Result<Option<Hooks>, AttachError> {
    let Agent { config, pins, .. } = agent;
    let mode = config.socket_lb;
    let Some(directory) = directory(config) else {
        if mode != SocketLb::Off {
            tracing::warn!(
                "no cgroup2 is mounted: connections are translated packet by packet; mount \
                 cgroup2 or give --cgroup, and restart the agent"
            );
        }
        if let Err(error) = cgroup::detach(pins) {
            let error = sentence(&error);
            tracing::error!(
                error,
                "connect-time hooks of an earlier agent stay attached: run `lb-agent cleanup` to detach them"
            );
        }
        return Ok(None);
    };
    if !bpffs::is_cgroup2(&directory) {
        return Err(AttachError::NoCgroup(directory));
    }
    let (hooks, attached) = Hooks::attach(pins, programs, &directory, mode);
    match attached {
        Ok(()) => {
            tracing::info!(cgroup = %directory.display(), mode = ?mode, "connect-time hooks attached");
        }
        Err(error) => {
            let error = sentence(&error);
            tracing::error!(cgroup = %directory.display(), error, "not all connect-time hooks are attached: these connections are translated packet by packet; retrying");
        }
    }
    Ok(Some(hooks))
}

/// The error and its cause.
fn sentence(error: &AttachError) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string);
    format!("{error}: {}", source.unwrap_or_default())
}

/// The cgroup of the hooks; `None` if no cgroup2 is mounted.
pub(super) fn directory(config: &Config) -> Option<PathBuf> {
    config.cgroup.clone().or_else(bpffs::cgroup2_mount)
}

/// Attaches hooks again that another program has detached, and those that could not be attached.
/// The proxy is unhealthy while hooks that were attached are not.
async fn follow(
    mut hooks: Hooks,
    programs: Arc<Programs>,
    health: Health,
    metrics: Metrics,
    cancel: CancellationToken,
) {
    let mut ticks = tokio::time::interval(INTERVAL);
    let mut severity = Severity::Degraded;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = cancel.cancelled() => return,
        }
        if hooks.are_attached(&programs) {
            severity = Severity::Unhealthy;
            health.set_fault(FAULT, None);
            continue;
        }
        match hooks.repair(&programs) {
            Ok(()) => {
                if severity == Severity::Unhealthy {
                    tracing::warn!(
                        "connect-time hooks were detached by another program, and are attached \
                         again"
                    );
                }
                severity = Severity::Unhealthy;
                health.set_fault(FAULT, None);
            }
            Err(error) => {
                metrics.attach_failed();
                health.set(FAULT, severity, Some(sentence(&error)));
            }
        }
    }
}
