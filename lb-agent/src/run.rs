//! `lb-agent run`: starts the parts of the agent and runs them until a signal.
//!
//! It takes over the datapath first, which keeps serving the state that an earlier agent left in
//! the maps, and only then connects to the source of objects. On exit everything stays in place.

mod agent;
mod config_watch;
mod ports;
pub mod process;
mod reconciler;
mod servers;
mod sockets;
mod source;
mod stats;

use std::{net::IpAddr, sync::Arc};

use anyhow::Context as _;
use lb_control::{desired::health_checks::Wanted, model::event::ObjectKind};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::{
    config::{Config, PodPrefixes},
    conntrack::sysctls,
    events::Refusals,
    health::listeners::Listeners,
    maps::{bpffs, kernel::KernelDataplane, lock::Lock},
    network::follow::{InterfaceOptions, Interfaces},
    programs::{
        cgroup, features,
        load::{self, Constants, Programs},
    },
};

use agent::Agent;
use reconciler::{Reconciler, Sinks};
use source::Objects;

/// The kinds that must be listed before anything is programmed, besides Services and their
/// endpoints. ServiceCIDRs are among them because packets to their addresses must not leave the
/// node; for an API server without ServiceCIDRs, the watch reports an empty list.
const EXPECTED: [ObjectKind; 2] = [ObjectKind::Node, ObjectKind::ServiceCidr];

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// If the agent cannot start; the error says what to do. A running agent only fails if it loses
/// its kernel sockets or its directory, or if its configuration file changes.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let stopped = stop_signal()?;
    bpffs::ensure(&config.bpf_dir)?;
    let _lock = Lock::take(&config.bpf_dir)?;
    let agent = Agent::new(config);
    let result = tokio::select! {
        result = serve(&agent) => result,
        () = stopped => {
            tracing::info!("stopping: the programs stay attached and serve the last state");
            Ok(())
        }
        error = reconfigured(&agent.config) => Err(error),
    };
    agent.shut_down().await;
    result
}

/// Returns when the configuration file has changed, which takes effect by a restart.
async fn reconfigured(config: &Config) -> anyhow::Error {
    let Some(file) = config.file() else { return std::future::pending().await };
    config_watch::changed(config, file).await;
    anyhow::anyhow!(
        "the configuration in {} has changed: exiting, a restart applies it",
        file.display()
    )
}

/// Starts all parts, each after those that it needs, and runs the reconciler.
async fn serve(agent: &Agent) -> anyhow::Result<()> {
    process::raise_file_limit();
    // First, because the lifetimes of flows are read from these sysctls.
    sysctls::apply(&agent.config.kube_proxy.conntrack);
    let ticks_per_second = lb_sys::ticks_per_second().context("cannot read the kernel's clock")?;

    let programs = Arc::new(load_programs(agent)?);
    let dataplane = KernelDataplane::open(&agent.pins)?;
    servers::start(agent).await?;
    sockets::start(agent, &programs)?;
    let (node_addresses, node_addresses_seen) = watch::channel(None::<Vec<IpAddr>>);
    let interfaces = open_interfaces(agent, &programs).await?;
    let network = interfaces.subscribe();

    let Objects { watch, events, refusals } = source::connect(agent).await?;
    stats::start(agent, ticks_per_second)?;
    let health_checks = start_health_checks(agent, &refusals);
    let programmed = ports::start(agent).await;
    let sinks = Sinks {
        health: agent.health.clone(),
        metrics: agent.metrics.clone(),
        refusals,
        node_addresses,
        health_checks,
        programmed,
    };
    let reconciler = Reconciler::new(&agent.config, EXPECTED, ticks_per_second, sinks);

    log_start(&agent.config, &programs);
    tokio::select! {
        result = watch => result.context("the watch of objects failed"),
        result = interfaces.run(node_addresses_seen) => {
            result.context("the watch of network interfaces failed")
        }
        () = reconciler.run(events, network, dataplane) => Ok(()),
    }
}

fn load_programs(agent: &Agent) -> anyhow::Result<Programs> {
    let config = &agent.config;
    let constants = Constants::new(config.socket_lb, features::features())?;
    let excluded = match sockets::directory(config) {
        Some(directory) => cgroup::excluded(&directory, &config.excluded_cgroups)?,
        None => Vec::new(),
    };
    Ok(load::load(&agent.pins, &config.sizes, constants.excluding(&excluded))?)
}

/// Starts to follow the network interfaces, which attaches the programs to them.
async fn open_interfaces(agent: &Agent, programs: &Arc<Programs>) -> anyhow::Result<Interfaces> {
    let options = InterfaceOptions {
        devices: agent.config.devices.clone(),
        pods: agent.config.pod_interfaces.clone(),
        attach: agent.config.tc_attach,
        xdp: agent.config.xdp,
    };
    let interfaces = Interfaces::open(&agent.pins, Arc::clone(programs), options, None).await;
    interfaces.context("cannot follow the network interfaces")
}

/// Starts the health check servers of Services. Returns the sender of the wanted ones.
fn start_health_checks(agent: &Agent, refusals: &Refusals) -> watch::Sender<Wanted> {
    let (health_checks, wanted) = watch::channel(Wanted::default());
    let Agent { config, health, .. } = agent;
    let listeners = Listeners::new(&config.node_name, wanted, health.clone(), refusals.clone());
    agent.tasks.spawn(listeners.run(agent.cancel.clone()));
    health_checks
}

fn log_start(config: &Config, programs: &Programs) {
    if config.pod_prefixes == PodPrefixes::Unknown {
        tracing::warn!(
            "this --detect-local-mode cannot recognise pods of other nodes: they are treated as \
             external clients; use ClusterCIDR with --cluster-cidr"
        );
    }
    tracing::info!(
        node = config.node_name,
        bpf_dir = %config.bpf_dir.display(),
        load = ?programs.elapsed,
        "running"
    );
}

/// A future that completes at SIGTERM or SIGINT. From this call on, neither ends the process.
///
/// # Errors
/// If the signals cannot be handled.
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
