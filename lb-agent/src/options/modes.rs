//! The modes that flags choose among.

use clap::ValueEnum;

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
