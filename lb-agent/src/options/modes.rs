//! The values of flags that choose a mode.

use clap::ValueEnum;

/// The processes whose connect() calls are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SocketLb {
    /// Same as node; off if the kernel is older than 5.14
    Auto,
    /// TCP of all processes below --cgroup
    Tcp,
    /// TCP of processes in the agent's own network namespace
    Node,
    /// TCP and UDP of all processes below --cgroup
    All,
    /// Disabled, translate packets only
    Off,
}

/// Where packets of known flows are handled on external interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum XdpMode {
    /// Same as off
    Auto,
    /// XDP in the driver if it supports that, else tc
    Native,
    /// XDP in the network stack
    Generic,
    /// tc
    Off,
}

/// How tc programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TcAttach {
    /// tcx if the kernel supports it, else clsact
    Auto,
    /// tcx links (Linux 6.6 or later)
    Tcx,
    /// Filters of a clsact qdisc
    Clsact,
}
