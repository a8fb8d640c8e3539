//! Answers `lb-agent status` and `sysdump`.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::{Config, Source},
    events::Refusals,
    health::Health,
    logs::LastLines,
    maps::kept::Kept,
    metrics::{Metrics, format::Format},
    report::{self, BrokenWatch, Question, Report},
    watch::{api::Liveness, manifests::Problems},
};

/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The limit of a request's length.
const QUESTION: u64 = 64;

/// The state that the agent reports; clones share it.
#[derive(Clone, Debug)]
pub(super) struct Reporter(Arc<Sources>);

#[derive(Debug)]
struct Sources {
    start: Report,
    health: Health,
    metrics: Metrics,
    last_lines: LastLines,
    refusals: OnceLock<Refusals>,
    liveness: OnceLock<Liveness>,
    problems: OnceLock<Problems>,
    kept: Kept,
}

impl Reporter {
    /// The state of an agent with this configuration when it starts.
    pub(super) fn new(
        config: &Config,
        kept: &Kept,
        health: &Health,
        metrics: &Metrics,
        last_lines: LastLines,
    ) -> Self {
        let start = Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            process: std::process::id(),
            node: config.node_name.clone(),
            bpf_dir: config.bpf_dir.display().to_string(),
            started: Timestamp::now(),
            source: source(config),
            configuration: configuration(config),
            ..Report::default()
        };
        Self(Arc::new(Sources {
            start,
            health: health.clone(),
            metrics: metrics.clone(),
            last_lines,
            refusals: OnceLock::new(),
            liveness: OnceLock::new(),
            problems: OnceLock::new(),
            kept: kept.clone(),
        }))
    }

    /// Adds rejected objects to the report.
    pub(super) fn set_refusals(&self, refusals: &Refusals) {
        // `run` calls this once; a second call would have no effect.
        let _ = self.0.refusals.set(refusals.clone());
    }

    /// Adds broken watches to the report.
    pub(super) fn set_liveness(&self, liveness: &Liveness) {
        let _ = self.0.liveness.set(liveness.clone());
    }

    /// Adds invalid manifests to the report.
    pub(super) fn set_problems(&self, problems: &Problems) {
        let _ = self.0.problems.set(problems.clone());
    }

    fn report(&self) -> Report {
        let sources = &*self.0;
        let now = Timestamp::now();
        let health = sources.health.details(now);
        let broken = sources.liveness.get().map(|liveness| liveness.broken(Instant::now()));
        let broken = broken.into_iter().flatten().map(|(kind, since, error)| BrokenWatch {
            kind: kind.to_string(),
            seconds: since.as_secs(),
            error,
        });
        let mut refused = sources.refusals.get().map(Refusals::published_now).unwrap_or_default();
        refused.sort();
        let problems = sources.problems.get().map(Problems::list).unwrap_or_default();
        Report {
            programmed: health.last_updated.is_some(),
            healthy: health.healthy,
            last_updated: health.last_updated,
            waiting_since: health.waiting_since,
            faults: health.faults,
            missing_pins: sources.kept.lost().len(),
            broken_watches: broken.collect(),
            refused,
            source_ports: sources.metrics.source_ports(),
            invalid_manifests: problems.iter().map(ToString::to_string).collect(),
            ..sources.start.clone()
        }
    }

    fn answer(&self, question: Question) -> String {
        match question {
            Question::Report => {
                serde_json::to_string(&self.report()).expect("every key of a report is a text")
            }
            Question::Log => self.0.last_lines.text(),
            Question::Metrics => self.0.metrics.encode(Format::Plain).unwrap_or_default(),
        }
    }
}

/// Starts to answer the commands that ask the agent of this directory, until the token that is
/// returned is cancelled. Without the socket the agent works as well, and its commands say that
/// none runs.
pub(super) fn start(
    bpf_dir: &Path,
    reporter: &Reporter,
    tasks: &TaskTracker,
    cancel: &CancellationToken,
) -> CancellationToken {
    let cancel = cancel.child_token();
    match report::listen(bpf_dir) {
        Ok(listener) => answer(listener, reporter, tasks, cancel.clone()),
        Err(error) => tracing::warn!(
            %error,
            "cannot listen for `lb-agent status`: it will say that no agent runs; traffic is \
             not concerned"
        ),
    }
    cancel
}

/// Answers whoever asks at `listener` until `cancel` is cancelled.
pub(super) fn answer(
    listener: std::os::unix::net::UnixListener,
    reporter: &Reporter,
    tasks: &TaskTracker,
    cancel: CancellationToken,
) {
    let listener = match UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::warn!(%error, "cannot answer `lb-agent status`"),
    };
    let reporter = reporter.clone();
    tasks.spawn(async move {
        loop {
            let stream = tokio::select! {
                accepted = listener.accept() => accepted,
                () = cancel.cancelled() => return,
            };
            let Ok((stream, _)) = stream else { continue };
            match timeout(PATIENCE, serve(stream, &reporter)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "cannot answer a request of `lb-agent status` or `sysdump`"),
                Err(_) => tracing::debug!("a request of `lb-agent status` or `sysdump` timed out"),
            }
        }
    });
}

async fn serve(mut stream: UnixStream, reporter: &Reporter) -> io::Result<()> {
    if !report::is_trusted(stream.peer_cred()?.uid()) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let mut line = String::new();
    (&mut stream).take(QUESTION).read_to_string(&mut line).await?;
    if let Some(question) = Question::of_line(&line) {
        stream.write_all(reporter.answer(question).as_bytes()).await?;
    }
    stream.shutdown().await
}

fn source(config: &Config) -> String {
    match &config.source {
        Source::Manifests(directory) => directory.display().to_string(),
        Source::Api(options) => match (&options.masters[..], &options.kubeconfig) {
            ([_, ..], _) => report::redacted(&options.masters.join(", ")),
            ([], Some(file)) => format!("the API server of {}", file.display()),
            ([], None) => "the API server of the cluster that the agent runs in".to_owned(),
        },
    }
}

/// The configuration in force: kube-proxy's part in the form of its file, and lb's own part by the
/// names of the flags.
fn configuration(config: &Config) -> Value {
    let debug = |value: &dyn std::fmt::Debug| Value::from(format!("{value:?}"));
    let own = BTreeMap::from([
        ("bpf-dir", debug(&config.bpf_dir)),
        ("cgroup", debug(&config.cgroup)),
        ("devices", debug(&config.devices)),
        ("external-mode", debug(&config.external_mode)),
        ("healthz", debug(&config.healthz)),
        ("limits", debug(&config.limits)),
        ("max", debug(&config.sizes)),
        ("metrics", debug(&config.metrics)),
        ("node-name", debug(&config.node_name)),
        ("pod-interfaces", debug(&config.pod_interfaces)),
        ("pod-prefixes", debug(&config.pod_prefixes)),
        ("socket-lb", debug(&config.socket_lb)),
        ("socket-lb-exclude-cgroups", debug(&config.excluded_cgroups)),
        ("source", Value::from(source(config))),
        ("tc-attach", debug(&config.tc_attach)),
        ("watch-timeout", debug(&config.watch_timeout)),
        ("xdp", debug(&config.xdp)),
    ]);
    json!({
        "lb": own,
        "kube_proxy": serde_json::from_str::<Value>(&config.kube_proxy.to_configz())
            .unwrap_or_default(),
    })
}
