//! The connect-time hooks, and a look every few seconds whether they are still attached.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::Config,
    health::Health,
    maps::{bpffs, pins::Pins},
    options::modes::SocketLb,
    programs::{
        cgroup::{self, Hooks},
        load::Programs,
        tc::AttachError,
    },
};

/// How often it is looked.
const INTERVAL: Duration = Duration::from_secs(2);
/// What a fault of theirs is called.
const FAULT: &str = "connect-time hooks";

/// Attaches the hooks; without a cgroup2 they are off and packets are balanced all the same.
///
/// # Errors
/// [`AttachError`] if they cannot be attached now.
pub(super) fn start(
    config: &Config,
    pins: &Pins,
    programs: &Arc<Programs>,
    health: &Health,
    tasks: &TaskTracker,
    cancel: &CancellationToken,
) -> Result<(), AttachError> {
    let mode = config.socket_lb;
    let Some(directory) = directory(config) else {
        if mode != SocketLb::Off {
            tracing::warn!(
                "no cgroup2 is mounted: connect-time hooks are off, packets are still balanced"
            );
        }
        return cgroup::detach(pins);
    };
    let hooks = Hooks::attach(pins, programs, &directory, mode)?;
    tracing::info!(cgroup = %directory.display(), mode = ?mode, "connect-time hooks attached");
    tasks.spawn(follow(hooks, Arc::clone(programs), health.clone(), cancel.clone()));
    Ok(())
}

/// The cgroup of the hooks; none where there is no cgroup2.
pub(super) fn directory(config: &Config) -> Option<PathBuf> {
    config.cgroup.clone().or_else(bpffs::cgroup2_mount)
}

/// Puts back what somebody takes off; what cannot be put back makes the proxy unhealthy.
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
            health.fault(FAULT, None);
            continue;
        }
        match hooks.repair(&programs) {
            Ok(()) => {
                tracing::warn!("connect-time hooks were taken off by somebody, and are back");
                health.fault(FAULT, None);
            }
            Err(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                health.fault(FAULT, Some(format!("{error}: {}", source.unwrap_or_default())));
            }
        }
    }
}
