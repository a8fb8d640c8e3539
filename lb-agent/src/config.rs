//! What `run` works with: the flags, checked and completed.
//!
//! It reads the host name and nothing else. Invariant: whatever is built from here on
//! never looks at flags or the environment again.

use std::{fs, io, path::PathBuf};

use crate::{
    cli::{
        RunArgs,
        run::{SocketLb, TcAttach},
        values::{BindAddress, NodePortAddresses, Patterns},
    },
    watch::api,
};

const HOST_NAME: &str = "/proc/sys/kernel/hostname";

/// The configuration of `run`.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where objects come from.
    pub source: Source,
    /// This node's name, as its Node object and the slices have it.
    pub node_name: String,
    /// Where maps, programs and links are pinned.
    pub bpf_dir: PathBuf,
    /// cgroup v2 directory of the connect-time hooks; none: the cgroup2 mount.
    pub cgroup: Option<PathBuf>,
    /// Whose connect() is translated; never [`SocketLb::Auto`].
    pub socket_lb: SocketLb,
    /// Interfaces that face the outside.
    pub devices: Patterns,
    /// The host side of pod interfaces.
    pub pod_interfaces: Patterns,
    /// How tc programs are attached.
    pub tc_attach: TcAttach,
    /// Addresses of node ports.
    pub node_port_addresses: NodePortAddresses,
    /// Map sizes.
    pub sizes: Sizes,
    /// Where /healthz listens.
    pub healthz: BindAddress,
    /// Where /metrics listens.
    pub metrics: BindAddress,
    /// Whether an address that cannot be bound ends the agent.
    pub bind_hard_fail: bool,
}

/// Where objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An API server.
    Api(api::Options),
    /// Files below a directory.
    Manifests(PathBuf),
}

/// How many entries maps have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// `--max-services`.
    pub services: u32,
    /// `--max-backends`.
    pub backends: u32,
    /// `--max-slots`.
    pub slots: u32,
    /// `--max-flows`.
    pub flows: u32,
}

/// Why flags make no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no name for this node.
    #[error("the host name is not usable as this node's name: give --hostname-override NAME")]
    HostName(#[source] io::Error),
    /// The name is no name of a Node.
    #[error("node name {0:?} is empty or holds white space: correct --hostname-override")]
    NodeName(String),
}

impl Config {
    /// Checks and completes the flags of `run`.
    ///
    /// # Errors
    /// If this node has no usable name.
    pub fn new(arguments: RunArgs) -> Result<Self, Error> {
        let name = match arguments.hostname_override {
            Some(name) => name,
            None => fs::read_to_string(HOST_NAME).map_err(Error::HostName)?,
        };
        let source = match arguments.manifests {
            Some(dir) => Source::Manifests(dir),
            None => Source::Api(api::Options {
                kubeconfig: arguments.kubeconfig.filter(|path| !path.as_os_str().is_empty()),
                master: arguments.master,
            }),
        };
        Ok(Self {
            source,
            node_name: node_name(&name)?,
            bpf_dir: arguments.pins.bpf_dir,
            cgroup: arguments.cgroup.cgroup,
            socket_lb: match arguments.socket_lb {
                SocketLb::Auto => SocketLb::Tcp,
                mode => mode,
            },
            devices: arguments.devices,
            pod_interfaces: arguments.pod_interfaces,
            tc_attach: arguments.tc_attach,
            node_port_addresses: arguments.nodeport_addresses,
            sizes: Sizes {
                services: arguments.max_services,
                backends: arguments.max_backends,
                slots: arguments.max_slots,
                flows: arguments.max_flows,
            },
            healthz: arguments.healthz_bind_address,
            metrics: arguments.metrics_bind_address,
            bind_hard_fail: arguments.bind_address_hard_fail,
        })
    }
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
        Config::new(*run)
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
        assert_eq!(all.socket_lb, SocketLb::Tcp);
    }
}
