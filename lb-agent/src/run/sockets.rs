//! Attaches the connect-time hooks, and checks every few seconds that they are still attached.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use super::agent::Agent;
use crate::{
    config::Config,
    health::Health,
    maps::bpffs,
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
/// packet by packet.
///
/// # Errors
/// [`AttachError`] if they cannot be attached.
pub(super) fn start(agent: &Agent, programs: &Arc<Programs>) -> Result<(), AttachError> {
    let Some(hooks) = attach(agent, programs)? else { return Ok(()) };
    let Agent { health, cancel, .. } = agent;
    let following = follow(hooks, Arc::clone(programs), health.clone(), cancel.clone());
    agent.tasks.spawn(following);
    Ok(())
}

/// Attaches the hooks, or replaces the programs there; `None` if they are off.
///
/// # Errors
/// [`AttachError`] if they cannot be attached.
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
        return cgroup::detach(pins).map(|()| None);
    };
    let hooks = Hooks::attach(pins, programs, &directory, mode)?;
    tracing::info!(cgroup = %directory.display(), mode = ?mode, "connect-time hooks attached");
    Ok(Some(hooks))
}

/// The cgroup of the hooks; `None` if no cgroup2 is mounted.
pub(super) fn directory(config: &Config) -> Option<PathBuf> {
    config.cgroup.clone().or_else(bpffs::cgroup2_mount)
}

/// Attaches hooks again that another program has detached. The proxy is unhealthy while that
/// fails.
async fn follow(
    mut hooks: Hooks,
    programs: Arc<Programs>,
    health: Health,
    cancel: CancellationToken,
) {
    let mut ticks = tokio::time::interval(INTERVAL);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = cancel.cancelled() => return,
        }
        if hooks.are_attached(&programs) {
            health.set_fault(FAULT, None);
            continue;
        }
        match hooks.repair(&programs) {
            Ok(()) => {
                tracing::warn!(
                    "connect-time hooks were detached by another program, and are attached again"
                );
                health.set_fault(FAULT, None);
            }
            Err(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                health.set_fault(FAULT, Some(format!("{error}: {}", source.unwrap_or_default())));
            }
        }
    }
}
