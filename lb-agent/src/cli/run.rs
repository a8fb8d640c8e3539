//! The flags of `run`.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};
use ipnet::IpNet;

use super::{
    CgroupArgs, LogArgs, PinArgs,
    values::{BindAddress, NodePortAddresses, Patterns},
};

/// Flags of `run` whose feature does not exist yet: `run` says so once when one is given.
pub const WITHOUT_EFFECT: &[&str] = &["socket-lb-exclude-cgroups"];

/// Arguments of `run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// A kubeconfig file [default: in-cluster configuration]
    #[arg(long, env = "KUBECONFIG", value_name = "FILE", help_heading = "Source")]
    pub kubeconfig: Option<PathBuf>,
    /// URL of the API server, in place of the configured one; needed where in-cluster
    /// configuration names a ClusterIP that nobody serves yet
    #[arg(long, env = "LB_MASTER", value_name = "URL", help_heading = "Source")]
    pub master: Option<String>,
    /// Read the objects from files below a directory instead of an API server
    #[arg(long, env = "LB_MANIFESTS", value_name = "DIR", help_heading = "Source")]
    pub manifests: Option<PathBuf>,
    /// This node's name [default: the host name]
    #[arg(long, env = "NODE_NAME", value_name = "NAME", help_heading = "Source")]
    pub hostname_override: Option<String>,

    /// Pins.
    #[command(flatten)]
    pub pins: PinArgs,
    /// Cgroup.
    #[command(flatten)]
    pub cgroup: CgroupArgs,
    /// Whose connect() is translated
    #[arg(long, env = "LB_SOCKET_LB", value_name = "MODE", default_value = "auto")]
    pub socket_lb: SocketLb,
    /// cgroups, below --cgroup, whose processes are left to the packet path
    #[arg(long, env = "LB_SOCKET_LB_EXCLUDE_CGROUPS", value_name = "LIST", value_delimiter = ',')]
    pub socket_lb_exclude_cgroups: Vec<PathBuf>,
    /// Interfaces that face the outside, or auto: those of the default routes and those
    /// that hold an address of this Node
    #[arg(long, env = "LB_DEVICES", value_name = "LIST", default_value = "auto")]
    pub devices: Patterns,
    /// Name patterns of the host side of pod interfaces, e.g. 'veth*,cali*', or auto: veths
    /// whose peer is in another namespace and that are not in --devices
    #[arg(long, env = "LB_POD_INTERFACES", value_name = "LIST", default_value = "auto")]
    pub pod_interfaces: Patterns,
    /// Whether external packets are taken by XDP
    #[arg(long, env = "LB_XDP", value_name = "MODE", default_value = "auto")]
    pub xdp: XdpMode,
    /// How tc programs are attached
    #[arg(long, env = "LB_TC_ATTACH", value_name = "MODE", default_value = "auto")]
    pub tc_attach: TcAttach,
    /// How external packets reach a backend on another node; the annotation
    /// lb-agent/external-mode of a Service says otherwise for that one
    #[arg(long, env = "LB_EXTERNAL_MODE", value_name = "MODE", default_value = "snat")]
    pub external_mode: ExternalMode,
    /// Addresses of NodePorts: CIDRs, or primary: the first InternalIP of each family
    #[arg(long, env = "LB_NODEPORT_ADDRESSES", value_name = "LIST", default_value = "primary")]
    pub nodeport_addresses: NodePortAddresses,
    /// The addresses of pods
    #[arg(long, env = "LB_CLUSTER_CIDR", value_name = "LIST", value_delimiter = ',')]
    pub cluster_cidr: Vec<IpNet>,
    /// How traffic of pods is told from other traffic
    #[arg(long, env = "LB_DETECT_LOCAL_MODE", value_name = "MODE")]
    pub detect_local_mode: Option<DetectLocalMode>,
    /// Give every packet to a ClusterIP the node's address as its source; connect() of pods is
    /// then not translated
    #[arg(long, env = "LB_MASQUERADE_ALL", value_name = "BOOL", num_args = 0..=1,
          default_value_t = false, default_missing_value = "true", action = ArgAction::Set)]
    pub masquerade_all: bool,

    /// How many services, each port of each family one, the maps hold; of front ends twice
    /// as many in each family
    #[arg(long, env = "LB_MAX_SERVICES", value_name = "N", default_value_t = 65_536,
          value_parser = clap::value_parser!(u32).range(1..), help_heading = "Map sizes")]
    pub max_services: u32,
    /// How many backends of each family the maps hold
    #[arg(long, env = "LB_MAX_BACKENDS", value_name = "N", default_value_t = 262_144,
          value_parser = clap::value_parser!(u32).range(1..), help_heading = "Map sizes")]
    pub max_backends: u32,
    /// How many backends of all services together the maps hold
    #[arg(long, env = "LB_MAX_SLOTS", value_name = "N", default_value_t = 1_048_576,
          value_parser = clap::value_parser!(u32).range(1..), help_heading = "Map sizes")]
    pub max_slots: u32,
    /// How many entries of flows of each family the maps hold; a flow has two
    #[arg(long, env = "LB_MAX_FLOWS", value_name = "N", default_value_t = 262_144,
          value_parser = clap::value_parser!(u32).range(1..), help_heading = "Map sizes")]
    pub max_flows: u32,

    /// Address of /healthz and /livez; empty: none
    #[arg(long, env = "LB_HEALTHZ_BIND_ADDRESS", value_name = "ADDR:PORT",
          default_value = "0.0.0.0:10256", value_parser = BindAddress::healthz,
          help_heading = "Servers")]
    pub healthz_bind_address: BindAddress,
    /// Address of /metrics and /proxyMode; empty: none
    #[arg(long, env = "LB_METRICS_BIND_ADDRESS", value_name = "ADDR:PORT",
          default_value = "127.0.0.1:10249", value_parser = BindAddress::metrics,
          help_heading = "Servers")]
    pub metrics_bind_address: BindAddress,
    /// Fail when one of these addresses cannot be bound, instead of trying again
    #[arg(long, env = "LB_BIND_ADDRESS_HARD_FAIL", value_name = "BOOL", num_args = 0..=1,
          default_value_t = false, default_missing_value = "true", action = ArgAction::Set,
          help_heading = "Servers")]
    pub bind_address_hard_fail: bool,

    /// Log level.
    #[command(flatten)]
    pub log: LogArgs,

    /// Flags that were given and have no effect yet.
    #[arg(skip)]
    pub without_effect: Vec<&'static str>,
}

/// Whose connect() is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SocketLb {
    /// As tcp
    Auto,
    /// TCP of every process below --cgroup
    Tcp,
    /// TCP of processes in the agent's own network namespace
    Node,
    /// TCP and UDP of every process below --cgroup
    All,
    /// Nobody's: packets only
    Off,
}

/// Whether external packets are taken by XDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum XdpMode {
    /// Native where the driver has it, else tc
    Auto,
    /// In the driver
    Native,
    /// In the stack
    Generic,
    /// By tc
    Off,
}

/// How tc programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TcAttach {
    /// tcx where the kernel has it, else clsact
    Auto,
    /// By tcx links (Linux 6.6)
    Tcx,
    /// By filters of a clsact qdisc
    Clsact,
}

/// How external packets reach a backend on another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExternalMode {
    /// With the node's address as their source
    Snat,
    /// Tunnelled; the backend's node answers the client itself
    Dsr,
}

/// How traffic of pods is told from other traffic, spelt as kube-proxy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DetectLocalMode {
    /// By --cluster-cidr
    #[value(name = "ClusterCIDR")]
    ClusterCidr,
    /// By the pod CIDR of the Node
    #[value(name = "NodeCIDR")]
    NodeCidr,
    /// By the bridge that it comes from
    #[value(name = "BridgeInterface")]
    BridgeInterface,
    /// By the name of the interface that it comes from
    #[value(name = "InterfaceNamePrefix")]
    InterfaceNamePrefix,
}
