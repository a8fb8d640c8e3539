//! The node of a group: a network namespace with an external device, a pods' device, and the
//! agent, which serves the group's objects there as it would on any node.
//!
//! Packets that leave by the devices are discarded: a first packet has no answer, and nothing
//! leaves the namespace.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context, Result, bail};
use aya::programs::{ProgramInfo, SchedClassifier, Xdp, loaded_programs};
use aya_obj::programs::XdpAttachType;
use lb_agent::cli::{self, Command};
use lb_agent::config::Config;
use lb_agent::logs::LastLines;
use lb_agent::maps::pins::Pins;
use nix::net::if_::if_nametoindex;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::format::{DetectLocal, Group, List};
use super::view::View;
use crate::harness::netns::actors::agent::http_get;
use crate::harness::netns::actors::exec::{ip_batch, sysctl};

/// The device that faces the outside.
pub(super) const EXTERNAL: &str = "ext0";
/// The node's end of its pods' interfaces.
pub(super) const PODS: &str = "pod0";
/// How long the agent may take to put the objects into the maps.
const READY: Duration = Duration::from_secs(60);
const HEALTH_PORT: u16 = 10256;

/// A node that serves the objects of a group, in the namespace of the calling thread.
pub(super) struct World {
    pub(super) hooks: Hooks,
    pub(super) pins: Pins,
}

/// The attached programs that handle packets of pods and of clients outside.
pub(super) struct Hooks {
    pub(super) from_pod: SchedClassifier,
    pub(super) to_pod: SchedClassifier,
    pub(super) from_device: SchedClassifier,
    pub(super) to_device: SchedClassifier,
    pub(super) xdp: Xdp,
    /// The indices of the two devices.
    pub(super) pods: u32,
    pub(super) external: u32,
}

/// The agent's directories, removed on drop.
struct Place {
    bpf_dir: PathBuf,
    manifests: tempfile::TempDir,
}

impl Place {
    /// The objects. The agent watches the directory above too, so nothing else may change there.
    fn objects(&self) -> PathBuf {
        self.manifests.path().join("objects")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.bpf_dir).ok();
    }
}

/// Runs `work` beside an agent that serves the objects of a group, in the (empty) namespace of
/// the calling thread. `name` must be unique; `cgroup` is the cgroup of this process.
pub(super) fn with<T>(
    group: &Group,
    name: &str,
    cgroup: &Path,
    work: impl FnOnce(&World) -> Result<T>,
) -> Result<T> {
    devices(group)?;
    let place = Place {
        bpf_dir: Path::new(crate::harness::netns::topology::stale::BPF_FS).join(name),
        manifests: tempfile::tempdir().context("cannot make a directory for manifests")?,
    };
    fs::create_dir(place.objects())?;
    write_manifests(group, &place.objects())?;
    let config = config(group, &place, cgroup)?;
    let stop = Arc::new(Notify::new());
    thread::scope(|scope| {
        let agent = {
            let stop = Arc::clone(&stop);
            scope.spawn(move || run_agent(config, &stop))
        };
        let is_over = || agent.is_finished();
        let result = wait_ready(is_over).and_then(|()| {
            let pins = Pins::new(&place.bpf_dir);
            work(&World { hooks: Hooks::attached(&pins)?, pins })
        });
        stop.notify_one();
        match agent.join() {
            Ok(Ok(())) => result,
            Ok(Err(error)) => Err(error).context("the agent ended"),
            Err(panicked) => std::panic::resume_unwind(panicked),
        }
    })
}

fn run_agent(config: Config, stop: &Notify) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    runtime.block_on(async {
        tokio::select! {
            result = lb_agent::run::run(config, LastLines::default()) => result,
            () = stop.notified() => Ok(()),
        }
    })
}

fn wait_ready(is_over: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + READY;
    let mut last = String::new();
    while Instant::now() < deadline && !is_over() {
        match http_get(HEALTH_PORT, "/healthz") {
            Ok((200, _)) => return Ok(()),
            Ok((status, body)) => last = format!("{status} {body}"),
            Err(error) => last = format!("{error:#}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
    bail!("the agent did not become healthy: {last}")
}

/// The addresses and routes of the node. Pods are behind one device, all else behind the other.
fn devices(group: &Group) -> Result<()> {
    const GATEWAYS: [&str; 2] = ["198.18.0.1", "fe80::1"];
    const MAC: &str = "02:00:00:00:03:01";
    for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        sysctl(key, "1")?;
    }
    let mut lines = vec!["link set lo up".to_owned()];
    for device in [EXTERNAL, PODS] {
        // Frames are for this host.
        let own = "02:00:00:00:00:01";
        lines.push(format!("link add {device} address {own} type veth peer name {device}p"));
        lines.push(format!("link set {device} up"));
    }
    for ip in &group.node.local_ips {
        lines.push(match ip {
            IpAddr::V4(ip) => format!("addr add {ip}/32 dev {EXTERNAL}"),
            IpAddr::V6(ip) => format!("addr add {ip}/128 dev {EXTERNAL} nodad"),
        });
    }
    for gateway in GATEWAYS {
        lines.push(format!("neigh replace {gateway} lladdr {MAC} nud permanent dev {EXTERNAL}"));
        lines.push(format!("route replace default via {gateway} dev {EXTERNAL} onlink"));
    }
    let view = View::new(group);
    for ip in view.here().filter(|ip| !view.is_of_node(*ip)) {
        lines.push(format!("neigh replace {ip} lladdr {MAC} nud permanent dev {PODS}"));
        lines.push(format!("route replace {ip} dev {PODS}"));
    }
    ip_batch(&lines)?;
    // The other end discards everything: IPv4 drops packets with a source of the own host.
    for device in [EXTERNAL, PODS] {
        sysctl(&format!("ipv6/conf/{device}p/disable_ipv6"), "1")?;
        ip_batch(&[format!("link set {device}p up")])?;
    }
    Ok(())
}

/// The objects of the group, its Node and its ServiceCIDRs, each in a file.
fn write_manifests(group: &Group, directory: &Path) -> Result<()> {
    let node = &group.node;
    let view = View::new(group);
    let mut named = vec![node.primary_ip];
    let other = node.local_ips.iter().copied();
    let other = other.filter(|ip| ip.is_ipv4() != node.primary_ip.is_ipv4());
    named.extend(other.take(1).filter(|ip| view.primary(*ip) == Some(*ip)));
    let addresses: Vec<Value> =
        named.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    let pods = words(&node.pod_cidr);
    let mut objects = vec![json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name, "labels": node.topology_labels},
        "spec": {"podCIDR": pods.first(), "podCIDRs": pods},
        "status": {"addresses": addresses},
    })];
    if !node.service_cidrs.0.is_empty() {
        objects.push(json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": words(&node.service_cidrs)},
        }));
    }
    for service in &group.services {
        objects.push(serde_json::to_value(service)?);
    }
    for slice in &group.endpoint_slices {
        objects.push(serde_json::to_value(slice)?);
    }
    for (number, object) in objects.iter().enumerate() {
        fs::write(directory.join(format!("{number}.json")), serde_json::to_vec(object)?)?;
    }
    Ok(())
}

/// The agent's configuration, from flags that express the group's node.
fn config(group: &Group, place: &Place, cgroup: &Path) -> Result<Config> {
    let node = &group.node;
    let mut flags = vec!["lb-agent".to_owned(), "run".to_owned()];
    let mut flag = |name: &str, value: &str| flags.push(format!("--{name}={value}"));
    flag("hostname-override", &node.name);
    flag("manifests", &place.objects().to_string_lossy());
    flag("bpf-dir", &place.bpf_dir.to_string_lossy());
    flag("cgroup", &cgroup.to_string_lossy());
    flag("devices", EXTERNAL);
    flag("pod-interfaces", PODS);
    flag("xdp", "generic");
    flag("healthz-bind-address", &format!("127.0.0.1:{HEALTH_PORT}"));
    flag("metrics-bind-address", "");
    flag("nodeport-addresses", &joined(&node.node_port_addresses).unwrap_or("primary".into()));
    flag("masquerade-all", &node.masquerade_all.unwrap_or(false).to_string());
    match &node.detect_local {
        DetectLocal::Nohow => {}
        DetectLocal::Prefix(prefix) => {
            let other = node.pod_cidr.0.iter();
            let other = other.filter(|own| own.addr().is_ipv4() != prefix.addr().is_ipv4());
            let all = List([prefix].into_iter().chain(other).copied().collect());
            flag("cluster-cidr", &joined(&all).unwrap_or_default());
        }
        DetectLocal::Interface => {
            flag("detect-local-mode", "InterfaceNamePrefix");
            flag("pod-interface-name-prefix", PODS);
        }
    }
    let localhost = node.localhost_node_ports.unwrap_or(true);
    flag("iptables-localhost-nodeports", &localhost.to_string());
    for (name, entries) in
        [("services", 1024), ("backends", 4096), ("slots", 32_768), ("flows", 16_384)]
    {
        flag(&format!("max-{name}"), &entries.to_string());
    }
    let Command::Run(run) = cli::parse(flags)?.command else { bail!("`run` is another command") };
    Ok(Config::load(*run)?)
}

fn words<T: ToString>(list: &List<T>) -> Vec<String> {
    list.0.iter().map(T::to_string).collect()
}

fn joined<T: ToString>(list: &List<T>) -> Option<String> {
    (!list.0.is_empty()).then(|| words(list).join(","))
}

impl Hooks {
    fn attached(pins: &Pins) -> Result<Self> {
        let index = |device: &str| if_nametoindex(device).with_context(|| device.to_owned());
        let (pods, external) = (index(PODS)?, index(EXTERNAL)?);
        let classifier = |index: u32, device: &str, site: &str| {
            let info = attached(pins, &format!("{index}-{device}-{site}"))?;
            Ok::<_, anyhow::Error>(SchedClassifier::from_program_info(
                info,
                site.to_owned().into(),
            )?)
        };
        let xdp = attached(pins, &format!("{external}-{EXTERNAL}-xdp_generic"))?;
        Ok(Self {
            from_pod: classifier(pods, PODS, "ingress")?,
            to_pod: classifier(pods, PODS, "egress")?,
            from_device: classifier(external, EXTERNAL, "ingress")?,
            to_device: classifier(external, EXTERNAL, "egress")?,
            xdp: Xdp::from_program_info(xdp, "xdp".into(), XdpAttachType::Interface)?,
            pods,
            external,
        })
    }
}

/// The program behind a pinned link.
fn attached(pins: &Pins, link: &str) -> Result<ProgramInfo> {
    let path = pins.links().join(link);
    let opened = lb_sys::obj_get(&path).with_context(|| format!("no link {}", path.display()))?;
    let id = lb_sys::link_info(opened.as_fd())?.program;
    let mut all = loaded_programs().filter_map(Result::ok);
    all.find(|program| program.id() == id).with_context(|| format!("no program behind {link}"))
}
