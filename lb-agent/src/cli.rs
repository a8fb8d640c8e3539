//! The command line: commands, flags, their environment variables and their types.
//!
//! It only parses; [`crate::config`] turns the arguments of `run` into a configuration. Every
//! flag can be given as `LB_<FLAG>` too; two flags use the customary variables `NODE_NAME` and
//! `KUBECONFIG`. A usage error exits with status 2.

pub mod environment;
pub mod run;

use std::{
    ffi::OsString,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use lb_control::options::Limits;

use crate::options::{
    modes::XdpMode,
    sizes::{self, Sizes},
    values::{Destination, Patterns, ServicePattern, duration, socket_or_address},
};
pub use run::RunArgs;

/// Replaces kube-proxy: balances Kubernetes Services with eBPF.
#[derive(Debug, Parser)]
#[command(name = "lb-agent", disable_version_flag = true)]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Watch Services and program this node; runs in the foreground
    Run(Box<RunArgs>),
    /// Check this node for problems; exits with status 1 if `run` would fail
    Check(CheckArgs),
    /// Print the contents of the pinned maps; works without a running agent
    Get(GetArgs),
    /// Explain from the pinned maps what would happen to a packet, and why
    Explain(ExplainArgs),
    /// Show the state of this node's agent and its problems; exits with status 1 if there are any
    Status(StatusArgs),
    /// Write one archive for a bug report, without secrets
    Sysdump(SysdumpArgs),
    /// Measure what a Service costs in this cluster, or serve such a measurement
    Bench(BenchArgs),
    /// Detach and unpin everything that lb-agent created, and nothing else
    Cleanup(CleanupArgs),
    /// Print the completions of a shell
    Completions(CompletionsArgs),
    /// Write man pages and completions below a directory
    #[command(hide = true)]
    Documents(DocumentsArgs),
    /// Print the version
    Version,
}

/// How much to log.
#[derive(Clone, Debug, Default, Args)]
pub struct LogArgs {
    /// Log verbosity, as in kube-proxy: 4 adds decisions, 6 adds everything; RUST_LOG
    /// overrides it
    #[arg(short = 'v', long = "v", env = "LB_V", value_name = "LEVEL", num_args = 0..=1,
          default_missing_value = "4", overrides_with = "verbosity")]
    pub verbosity: Option<u32>,
}

/// The directory of the pins.
#[derive(Clone, Debug, Args)]
pub struct PinArgs {
    /// Directory where maps, programs and links are pinned
    #[arg(long, env = "LB_BPF_DIR", value_name = "DIR", default_value = "/sys/fs/bpf/lb")]
    pub bpf_dir: PathBuf,
}

/// The cgroup of the connect-time hooks.
#[derive(Clone, Debug, Args)]
pub struct CgroupArgs {
    /// cgroup v2 directory that the connect-time hooks are attached to [default: the cgroup2 mount]
    #[arg(long, env = "LB_CGROUP", value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
}

/// The capacities of the maps.
#[derive(Clone, Copy, Debug, Args)]
pub struct SizeArgs {
    /// Capacity of SERVICES: per IP family, one entry for each service port and one for each
    /// ClusterIP; FRONTENDS4 and FRONTENDS6 each have room for twice as many
    #[arg(long, env = "LB_MAX_SERVICES", value_name = "N", default_value_t = 65_536,
          value_parser = clap::value_parser!(u32).range(1..), help_heading = "Map sizes")]
    pub max_services: u32,
    /// Capacity of BACKENDS4 and BACKENDS6: one entry for each endpoint of each service port
    #[arg(long, env = "LB_MAX_BACKENDS", value_name = "N", default_value_t = 262_144,
          value_parser = clap::value_parser!(u32).range(1..), help_heading = "Map sizes")]
    pub max_backends: u32,
    /// Capacity of SLOTS: the backend lists of all services together
    #[arg(long, env = "LB_MAX_SLOTS", value_name = "N", default_value_t = 1_048_576,
          value_parser = clap::value_parser!(u32).range(1..), help_heading = "Map sizes")]
    pub max_slots: u32,
    /// Number of flows of each IP family, rounded up to a multiple of 8; the tables take 92 bytes
    /// for each IPv4 flow and 140 for each IPv6 flow, at once [default: as many as conntrack has
    /// connections on a node with this memory: 8192 up to 1 GiB, 65536 up to 4 GiB, else 262144]
    #[arg(long, env = "LB_MAX_FLOWS", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=MOST_FLOWS), help_heading = "Map sizes")]
    pub max_flows: Option<u32>,
}

/// What one Service may ask for. A Service that asks for more is refused as a whole, with the Event
/// `TooLarge`. Every node must have the same limits, so that all decide alike.
#[derive(Clone, Copy, Debug, Args)]
pub struct LimitArgs {
    /// Most entries of spec.ports
    #[arg(long, env = "LB_MAX_SERVICE_PORTS", value_name = "N", default_value_t = 1_024,
          value_parser = clap::value_parser!(u32).range(1..), help_heading = HEADING)]
    pub max_service_ports: u32,
    /// Most load balancer addresses and external IPs together
    #[arg(long, env = "LB_MAX_SERVICE_EXTERNAL_ADDRESSES", value_name = "N", default_value_t = 256,
          value_parser = clap::value_parser!(u32).range(1..), help_heading = HEADING)]
    pub max_service_external_addresses: u32,
    /// Most frontends, of both IP families: each address with each port, each address as a whole,
    /// and each node port
    #[arg(long, env = "LB_MAX_SERVICE_FRONTENDS", value_name = "N", default_value_t = 4_096,
          value_parser = clap::value_parser!(u32).range(1..), help_heading = HEADING)]
    pub max_service_frontends: u32,
    /// Most entries of spec.loadBalancerSourceRanges
    #[arg(long, env = "LB_MAX_SERVICE_SOURCE_RANGES", value_name = "N", default_value_t = 1_024,
          value_parser = clap::value_parser!(u32).range(1..), help_heading = HEADING)]
    pub max_service_source_ranges: u32,
    /// Most backends, of both IP families: each endpoint with each port
    #[arg(long, env = "LB_MAX_SERVICE_BACKENDS", value_name = "N", default_value_t = 65_536,
          value_parser = clap::value_parser!(u32).range(1..), help_heading = HEADING)]
    pub max_service_backends: u32,
    /// How many percent of the entries of a map that are free to them all Services of a namespace
    /// may have together; 100: no limit. A Service beyond that gets the Event `NamespaceFull`
    #[arg(long, env = "LB_MAX_NAMESPACE_SHARE", value_name = "PERCENT", default_value_t = 50,
          value_parser = clap::value_parser!(u32).range(1..=100), help_heading = HEADING)]
    pub max_namespace_share: u32,
}

const HEADING: &str = "Limits of tenants";

impl From<LimitArgs> for Limits {
    fn from(arguments: LimitArgs) -> Self {
        let namespace_share = arguments.max_namespace_share;
        let mut limits = Self { namespace_share, ..Self::default() };
        for (limit, most) in [
            (&mut limits.ports, arguments.max_service_ports),
            (&mut limits.external_addresses, arguments.max_service_external_addresses),
            (&mut limits.frontends, arguments.max_service_frontends),
            (&mut limits.source_ranges, arguments.max_service_source_ranges),
            (&mut limits.backends, arguments.max_service_backends),
        ] {
            limit.most = most as usize;
        }
        limits
    }
}

/// The most that `--max-flows` may be.
const MOST_FLOWS: i64 = 1 << 28;

impl From<SizeArgs> for Sizes {
    fn from(arguments: SizeArgs) -> Self {
        Self {
            services: arguments.max_services,
            backends: arguments.max_backends,
            slots: arguments.max_slots,
            flows: arguments.max_flows.unwrap_or_else(sizes::default_flows),
        }
    }
}

/// Arguments of `check`.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// Pins.
    #[command(flatten)]
    pub pins: PinArgs,
    /// Cgroup.
    #[command(flatten)]
    pub cgroup: CgroupArgs,
    /// Same as the flag of `run`
    #[arg(long, env = "LB_DEVICES", value_name = "LIST", default_value = "auto")]
    pub devices: Patterns,
    /// Same as the flag of `run`
    #[arg(long, env = "LB_XDP", value_name = "MODE", default_value = "auto")]
    pub xdp: XdpMode,
    /// Same as the flags of `run`.
    #[command(flatten)]
    pub sizes: SizeArgs,
    /// Log level.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Arguments of `get`.
#[derive(Clone, Debug, Args)]
pub struct GetArgs {
    /// What to print
    #[arg(value_name = "WHAT")]
    pub what: What,
    /// Output format
    #[arg(short, long, env = "LB_OUTPUT", value_name = "FORMAT", default_value = "table")]
    pub output: Output,
    /// Only flows of this Service, or of this port of it
    #[arg(long, env = "LB_SERVICE", value_name = "NAMESPACE/SERVICE[:PORT]")]
    pub service: Option<ServicePattern>,
    /// Only flows with this address: the client's, the Service's, the backend's, or the one that
    /// the backend sees
    #[arg(long, env = "LB_ADDRESS", value_name = "ADDR")]
    pub address: Option<IpAddr>,
    /// Pins.
    #[command(flatten)]
    pub pins: PinArgs,
}

/// The tables that `get` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// Service ports: endpoints, policies and traffic
    Services,
    /// Addresses and ports that clients connect to
    Frontends,
    /// Endpoints, and the backend sets that contain them
    Backends,
    /// Translated flows
    Flows,
    /// Session affinity entries
    Affinity,
    /// Counters of the programs, by hook and reason
    Counters,
}

/// Output formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Aligned columns
    Table,
    /// An array of objects
    Json,
}

/// Arguments of `explain`.
#[derive(Clone, Debug, Args)]
pub struct ExplainArgs {
    /// Client address; without a port, an ephemeral port is assumed
    #[arg(long, env = "LB_FROM", value_name = "ADDR[:PORT]", value_parser = from_address)]
    pub from: SocketAddr,
    /// Destination, e.g. 10.96.0.1:443/tcp
    #[arg(long, env = "LB_TO", value_name = "ADDR:PORT/PROTO")]
    pub to: Destination,
    /// Origin of the packet: pod (a pod of this node), node (a process of this node), or the
    /// name of the device that receives it
    #[arg(long, env = "LB_AT", value_name = "pod|node|DEVICE", default_value = "pod")]
    pub at: String,
    /// Output format; table prints lines of text
    #[arg(short, long, env = "LB_OUTPUT", value_name = "FORMAT", default_value = "table")]
    pub output: Output,
    /// Pins.
    #[command(flatten)]
    pub pins: PinArgs,
}

/// Arguments of `status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// Wait up to DURATION until there is no problem
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub wait: Option<Duration>,
    /// Only check whether FILE of `run --ready-file` exists: exits with status 0 if it does
    #[arg(long, env = "LB_READY_FILE", value_name = "FILE", conflicts_with = "wait")]
    pub ready_file: Option<PathBuf>,
    /// Output format; table prints one page of text
    #[arg(short, long, env = "LB_OUTPUT", value_name = "FORMAT", default_value = "table")]
    pub output: Output,
    /// Pins.
    #[command(flatten)]
    pub pins: PinArgs,
}

/// Arguments of `sysdump`.
#[derive(Clone, Debug, Args)]
pub struct SysdumpArgs {
    /// Write the archive to FILE, or to stdout if it is `-`
    /// [default: lb-sysdump-TIME.tar.gz in this directory]
    #[arg(long, env = "LB_OUT", value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// What `check` looks at.
    #[command(flatten)]
    pub check: CheckArgs,
}

/// Arguments of `completions`.
#[derive(Clone, Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

/// Arguments of `documents`.
#[derive(Clone, Debug, Args)]
pub struct DocumentsArgs {
    /// The directory that stands for /usr/share
    #[arg(value_name = "DIR")]
    pub prefix: PathBuf,
}

/// Arguments of `bench`.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// Serve on PORT of every address, until killed
    #[arg(long, value_name = "PORT", conflicts_with_all = ["service", "pod"])]
    pub serve: Option<u16>,
    /// The Service of a pod that serves: its ClusterIP, or a name
    #[arg(long, value_name = "HOST", required_unless_present = "serve")]
    pub service: Option<String>,
    /// The same pod by its own address, or by the name of a headless Service
    #[arg(long, value_name = "HOST", required_unless_present = "serve")]
    pub pod: Option<String>,
    /// The port of the pod and of the Service
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    pub port: u16,
    /// How often each of them is measured
    #[arg(long, value_name = "N", default_value_t = 31,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// End after this time, whatever is left
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = duration)]
    pub time: Duration,
}

/// Arguments of `cleanup`.
#[derive(Clone, Debug, Args)]
pub struct CleanupArgs {
    /// Stop accepting new flows, wait up to DURATION for existing ones to end, then clean up
    #[arg(long, env = "LB_DRAIN", value_name = "DURATION", value_parser = duration)]
    pub drain: Option<Duration>,
    /// Remove kube-proxy's rules (iptables, nftables, ipvs) instead of the programs and maps of
    /// lb-agent
    #[arg(long, env = "LB_KUBE_PROXY", conflicts_with = "drain")]
    pub kube_proxy: bool,
    /// Use the tools (iptables, nft) of the root directory DIR, for a container that has no such
    /// tools
    #[arg(long, env = "LB_CHROOT", value_name = "DIR", requires = "kube_proxy")]
    pub chroot: Option<PathBuf>,
    /// Clean up even if an agent runs, which then attaches and pins everything again within
    /// seconds
    #[arg(long, env = "LB_FORCE", conflicts_with_all = ["drain", "kube_proxy"])]
    pub force: bool,
    /// Pins.
    #[command(flatten)]
    pub pins: PinArgs,
    /// Cgroup.
    #[command(flatten)]
    pub cgroup: CgroupArgs,
    /// Log level.
    #[command(flatten)]
    pub log: LogArgs,
}

/// The client's port if `--from` has none.
const EPHEMERAL_PORT: u16 = 40_000;

fn from_address(text: &str) -> Result<SocketAddr, String> {
    socket_or_address(text, EPHEMERAL_PORT)
}

/// Parses arguments; the first one is the program's name.
///
/// # Errors
/// clap's error: [`clap::Error::exit`] prints it and exits with status 2, or 0 for help.
pub fn parse<I>(arguments: I) -> Result<Cli, clap::Error>
where
    I: IntoIterator,
    I::Item: Into<OsString> + Clone,
{
    Cli::try_parse_from(arguments)
}

#[cfg(test)]
mod tests;
