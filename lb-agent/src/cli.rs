//! The command line: commands, flags, their environment twins and their types.
//!
//! It parses and nothing else; [`crate::config`] makes the configuration of `run` out of
//! it. Every flag can be given as `LB_<FLAG>` too, except where another variable is the
//! custom (`NODE_NAME`, `KUBECONFIG`). A usage error ends with status 2.

pub mod run;

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::options::{
    modes::XdpMode,
    values::{Destination, Patterns, duration, socket_or_address},
};
pub use run::RunArgs;

/// A replacement of kube-proxy that balances Services with eBPF.
#[derive(Debug, Parser)]
#[command(name = "lb-agent", disable_version_flag = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Watch Services and program this node; stays in the foreground
    Run(Box<RunArgs>),
    /// Say what this node lacks or what is in the way; status 1 if `run` would fail
    Check(CheckArgs),
    /// Show what the pinned maps hold; no agent need run
    Get(GetArgs),
    /// Say what would happen to a packet, and why, from the pinned maps
    Explain(ExplainArgs),
    /// Detach and unpin everything that is ours, nothing else
    Cleanup(CleanupArgs),
    /// Print the version
    Version,
}

/// How much to log.
#[derive(Clone, Debug, Default, Args)]
pub struct LogArgs {
    /// Log level as kube-proxy counts: 4 logs decisions, 6 everything; RUST_LOG wins
    #[arg(short = 'v', long = "v", env = "LB_V", value_name = "LEVEL", num_args = 0..=1,
          default_missing_value = "4", overrides_with = "verbosity")]
    pub verbosity: Option<u32>,
}

/// Where maps, programs and links are pinned.
#[derive(Clone, Debug, Args)]
pub struct PinArgs {
    /// Where maps, programs and links are pinned
    #[arg(long, env = "LB_BPF_DIR", value_name = "DIR", default_value = "/sys/fs/bpf/lb")]
    pub bpf_dir: PathBuf,
}

/// The cgroup of the connect-time hooks.
#[derive(Clone, Debug, Args)]
pub struct CgroupArgs {
    /// cgroup v2 directory for the connect-time hooks [default: the cgroup2 mount]
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
    /// As run has it
    #[arg(long, env = "LB_DEVICES", value_name = "LIST", default_value = "auto")]
    pub devices: Patterns,
    /// As run has it
    #[arg(long, env = "LB_XDP", value_name = "MODE", default_value = "auto")]
    pub xdp: XdpMode,
    /// Log level.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Arguments of `get`.
#[derive(Clone, Debug, Args)]
pub struct GetArgs {
    /// What to show
    #[arg(value_name = "WHAT")]
    pub what: What,
    /// How to print it
    #[arg(short, long, env = "LB_OUTPUT", value_name = "FORMAT", default_value = "table")]
    pub output: Output,
    /// Pins.
    #[command(flatten)]
    pub pins: PinArgs,
}

/// What `get` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// Services and their slot ranges
    Services,
    /// Addresses and ports that clients use
    Frontends,
    /// Endpoints
    Backends,
    /// Known flows
    Flows,
    /// Session affinity
    Affinity,
    /// Counters of the programs
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
    /// The client; without a port an ephemeral one
    #[arg(long, env = "LB_FROM", value_name = "ADDR[:PORT]", value_parser = from_address)]
    pub from: SocketAddr,
    /// The destination, e.g. 10.96.0.1:443/tcp
    #[arg(long, env = "LB_TO", value_name = "ADDR:PORT/PROTO")]
    pub to: Destination,
    /// Where the packet is seen first: pod, node or the name of a device
    #[arg(long, env = "LB_AT", value_name = "pod|node|DEVICE", default_value = "pod")]
    pub at: String,
    /// How to print it; table: as lines for people
    #[arg(short, long, env = "LB_OUTPUT", value_name = "FORMAT", default_value = "table")]
    pub output: Output,
    /// Pins.
    #[command(flatten)]
    pub pins: PinArgs,
}

/// Arguments of `cleanup`.
#[derive(Clone, Debug, Args)]
pub struct CleanupArgs {
    /// Let known flows go on, new ones to the stack, until none is left or for so long
    #[arg(long, env = "LB_DRAIN", value_name = "DURATION", value_parser = duration)]
    pub drain: Option<Duration>,
    /// Take away what kube-proxy has left (iptables, nftables, ipvs) instead of what is ours
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

/// The port of a client that was given without one.
const EPHEMERAL_PORT: u16 = 40_000;

fn from_address(text: &str) -> Result<SocketAddr, String> {
    socket_or_address(text, EPHEMERAL_PORT)
}

/// Parses arguments, the program's name first.
///
/// # Errors
/// As clap has it; [`clap::Error::exit`] prints it and ends with status 2, or 0 for help.
pub fn parse<I>(arguments: I) -> Result<Cli, clap::Error>
where
    I: IntoIterator,
    I::Item: Into<OsString> + Clone,
{
    Cli::try_parse_from(arguments)
}

#[cfg(test)]
mod tests;
