//! `lb-agent run`: puts the parts together and keeps them going until a signal.
//!
//! The datapath is taken over first and serves on with what an earlier agent left in the
//! maps; only then is the source of objects asked. Ending leaves everything in place.

mod config_watch;
mod ports;
pub mod process;
mod reconciler;
mod servers;
mod sockets;
mod stats;

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use lb_control::{
    desired::health_checks::Wanted,
    model::event::{ObjectEvent, ObjectKind},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::{Config, PodPrefixes, Source},
    conntrack::sysctls,
    events::Refusals,
    health::{Health, listeners::Listeners},
    maps::{bpffs, kernel::KernelDataplane, lock::Lock, pins::Pins},
    metrics::Metrics,
    network::follow::{InterfaceOptions, Interfaces},
    programs::{
        cgroup, features,
        load::{self, Constants, Programs},
    },
    watch::{api, manifests},
};

use reconciler::{Reconciler, Sinks};

/// How many events may wait for the reconciler.
const EVENTS: usize = 1024;
/// How often it is looked how long the watch has been broken.
const LIVENESS: Duration = Duration::from_secs(1);
/// How long an ending agent waits for its servers and its sweep.
const END: Duration = Duration::from_secs(2);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps the agent from starting, as a sentence that says what to do. Once it runs,
/// only the loss of its kernel sockets or of its directory ends it.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let stopped = stop_signal()?;
    bpffs::ensure(&config.bpf_dir)?;
    let _lock = Lock::take(&config.bpf_dir)?;
    let cancel = CancellationToken::new();
    let tasks = TaskTracker::new();
    let result = tokio::select! {
        result = start(&config, &cancel, &tasks) => result,
        () = stopped => {
            tracing::info!("stopping; the datapath stays");
            Ok(())
        }
        error = reconfigured(&config) => Err(error),
    };
    cancel.cancel();
    tasks.close();
    if timeout(END, tasks.wait()).await.is_err() {
        tracing::warn!(after = ?END, "not everything has ended");
    }
    result
}

/// Ends when another configuration is to be used, which takes a start.
async fn reconfigured(config: &Config) -> anyhow::Error {
    let Some(file) = config.file() else { return std::future::pending().await };
    config_watch::changed(config, file).await;
    anyhow::anyhow!(
        "the configuration in {} has changed: ending, to be started again with it",
        file.display()
    )
}

async fn start(
    config: &Config,
    cancel: &CancellationToken,
    tasks: &TaskTracker,
) -> anyhow::Result<()> {
    process::raise_file_limit();
    // The lifetimes of flows are read from there.
    sysctls::apply(&config.kube_proxy.conntrack);
    let health = Health::new(2 * config.kube_proxy.sync_period());
    let metrics = Metrics::new();
    let pins = Pins::new(&config.bpf_dir);
    let programs = Arc::new(load_programs(config, &pins)?);
    let dataplane = KernelDataplane::open(&pins)?;
    if let Err(error) = servers::start(config, &health, &metrics, cancel, tasks).await {
        servers::tell(config, &error).await;
        return Err(error.into());
    }
    sockets::start(config, &pins, &programs, &health, tasks, cancel)?;
    let (node_addresses, node_addresses_seen) = watch::channel(None::<Vec<IpAddr>>);
    let interfaces =
        Interfaces::open(&pins, Arc::clone(&programs), interface_options(config), None)
            .await
            .context("cannot follow the network interfaces")?;
    let network = interfaces.subscribe();
    let (sender, events) = mpsc::channel(EVENTS);
    let (source, refusals) = start_source(config, &health, &metrics, sender).await?;
    let ticks_per_second = lb_sys::ticks_per_second().context("cannot read the kernel's clock")?;
    stats::start(&pins, ticks_per_second, &metrics, &health, tasks, cancel)?;
    let (health_checks, wanted) = watch::channel(Wanted::default());
    let listeners = Listeners::new(&config.node_name, wanted, health.clone(), refusals.clone());
    tasks.spawn(listeners.run(cancel.clone()));
    let programmed = CancellationToken::new();
    ports::start(&pins, programmed.clone(), tasks, cancel).await;
    let sinks = Sinks { health, metrics, refusals, node_addresses, health_checks, programmed };
    let reconciler = Reconciler::new(config, EXPECTED, ticks_per_second, sinks);
    if config.pod_prefixes == PodPrefixes::Unknown {
        tracing::warn!(
            "--detect-local-mode by interfaces says nothing of pods of other nodes: they are \
             served as clients outside the cluster; ClusterCIDR with --cluster-cidr tells them apart"
        );
    }
    tracing::info!(
        node = config.node_name,
        bpf_dir = %config.bpf_dir.display(),
        load = ?programs.elapsed,
        "running"
    );
    tokio::select! {
        result = source => result.context("the source of objects ended"),
        result = interfaces.run(node_addresses_seen) => {
            result.context("lost sight of the network interfaces")
        }
        () = reconciler.run(events, network, dataplane) => Ok(()),
    }
}

/// The kinds that must be listed before anything is programmed. ServiceCIDRs tell which
/// addresses must not leave the node, so they are waited for; a server that does not
/// serve them says so with an empty list.
const EXPECTED: [ObjectKind; 2] = [ObjectKind::Node, ObjectKind::ServiceCidr];

fn load_programs(config: &Config, pins: &Pins) -> anyhow::Result<Programs> {
    let constants = Constants::new(config.socket_lb, features::features())?;
    let excluded = match sockets::directory(config) {
        Some(directory) => cgroup::excluded(&directory, &config.excluded_cgroups)?,
        None => Vec::new(),
    };
    Ok(load::load(pins, &config.sizes, constants.excluding(&excluded))?)
}

fn interface_options(config: &Config) -> InterfaceOptions {
    InterfaceOptions {
        devices: config.devices.clone(),
        pods: config.pod_interfaces.clone(),
        attach: config.tc_attach,
        xdp: config.xdp,
    }
}

type SourceTask = std::pin::Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>>;

/// Makes the proxy unhealthy while a watch has been broken for longer than the limit.
async fn follow_liveness(liveness: api::Liveness, limit: Duration, health: Health) {
    let mut ticks = tokio::time::interval(LIVENESS);
    loop {
        ticks.tick().await;
        let is_limited = limit > Duration::ZERO;
        health.fault("watch", liveness.dead(limit, Instant::now()).filter(|_| is_limited));
    }
}

async fn start_source(
    config: &Config,
    health: &Health,
    metrics: &Metrics,
    sender: mpsc::Sender<ObjectEvent>,
) -> anyhow::Result<(SourceTask, Refusals)> {
    match &config.source {
        Source::Manifests(dir) => {
            let problems = manifests::Problems::default();
            metrics.set_problems(problems.clone());
            let dir = dir.clone();
            let task = async move { Ok(manifests::watch(dir, sender, problems).await?) };
            Ok((Box::pin(task), Refusals::logged()))
        }
        Source::Api(options) => {
            let connection = api::connect(options).await?;
            let refusals = Refusals::published(connection.client.clone(), &config.node_name);
            let liveness = connection.liveness().clone();
            let (limit, health) = (config.watch_timeout, health.clone());
            let task = async move {
                tokio::select! {
                    () = api::watch(connection, sender) => {}
                    () = follow_liveness(liveness, limit, health) => {}
                }
                Ok(())
            };
            Ok((Box::pin(task), refusals))
        }
    }
}

/// Ready with SIGTERM or SIGINT, neither of which ends the process any more.
///
/// # Errors
/// The signals cannot be handled.
pub fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
