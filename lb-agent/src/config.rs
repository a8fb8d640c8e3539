//! The configuration of `run`: the flags and kube-proxy's file, checked and completed.
//!
//! It reads only that file and the host name. Invariant: all other code reads this
//! configuration, never flags or the environment.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;
use lb_common::abi::settings::MAX_PREFIXES;
use lb_control::{
    model::IpFamily,
    options::{ExternalMode, Limits, NodePortAddresses},
};

use crate::{
    cli::RunArgs,
    kube_proxy::{
        self, KubeProxyConfiguration,
        values::{Bind, DetectLocalMode},
    },
    logs::Format,
    options::{
        modes::{SocketLb, TcAttach, XdpMode},
        sizes::Sizes,
        values::{BindAddress, Patterns},
    },
    watch::api,
};

const HOST_NAME: &str = "/proc/sys/kernel/hostname";

/// The configuration of `run`.
#[derive(Clone, Debug)]
pub struct Config {
    /// The source of the objects.
    pub source: Source,
    /// This node's name, as in its Node object and in EndpointSlices.
    pub node_name: String,
    /// The directory where maps, programs and links are pinned.
    pub bpf_dir: PathBuf,
    /// cgroup v2 directory of the connect-time hooks; `None` is the cgroup2 mount.
    pub cgroup: Option<PathBuf>,
    /// The processes whose connect() calls are translated; never [`SocketLb::Auto`].
    pub socket_lb: SocketLb,
    /// cgroups below that directory whose connect() calls are not translated.
    pub excluded_cgroups: Vec<PathBuf>,
    /// External interfaces.
    pub devices: Patterns,
    /// The host side of pod interfaces.
    pub pod_interfaces: Patterns,
    /// How tc programs are attached.
    pub tc_attach: TcAttach,
    /// Where packets of known flows are handled on external interfaces.
    pub xdp: XdpMode,
    /// How packets of external clients reach backends on other nodes, unless a Service
    /// overrides it.
    pub external_mode: ExternalMode,
    /// The addresses that serve NodePorts.
    pub node_port_addresses: NodePortAddresses,
    /// How pods are recognised by their addresses.
    pub pod_prefixes: PodPrefixes,
    /// Capacities of the maps.
    pub sizes: Sizes,
    /// What one Service may ask for.
    pub limits: Limits,
    /// Whether to wait for the agent that holds `bpf_dir`, and take over from it.
    pub wait: bool,
    /// The file that says that this agent is prepared.
    pub ready_file: Option<PathBuf>,
    /// How long the watch may be broken before the proxy is unhealthy; zero means forever.
    pub watch_timeout: Duration,
    /// The taint that is removed from this Node once Services are programmed.
    pub startup_taint: Option<String>,
    /// The address of /healthz.
    pub healthz: BindAddress,
    /// The address of /metrics.
    pub metrics: BindAddress,
    /// Whether the agent exits if an address cannot be bound.
    pub bind_hard_fail: bool,
    /// Whether all traffic to ClusterIPs is masqueraded.
    pub masquerade_all: bool,
    /// Whether NodePorts are served on loopback addresses.
    pub localhost_node_ports: bool,
    /// The primary address of this node, if it is not that of the Node object.
    pub bind_address: Option<IpAddr>,
    /// The part of the configuration that kube-proxy has too.
    pub kube_proxy: KubeProxyConfiguration,
    arguments: Box<RunArgs>,
}

/// The source of the objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An API server.
    Api(api::Options),
    /// Files below a directory.
    Manifests(PathBuf),
}

/// The prefixes that contain the addresses of pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodPrefixes {
    /// These (`--cluster-cidr`), at most [`MAX_PREFIXES`] per family; empty if not configured.
    Listed(Vec<IpNet>),
    /// The pod CIDRs of this Node object, which contain only this node's pods.
    OfNode,
    /// Unknown, because `--detect-local-mode` recognises pods by their interfaces, which other
    /// nodes' pods do not have here.
    Unknown,
}

/// Why the configuration is invalid.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// kube-proxy's part is invalid.
    #[error(transparent)]
    KubeProxy(#[from] kube_proxy::Error),
    /// The host name cannot be read.
    #[error("cannot read {HOST_NAME} for the name of this node: give --hostname-override NAME")]
    HostName(#[source] io::Error),
    /// The name cannot be that of a Node.
    #[error("node name {0:?} is empty or contains white space: correct --hostname-override")]
    NodeName(String),
    /// The programs' settings do not have room for so many prefixes.
    #[error(
        "--cluster-cidr has {count} separate IPv{family} prefixes, more than {MAX_PREFIXES}: \
         give fewer, larger ones"
    )]
    ClusterCidr {
        /// 4 or 6.
        family: u8,
        /// The number of prefixes.
        count: usize,
    },
}

impl Config {
    /// Reads the file of `--config`, and checks and completes the configuration that it and
    /// the flags of `run` make.
    ///
    /// # Errors
    /// If the file or a flag is invalid, or this node has no usable name.
    pub fn load(arguments: RunArgs) -> Result<Self, Error> {
        let kube_proxy = KubeProxyConfiguration::load(
            arguments.config.as_deref(),
            &arguments.kube_proxy,
            arguments.log.verbosity,
        )?;
        Self::new(arguments, kube_proxy)
    }

    /// Loads the configuration again, from the file's present content.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn reload(&self) -> Result<Self, Error> {
        Self::load((*self.arguments).clone())
    }

    /// The log verbosity, as in kube-proxy.
    pub fn verbosity(&self) -> u32 {
        self.kube_proxy.logging.verbosity
    }

    /// How the log is written.
    pub fn log_format(&self) -> Format {
        Format::of_name(&self.kube_proxy.logging.format).unwrap_or_default()
    }

    /// The file of `--config`.
    pub fn file(&self) -> Option<&Path> {
        self.arguments.config.as_deref()
    }

    fn new(arguments: RunArgs, kube_proxy: KubeProxyConfiguration) -> Result<Self, Error> {
        let name = match kube_proxy.hostname_override.as_str() {
            "" => fs::read_to_string(HOST_NAME).map_err(Error::HostName)?,
            name => name.to_owned(),
        };
        let kubeconfig = &kube_proxy.client_connection.kubeconfig;
        let source = match &arguments.manifests {
            Some(dir) => Source::Manifests(dir.clone()),
            None => Source::Api(api::Options {
                kubeconfig: (!kubeconfig.is_empty()).then(|| kubeconfig.into()),
                masters: masters(&arguments),
                state_dir: Some(arguments.state_dir.clone())
                    .filter(|directory| !directory.as_os_str().is_empty()),
                proxies: api::Proxies::from_environment(|name| std::env::var(name).ok()),
            }),
        };
        let Bind(healthz) = kube_proxy.healthz_bind_address;
        let Bind(metrics) = kube_proxy.metrics_bind_address;
        let node_port_addresses = kube_proxy.node_port_addresses.0.clone();
        let masquerade_all =
            kube_proxy.iptables.masquerade_all || kube_proxy.nftables.masquerade_all;
        Ok(Self {
            source,
            node_name: node_name(&name)?,
            bpf_dir: arguments.pins.bpf_dir.clone(),
            cgroup: arguments.cgroup.cgroup.clone(),
            socket_lb: socket_lb(
                arguments.socket_lb,
                masquerade_all,
                lb_sys::netns_cookie().is_ok(),
            ),
            excluded_cgroups: excluded_cgroups(&arguments),
            devices: arguments.devices.clone(),
            pod_interfaces: arguments.pod_interfaces.clone(),
            tc_attach: arguments.tc_attach,
            xdp: arguments.xdp,
            external_mode: arguments.external_mode,
            node_port_addresses: node_port_addresses.unwrap_or(NodePortAddresses::Primary),
            pod_prefixes: pod_prefixes(kube_proxy.detect_local_mode.0, &kube_proxy.cluster_cidr)?,
            sizes: arguments.sizes.into(),
            limits: arguments.limits.into(),
            wait: arguments.wait,
            ready_file: arguments.ready_file.clone(),
            watch_timeout: arguments.watch_timeout,
            startup_taint: arguments.startup_taint.clone().filter(|key| !key.is_empty()),
            healthz: BindAddress(healthz),
            metrics: BindAddress(metrics),
            bind_hard_fail: kube_proxy.bind_address_hard_fail,
            masquerade_all,
            localhost_node_ports: kube_proxy.iptables.localhost_node_ports != Some(false),
            bind_address: kube_proxy.bind_address.filter(|ip| !ip.is_unspecified()),
            kube_proxy,
            arguments: Box::new(arguments),
        })
    }
}

/// The mode that takes effect. A connection that is translated at connect() shows the backend
/// the pod's address, so with `masquerade_all` only packets of pods are translated. A kernel
/// without cookies of network namespaces (before 5.14) cannot distinguish node processes from pods.
fn socket_lb(mode: SocketLb, masquerade_all: bool, has_cookies: bool) -> SocketLb {
    match mode {
        SocketLb::Auto if has_cookies => SocketLb::Node,
        SocketLb::Auto => SocketLb::Off,
        SocketLb::Tcp | SocketLb::All if masquerade_all => SocketLb::Node,
        mode => mode,
    }
}

/// The URLs, without the empty one that clap makes of an empty list.
fn masters(arguments: &RunArgs) -> Vec<String> {
    let listed = arguments.master.iter().map(|master| master.trim());
    listed.filter(|master| !master.is_empty()).map(str::to_owned).collect()
}

/// The cgroups, without the empty path that clap makes of an empty list.
fn excluded_cgroups(arguments: &RunArgs) -> Vec<PathBuf> {
    let listed = arguments.socket_lb_exclude_cgroups.iter();
    listed.filter(|path| !path.as_os_str().is_empty()).cloned().collect()
}

fn pod_prefixes(mode: Option<DetectLocalMode>, listed: &[IpNet]) -> Result<PodPrefixes, Error> {
    match mode {
        Some(DetectLocalMode::NodeCidr) => return Ok(PodPrefixes::OfNode),
        Some(DetectLocalMode::BridgeInterface | DetectLocalMode::InterfaceNamePrefix) => {
            return Ok(PodPrefixes::Unknown);
        }
        Some(DetectLocalMode::ClusterCidr) | None => {}
    }
    let listed: Vec<IpNet> = listed.iter().map(IpNet::trunc).collect();
    let prefixes = IpNet::aggregate(&listed);
    for family in [IpFamily::V4, IpFamily::V6] {
        let of_family = prefixes.iter().filter(|prefix| IpFamily::of(prefix.addr()) == family);
        let count = of_family.count();
        if count > MAX_PREFIXES {
            return Err(Error::ClusterCidr { family: family.number(), count });
        }
    }
    Ok(PodPrefixes::Listed(prefixes))
}

/// The name of a Node as the kubelet derives it: trimmed, lower case.
fn node_name(name: &str) -> Result<String, Error> {
    let trimmed = name.trim();
    if trimmed.is_empty() || trimmed.contains(char::is_whitespace) {
        return Err(Error::NodeName(name.to_owned()));
    }
    Ok(trimmed.to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command, parse};

    fn config(arguments: &[&str]) -> Result<Config, Error> {
        let all = ["lb-agent", "run"].into_iter().chain(arguments.iter().copied());
        let Ok(Cli { command: Command::Run(run) }) = parse(all) else { panic!("bad arguments") };
        Config::load(*run)
    }

    #[test]
    fn a_node_has_the_name_that_the_kubelet_gives_it() {
        let named = |name: &str| config(&["--hostname-override", name]).map(|all| all.node_name);
        assert_eq!(named(" Node-A ").ok().as_deref(), Some("node-a"));
        assert!(matches!(named(" "), Err(Error::NodeName(_))));
        assert!(config(&[]).is_ok_and(|all| !all.node_name.is_empty()));
    }

    #[test]
    fn manifests_win_over_an_api_server() {
        let all = config(&["--manifests", "/m", "--kubeconfig", "/k"]);
        assert!(all.is_ok_and(|all| all.source == Source::Manifests("/m".into())));
        let all = config(&["--kubeconfig", "/k", "--socket-lb", "auto"]).expect("a configuration");
        assert!(matches!(all.source, Source::Api(api) if api.kubeconfig == Some("/k".into())));
        assert_eq!(all.socket_lb, SocketLb::Node);
    }

    #[test]
    fn only_node_processes_are_translated_at_connect_unless_it_is_asked_for() {
        for masquerade_all in [false, true] {
            assert_eq!(socket_lb(SocketLb::Auto, masquerade_all, true), SocketLb::Node);
            assert_eq!(socket_lb(SocketLb::Auto, masquerade_all, false), SocketLb::Off);
        }
    }

    #[test]
    fn masquerading_all_leaves_pods_to_their_packets() {
        let mode = |mode, all| {
            let flags = ["--socket-lb", mode, "--masquerade-all", all];
            config(&flags).map(|config| config.socket_lb).expect("a configuration")
        };
        for given in ["auto", "tcp", "all", "node"] {
            assert_eq!(mode(given, "true"), SocketLb::Node);
        }
        assert_eq!(mode("off", "true"), SocketLb::Off);
        assert_eq!((mode("tcp", "false"), mode("all", "false")), (SocketLb::Tcp, SocketLb::All));
    }

    #[test]
    fn what_kube_proxy_has_too_means_the_same() {
        let all = config(&[]).expect("a configuration");
        assert_eq!(all.node_port_addresses, NodePortAddresses::Primary);
        assert_eq!(all.healthz.0, "0.0.0.0:10256".parse().ok());
        assert_eq!(all.metrics.0, "127.0.0.1:10249".parse().ok());
        assert!(all.localhost_node_ports && !all.masquerade_all && !all.bind_hard_fail);
        assert_eq!((all.bind_address, all.verbosity()), (None, 0));
        let arguments = [
            "--nodeport-addresses=10.0.0.0/8,fd00::/8",
            "--healthz-bind-address=[::]",
            "--metrics-bind-address=",
            "--masquerade-all",
            "--iptables-localhost-nodeports=false",
            "--bind-address=192.0.2.1",
            "--bind-address-hard-fail",
            "-v",
        ];
        let all = config(&arguments).expect("a configuration");
        let ranges = ["10.0.0.0/8", "fd00::/8"].map(|text| text.parse().expect("a range"));
        assert_eq!(all.node_port_addresses, NodePortAddresses::Ranges(ranges.to_vec()));
        assert_eq!(all.healthz.0, "[::]:10256".parse().ok());
        assert_eq!(all.metrics.0, None);
        assert!(!all.localhost_node_ports && all.masquerade_all && all.bind_hard_fail);
        assert_eq!((all.bind_address, all.verbosity()), ("192.0.2.1".parse().ok(), 4));
    }

    #[track_caller]
    fn check_pods(arguments: &[&str], expected: PodPrefixes) {
        let found = config(arguments).map(|all| all.pod_prefixes);
        assert!(found.is_ok_and(|found| found == expected));
    }

    #[test]
    fn pods_are_recognised_by_the_prefixes_of_the_cluster_unless_another_mode_is_given() {
        let listed = |texts: &[&str]| {
            let nets = texts.iter().map(|text| text.parse().expect("a prefix"));
            PodPrefixes::Listed(nets.collect())
        };
        let cidr = ["--cluster-cidr", "10.1.2.3/16,10.0.0.0/16,fd00::/48"];
        let mode = |mode| [cidr[0], cidr[1], "--detect-local-mode", mode];
        check_pods(&[], listed(&[]));
        check_pods(&cidr, listed(&["10.0.0.0/15", "fd00::/48"]));
        check_pods(&mode("ClusterCIDR"), listed(&["10.0.0.0/15", "fd00::/48"]));
        check_pods(&mode("NodeCIDR"), PodPrefixes::OfNode);
        let named = |mode, flag| [&[flag][..], &["--detect-local-mode", mode]].concat();
        let bridge = named("BridgeInterface", "--pod-bridge-interface=cni0");
        check_pods(&bridge, PodPrefixes::Unknown);
        let prefix = named("InterfaceNamePrefix", "--pod-interface-name-prefix=cali");
        check_pods(&prefix, PodPrefixes::Unknown);
        let many: Vec<String> = (0..9).map(|n| format!("10.{}.0.0/16", n * 2)).collect();
        let error = config(&["--cluster-cidr", &many.join(",")]).map(drop);
        assert!(matches!(error, Err(Error::ClusterCidr { family: 4, count: 9 })));
    }
}
