//! `lb-agent run`: starts the parts of the agent and runs them until a signal.
//!
//! It takes over the datapath first, which keeps serving the state that an earlier agent left in
//! the maps, and only then connects to the source of objects. On exit everything stays in place.

mod agent;
mod api_addresses;
mod claim;
mod config_watch;
mod node_name;
mod own_node;
mod pins;
mod ports;
pub mod prepare;
pub mod process;
mod provisional;
mod ready;
mod reconciler;
mod report;
mod rival;
mod servers;
mod sockets;
mod source;
mod startup_taint;
mod stats;

use std::{net::IpAddr, sync::Arc};

use anyhow::Context as _;
use lb_control::{
    desired::{health_checks::Wanted, taken::ApiServers},
    model::{event::ObjectKind, network::NodeNetwork},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Config, PodPrefixes},
    conntrack::sysctls,
    health::listeners::Listeners,
    logs::LastLines,
    maps::{
        bpffs, handover,
        kernel::KernelDataplane,
        lock::{Lock, LockError},
        memory::Memory,
        pins::{Pins, pinned_maps},
    },
    network::follow::{InterfaceOptions, Interfaces},
    privileges,
    programs::{
        cgroup, features,
        load::{self, Constants, Programs},
        prepare::{Prepared, prepare},
    },
    watch::api::Connection,
};

use agent::Agent;
use own_node::OwnNode;
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
pub async fn run(config: Config, last_lines: LastLines) -> anyhow::Result<()> {
    let stopped = stop_signal()?;
    privileges::require().context("cannot load eBPF programs")?;
    ready::remove(&config)?;
    bpffs::ensure(&config.bpf_dir)?;
    let lock = match Lock::take(&config.bpf_dir) {
        Err(held @ LockError::Held { .. }) if config.wait => {
            tracing::info!("{held}: preparing to take over from it (--wait); it serves until then");
            None
        }
        result => Some(result?),
    };
    let agent = Agent::new(config, last_lines);
    let result = tokio::select! {
        result = serve(&agent, lock) => result,
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

/// Starts all parts, each after those that it needs, and runs the reconciler. Without the lock it
/// prepares everything that leaves the maps alone, and waits for the lock.
async fn serve(agent: &Agent, lock: Option<Lock>) -> anyhow::Result<()> {
    process::raise_file_limit();
    // First, because the lifetimes of flows are read from these sysctls.
    sysctls::apply(&agent.config.kube_proxy.conntrack);
    let ticks_per_second = lb_sys::ticks_per_second().context("cannot read the kernel's clock")?;

    if lock.is_some() {
        complete_move(&agent.pins)?;
    }
    let prepared = prepare_programs(agent)?;
    let (node_addresses, node_addresses_seen) = watch::channel(None::<Vec<IpAddr>>);
    let mut prepared = Some(prepared);
    let mut held = None;
    if let Some(lock) = lock {
        // Before anything is asked of an API server, which may be reached by a Service.
        held = Some(take_over(agent, prepared.take(), None, lock).await?);
    }
    let (nodes, nodes_needed) = watch::channel(None);
    let Objects { mut watch, mut events, refusals, api } =
        source::connect(agent, nodes_needed).await?;
    let (health_checks, wanted) = watch::channel(Wanted::default());
    let programmed = CancellationToken::new();
    let (own_node, own_node_seen) = watch::channel(OwnNode::default());
    let sinks = Sinks {
        health: agent.health.clone(),
        metrics: agent.metrics.clone(),
        refusals: refusals.clone(),
        node_addresses,
        own_node,
        nodes,
        health_checks,
        programmed: programmed.clone(),
    };
    let mut reconciler = Reconciler::new(&agent.config, EXPECTED, ticks_per_second, sinks);
    let Held { interfaces, dataplane, directory } = match held {
        Some(held) => held,
        None => {
            let lock = tokio::select! {
                result = source::until_its_end(
                    &mut watch,
                    reconciler.prepare(&mut events, || report_prepared(&agent.config)),
                ) => return result,
                lock = Lock::wait(&agent.config.bpf_dir) => lock?,
            };
            let known = node_addresses_seen.borrow().clone();
            take_over(agent, prepared, known, lock).await?
        }
    };
    stats::start(agent, ticks_per_second)?;
    rival::start(agent, &refusals);
    let Agent { config, health, .. } = agent;
    let listeners = Listeners::new(&config.node_name, wanted, health.clone(), refusals);
    agent.tasks.spawn(listeners.run(agent.cancel.clone()));
    ports::start(agent, &programmed).await;
    let network = interfaces.subscribe();
    if let Some(api) = &api {
        follow_node(agent, api, &programmed, &network, &own_node_seen);
    }
    let api_servers = follow_api_addresses(agent, api.as_ref());
    let known = api.and_then(|api| api.learned().objects());
    report_programmed(agent, programmed);
    tokio::select! {
        result = pins::keep(agent, directory) => match result? {},
        result = source::until_its_end(
            watch,
            reconciler.run(events, network, api_servers, dataplane, known),
        ) => result,
        result = interfaces.run(node_addresses_seen) => {
            result.context("the watch of network interfaces failed")
        }
    }
}

/// The datapath in this agent's hands.
struct Held {
    interfaces: Interfaces,
    dataplane: KernelDataplane,
    directory: pins::Directory,
}

/// Completes a move of flows that another agent has begun. The caller holds the lock.
fn complete_move(pins: &Pins) -> anyhow::Result<()> {
    if handover::finish(pins)? {
        tracing::warn!(
            "an agent was killed while it moved flows into new maps; this agent has completed that"
        );
    }
    Ok(())
}

/// Takes over maps and hooks, and starts the servers, whose addresses the agent before had.
async fn take_over(
    agent: &Agent,
    prepared: Option<Prepared>,
    node_addresses: Option<Vec<IpAddr>>,
    lock: Lock,
) -> anyhow::Result<Held> {
    let Agent { pins, .. } = agent;
    if let Some(listener) = claim::claim().await? {
        report::answer(listener, &agent.reporter, &agent.tasks, agent.cancel.clone());
    }
    if pins.adopt_before()? {
        tracing::info!("adopted the maps and links of an earlier release unchanged");
    }
    complete_move(pins)?;
    let mut prepared = match prepared.filter(|prepared| prepared.is_current(pins)) {
        Some(prepared) => prepared,
        None => {
            tracing::warn!("the pinned maps were replaced while this agent waited: loading again");
            prepare_programs(agent)?
        }
    };
    prepared.take_maps(pins)?;
    let directory = pins::Directory::answer(agent, lock);
    load::pin_programs(pins, &mut prepared.programs)?;
    let dataplane = KernelDataplane::open(pins)?;
    servers::start(agent).await?;
    let interfaces = replace_programs(agent, prepared, node_addresses).await?;
    Ok(Held { interfaces, dataplane, directory })
}

/// Puts the programs in place of those of the agent before. If maps that programs write get another
/// layout or size, other programs serve while their entries are moved.
async fn replace_programs(
    agent: &Agent,
    mut prepared: Prepared,
    node_addresses: Option<Vec<IpAddr>>,
) -> anyhow::Result<Interfaces> {
    let Agent { pins, .. } = agent;
    let (handover, flows) = (prepared.handover.take(), prepared.flows.take());
    let interfaces = if let (Some(mut first), Some(flows)) = (handover, flows) {
        first.names = prepared.programs.names.clone();
        let first = Arc::new(first);
        sockets::attach(agent, &first)?;
        let mut interfaces = open_interfaces(agent, &first, node_addresses).await?;
        flows.move_all(pins)?;
        prepared.catch_up()?;
        let programs = Arc::new(prepared.programs);
        sockets::start(agent, &programs)?;
        interfaces.replace_programs(Arc::clone(&programs))?;
        tracing::info!("flows are in maps of the layout and size of this agent");
        log_start(&agent.config, &programs);
        interfaces
    } else {
        prepared.catch_up()?;
        let programs = Arc::new(prepared.programs);
        sockets::start(agent, &programs)?;
        let interfaces = open_interfaces(agent, &programs, node_addresses).await?;
        log_start(&agent.config, &programs);
        interfaces
    };
    Ok(interfaces)
}

fn report_prepared(config: &Config) {
    tracing::info!(
        "prepared: programs are loaded and objects are listed; taking over when the other \
         lb-agent ends"
    );
    ready::write(config, ready::PREPARED);
}

/// Says in the ready file when the first complete state is in the maps.
fn report_programmed(agent: &Agent, programmed: CancellationToken) {
    let (config, cancel) = (agent.config.clone(), agent.cancel.clone());
    agent.tasks.spawn(async move {
        tokio::select! {
            () = programmed.cancelled() => ready::write(&config, ready::PROGRAMMED),
            () = cancel.cancelled() => {}
        }
    });
}

fn prepare_programs(agent: &Agent) -> anyhow::Result<Prepared> {
    let config = &agent.config;
    let constants = Constants::new(config.socket_lb, features::features())?;
    let excluded = match sockets::directory(config) {
        Some(directory) => cgroup::excluded(&directory, &config.excluded_cgroups)?,
        None => Vec::new(),
    };
    Ok(prepare(&agent.pins, &config.sizes, constants.excluding(&excluded))?)
}

/// Starts the tasks that act on this node's Node object.
fn follow_node(
    agent: &Agent,
    api: &Connection,
    programmed: &CancellationToken,
    network: &watch::Receiver<NodeNetwork>,
    node: &watch::Receiver<OwnNode>,
) {
    let (connection, name) = (api.clone(), agent.config.node_name.clone());
    let (cancel, health) = (agent.cancel.clone(), agent.health.clone());
    let check = node_name::check(connection, name, network.clone(), node.clone(), health);
    agent.tasks.spawn(cancel.run_until_cancelled_owned(check));
    if let Some(key) = agent.config.startup_taint.clone() {
        let (client, name) = (api.client.clone(), agent.config.node_name.clone());
        let (programmed, cancel) = (programmed.clone(), agent.cancel.clone());
        let remove = startup_taint::remove(client, name, key, programmed, node.clone());
        agent.tasks.spawn(cancel.run_until_cancelled_owned(remove));
    }
}

/// The addresses of the API servers that are configured, as they change.
fn follow_api_addresses(agent: &Agent, api: Option<&Connection>) -> watch::Receiver<ApiServers> {
    let urls = api.map(Connection::configured).unwrap_or_default();
    let (servers, seen) = watch::channel(api_addresses::literal(&urls));
    let follow = api_addresses::follow(urls, servers);
    agent.tasks.spawn(agent.cancel.clone().run_until_cancelled_owned(follow));
    seen
}

/// Starts to follow the network interfaces, which attaches the programs to them.
async fn open_interfaces(
    agent: &Agent,
    programs: &Arc<Programs>,
    node_addresses: Option<Vec<IpAddr>>,
) -> anyhow::Result<Interfaces> {
    let options = InterfaceOptions {
        devices: agent.config.devices.clone(),
        pods: agent.config.pod_interfaces.clone(),
        attach: agent.config.tc_attach,
        xdp: agent.config.xdp,
        metrics: Some(agent.metrics.clone()),
    };
    Interfaces::open(&agent.pins, Arc::clone(programs), options, node_addresses)
        .await
        .context("cannot follow the network interfaces")
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
        map_memory = %Memory::of(&pinned_maps(&config.sizes)),
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
