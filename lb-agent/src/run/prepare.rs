//! `run --init-only`: what is done once for each boot of a node, and needs more rights than the
//! agent: mounts the bpffs, and sets the sysctls.

use crate::{
    config::Config,
    conntrack::sysctls,
    maps::bpffs::{self, BpffsError},
    network::own_packets,
};

/// Prepares the node for agents that may neither mount nor write below /proc/sys.
///
/// # Errors
/// If there is no bpffs and none can be mounted. A sysctl that cannot be set is logged.
pub fn prepare(config: &Config) -> Result<(), BpffsError> {
    sysctls::apply(&config.kube_proxy.conntrack);
    own_packets::accept();
    bpffs::ensure(&config.bpf_dir)
}
