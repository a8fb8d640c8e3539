//! The flags of `run`.

use std::{path::PathBuf, time::Duration};

use clap::{
    ArgAction, Args,
    builder::{PossibleValue, PossibleValuesParser, TypedValueParser},
};
use lb_control::options::ExternalMode;

use super::{CgroupArgs, LogArgs, PinArgs};
use crate::{
    kube_proxy::flags::KubeProxyFlags,
    options::{
        modes::{SocketLb, TcAttach, XdpMode},
        values::{self, Patterns, boolean},
    },
};

/// Arguments of `run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// A KubeProxyConfiguration file; flags win over it
    #[arg(long, env = "LB_CONFIG", value_name = "FILE", help_heading = "Source")]
    pub config: Option<PathBuf>,
    /// URL of the API server, in place of the configured one; needed where in-cluster
    /// configuration names a ClusterIP that nobody serves yet
    #[arg(long, env = "LB_MASTER", value_name = "URL", help_heading = "Source")]
    pub master: Option<String>,
    /// Read the objects from files below a directory instead of an API server
    #[arg(long, env = "LB_MANIFESTS", value_name = "DIR", help_heading = "Source")]
    pub manifests: Option<PathBuf>,
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
    #[arg(long, env = "LB_EXTERNAL_MODE", value_name = "MODE", default_value = "snat",
          value_parser = external_mode())]
    pub external_mode: ExternalMode,
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

    /// How long the watch of the API server may be broken before /healthz answers 503;
    /// 0: for ever
    #[arg(long, env = "LB_WATCH_TIMEOUT", value_name = "DURATION", default_value = "10m",
          value_parser = values::duration, help_heading = "Servers")]
    pub watch_timeout: Duration,
    /// Write the configuration that the flags and --config make to a file, and end
    #[arg(long, env = "LB_WRITE_CONFIG_TO", value_name = "FILE", help_heading = "Instead")]
    pub write_config_to: Option<PathBuf>,
    /// Do what `cleanup` does, and end
    #[arg(long, env = "LB_CLEANUP", value_name = "BOOL", num_args = 0..=1,
          default_value = "false", default_missing_value = "true", value_parser = boolean,
          action = ArgAction::Set, help_heading = "Instead")]
    pub cleanup: bool,
    /// Do only what needs full root privileges, which is to set what conntrack.* asks for, and end
    #[arg(long, env = "LB_INIT_ONLY", value_name = "BOOL", num_args = 0..=1,
          default_value = "false", default_missing_value = "true", value_parser = boolean,
          action = ArgAction::Set, help_heading = "Instead")]
    pub init_only: bool,

    /// Flags of kube-proxy that set a field of its configuration.
    #[command(flatten)]
    pub kube_proxy: KubeProxyFlags,
    /// Log level.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Parses `--external-mode`, whose type knows no command line.
fn external_mode() -> impl TypedValueParser<Value = ExternalMode> {
    let value = |mode: ExternalMode| {
        PossibleValue::new(mode.name()).help(match mode {
            ExternalMode::Snat => "With the node's address as their source",
            ExternalMode::Dsr => "Tunnelled; the backend's node answers the client itself",
        })
    };
    PossibleValuesParser::new(ExternalMode::ALL.map(value))
        .try_map(|text| text.parse::<ExternalMode>())
}
