//! The command line: commands, flags, their environment variables and their types.
//!
//! It only parses; [`crate::config`] turns the arguments of `run` into a configuration. Every
//! flag can be given as `LB_<FLAG>` too; two flags use the customary variables `NODE_NAME` and
//! `KUBECONFIG`. A usage error exits with status 2.

pub mod run;

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::options::{
    modes::XdpMode,
    values::{Destination, Patterns, duration, socket_or_address},
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
    /// Detach and unpin everything that lb-agent created, and nothing else
    Cleanup(CleanupArgs),
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
    /// Flow entries: one for each direction of a translated flow
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

/// Arguments of `cleanup`.
#[derive(Clone, Debug, Args)]
pub struct CleanupArgs {
    /// Stop accepting new flows, wait up to DURATION for existing ones to end, then clean up
    #[arg(long, env = "LB_DRAIN", value_name = "DURATION", value_parser = duration)]
    pub drain: Option<Duration>,
    /// Remove what kube-proxy left behind (iptables, nftables, ipvs) instead of what lb-agent
    /// created
    #[arg(long, env = "LB_KUBE_PROXY", conflicts_with = "drain")]
    pub kube_proxy: bool,
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
