//! The flags of `run`.

use std::{path::PathBuf, time::Duration};

use clap::{
    ArgAction, Args,
    builder::{OsStringValueParser, PossibleValue, PossibleValuesParser, TypedValueParser},
};
use lb_control::options::ExternalMode;

use super::{CgroupArgs, LimitArgs, LogArgs, PinArgs, SizeArgs};
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
    /// KubeProxyConfiguration file; flags override it
    #[arg(long, env = "LB_CONFIG", value_name = "FILE", help_heading = "Source")]
    pub config: Option<PathBuf>,
    /// URLs of the API servers, instead of the configured one, tried in this order; needed if
    /// the in-cluster configuration names a ClusterIP that no agent serves yet
    #[arg(
        long,
        env = "LB_MASTER",
        value_name = "URL,...",
        value_delimiter = ',',
        help_heading = "Source"
    )]
    pub master: Vec<String>,
    /// Directory on the node's disk that keeps the addresses of the API servers for the next
    /// start; empty: they are not kept
    #[arg(long, env = "LB_STATE_DIR", value_name = "DIR", default_value = "/var/lib/lb",
          value_parser = OsStringValueParser::new().map(PathBuf::from),
          help_heading = "Source")]
    pub state_dir: PathBuf,
    /// Read objects from YAML and JSON files below DIR instead of an API server
    #[arg(long, env = "LB_MANIFESTS", value_name = "DIR", help_heading = "Source")]
    pub manifests: Option<PathBuf>,
    /// Pins.
    #[command(flatten)]
    pub pins: PinArgs,
    /// Cgroup.
    #[command(flatten)]
    pub cgroup: CgroupArgs,
    /// Processes whose connect() calls are translated
    #[arg(long, env = "LB_SOCKET_LB", value_name = "MODE", default_value = "auto")]
    pub socket_lb: SocketLb,
    /// cgroups, as paths below --cgroup, whose connect() calls are not translated; their
    /// traffic is translated packet by packet
    #[arg(long, env = "LB_SOCKET_LB_EXCLUDE_CGROUPS", value_name = "LIST", value_delimiter = ',')]
    pub socket_lb_exclude_cgroups: Vec<PathBuf>,
    /// External interfaces, by which packets of other machines arrive, or auto: every interface
    /// except loopback, those of pods, their bridges, and ports of a bridge or bond; of veths only
    /// those with a default route or an address of this Node
    #[arg(long, env = "LB_DEVICES", value_name = "LIST", default_value = "auto")]
    pub devices: Patterns,
    /// Host side of pod interfaces, as name patterns such as 'veth*,cali*', or auto: veths
    /// whose peer is in another namespace and that are not in --devices
    #[arg(long, env = "LB_POD_INTERFACES", value_name = "LIST", default_value = "auto")]
    pub pod_interfaces: Patterns,
    /// Where packets of known flows are handled on external interfaces
    #[arg(long, env = "LB_XDP", value_name = "MODE", default_value = "auto")]
    pub xdp: XdpMode,
    /// How tc programs are attached
    #[arg(long, env = "LB_TC_ATTACH", value_name = "MODE", default_value = "auto")]
    pub tc_attach: TcAttach,
    /// How packets of external clients reach a backend on another node; the annotation
    /// lb-agent/external-mode overrides it for one Service
    #[arg(long, env = "LB_EXTERNAL_MODE", value_name = "MODE", default_value = "snat",
          value_parser = external_mode())]
    pub external_mode: ExternalMode,
    /// Capacities of the maps.
    #[command(flatten)]
    pub sizes: SizeArgs,
    /// What one Service may ask for.
    #[command(flatten)]
    pub limits: LimitArgs,

    /// If another lb-agent runs with this --bpf-dir: load the programs, list the objects, wait
    /// until it ends and take over at once, instead of failing
    #[arg(long, env = "LB_WAIT", value_name = "BOOL", num_args = 0..=1,
          default_value = "false", default_missing_value = "true", value_parser = boolean,
          action = ArgAction::Set, help_heading = "Upgrade")]
    pub wait: bool,
    /// Create FILE once this agent serves, or waits with everything prepared; removed at start
    #[arg(long, env = "LB_READY_FILE", value_name = "FILE", help_heading = "Upgrade")]
    pub ready_file: Option<PathBuf>,

    /// How long the watch of the API server may be broken before /healthz (not /livez) answers 503;
    /// 0 means forever
    #[arg(long, env = "LB_WATCH_TIMEOUT", value_name = "DURATION", default_value = "0",
          value_parser = values::duration, help_heading = "Servers")]
    pub watch_timeout: Duration,
    /// Remove the taint with this key from this node's Node object once Services are programmed;
    /// needs the right to patch Nodes
    #[arg(long, env = "LB_STARTUP_TAINT", value_name = "KEY")]
    pub startup_taint: Option<String>,
    /// Write the configuration that results from the flags and --config to FILE, then exit
    #[arg(
        long,
        env = "LB_WRITE_CONFIG_TO",
        value_name = "FILE",
        help_heading = "Instead of running"
    )]
    pub write_config_to: Option<PathBuf>,
    /// Run `lb-agent cleanup`, then exit
    #[arg(long, env = "LB_CLEANUP", value_name = "BOOL", num_args = 0..=1,
          default_value = "false", default_missing_value = "true", value_parser = boolean,
          action = ArgAction::Set, help_heading = "Instead of running")]
    pub cleanup: bool,
    /// Only prepare the node, which needs full root privileges, then exit: mount the bpffs, set
    /// the sysctls of lo and of the conntrack.* settings
    #[arg(long, env = "LB_INIT_ONLY", value_name = "BOOL", num_args = 0..=1,
          default_value = "false", default_missing_value = "true", value_parser = boolean,
          action = ArgAction::Set, help_heading = "Instead of running")]
    pub init_only: bool,

    /// Flags of kube-proxy that set a field of its configuration.
    #[command(flatten)]
    pub kube_proxy: KubeProxyFlags,
    /// Log level.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Parses `--external-mode`: its type is defined in lb-control, which does not use clap.
fn external_mode() -> impl TypedValueParser<Value = ExternalMode> {
    let value = |mode: ExternalMode| {
        PossibleValue::new(mode.name()).help(match mode {
            ExternalMode::Snat => {
                "With this node's address as source; replies return through this node"
            }
            ExternalMode::Dsr => {
                "Encapsulated to the backend's node, which replies to the client directly"
            }
        })
    };
    PossibleValuesParser::new(ExternalMode::ALL.map(value))
        .try_map(|text| text.parse::<ExternalMode>())
}
