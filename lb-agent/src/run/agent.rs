//! What the parts of a running agent share.

use std::time::Duration;

use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{config::Config, health::Health, maps::pins::Pins, metrics::Metrics};

/// How long the agent waits for its tasks when it exits.
const SHUTDOWN: Duration = Duration::from_secs(2);

/// A running agent: its configuration, what it reports to, and its tasks.
#[derive(Debug)]
pub(super) struct Agent {
    pub(super) config: Config,
    pub(super) pins: Pins,
    pub(super) health: Health,
    pub(super) metrics: Metrics,
    /// Tasks that end once `cancel` is cancelled.
    pub(super) tasks: TaskTracker,
    pub(super) cancel: CancellationToken,
}

impl Agent {
    /// An agent without tasks.
    pub(super) fn new(config: Config) -> Self {
        Self {
            pins: Pins::new(&config.bpf_dir),
            health: Health::new(2 * config.kube_proxy.sync_period()),
            metrics: Metrics::new(),
            tasks: TaskTracker::new(),
            cancel: CancellationToken::new(),
            config,
        }
    }

    /// Cancels the tasks and waits until they have ended.
    pub(super) async fn shut_down(&self) {
        self.cancel.cancel();
        self.tasks.close();
        if timeout(SHUTDOWN, self.tasks.wait()).await.is_err() {
            let tasks = self.tasks.len();
            tracing::warn!(after = ?SHUTDOWN, tasks, "shutdown timed out, tasks still running");
        }
    }
}
