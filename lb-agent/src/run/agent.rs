//! What the parts of a running agent share.

use std::time::Duration;

use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::report::{self, Reporter};
use crate::{config::Config, health::Health, logs::LastLines, maps::pins::Pins, metrics::Metrics};

/// How long the agent waits for its tasks when it exits.
const SHUTDOWN: Duration = Duration::from_secs(2);

/// A running agent: its configuration, what it reports to, and its tasks.
#[derive(Debug)]
pub(super) struct Agent {
    pub(super) config: Config,
    pub(super) pins: Pins,
    pub(super) health: Health,
    pub(super) metrics: Metrics,
    pub(super) reporter: Reporter,
    /// Tasks that end once `cancel` is cancelled.
    pub(super) tasks: TaskTracker,
    pub(super) cancel: CancellationToken,
}

impl Agent {
    /// An agent without tasks.
    pub(super) fn new(config: Config, last_lines: LastLines) -> Self {
        let metrics = Metrics::new();
        let health = Health::new(2 * config.kube_proxy.sync_period()).with_gauge(metrics.faults());
        let pins = Pins::new(&config.bpf_dir);
        Self {
            reporter: Reporter::new(&config, pins.kept(), &health, &metrics, last_lines),
            pins,
            health,
            metrics,
            tasks: TaskTracker::new(),
            cancel: CancellationToken::new(),
            config,
        }
    }

    /// Starts to answer the commands that ask the agent of its directory, which may be another one
    /// than before at the same path; until the token is cancelled.
    pub(super) fn answer_commands(&self) -> CancellationToken {
        report::start(&self.config.bpf_dir, &self.reporter, &self.tasks, &self.cancel)
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
