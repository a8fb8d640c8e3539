//! How pods get their network: configuration of the reference plug-ins, one file a node, or
//! flannel's DaemonSet ([`super::flannel`]), which configures each node itself.

use std::fmt;

use anyhow::Result;
use clap::ValueEnum;
use serde_json::{Value, json};

use super::node::Node;
use crate::harness::netns::topology::plan::cidr;

/// Debian's directory of CNI plug-ins. A node sees the machine's plug-ins there, and adds its own.
pub(super) const PLUGINS: &str = "/usr/lib/cni";
/// Where containerd looks for configuration.
pub(super) const CONFIGURATION: &str = "/etc/cni/net.d";

/// The network of pods.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum Cni {
    /// Veths at a bridge; the network between nodes routes the addresses of pods
    #[default]
    Bridge,
    /// Veths without a bridge, a route for each pod; between nodes as bridge
    Ptp,
    /// flannel's DaemonSet: veths at a bridge, VXLAN between nodes. The network between nodes drops
    /// packets that have addresses of pods
    Flannel,
}

impl Cni {
    /// Whether the network between nodes knows no addresses of pods.
    pub(super) fn is_overlay(self) -> bool {
        self == Self::Flannel
    }
}

impl fmt::Display for Cni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Bridge => "bridge",
            Self::Ptp => "ptp",
            Self::Flannel => "flannel",
        };
        f.write_str(name)
    }
}

/// Writes the configuration of a node whose plug-ins nobody else configures.
pub(super) fn configure(node: &Node, cni: Cni) -> Result<()> {
    let plugin = match cni {
        Cni::Bridge => json!({
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "hairpinMode": true,
            "ipMasq": false,
            "ipam": ipam(node),
        }),
        Cni::Ptp => json!({"type": "ptp", "ipMasq": false, "ipam": ipam(node)}),
        Cni::Flannel => return Ok(()),
    };
    let list = json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [plugin, {"type": "portmap", "capabilities": {"portMappings": true}}],
    });
    node.write(&format!("{CONFIGURATION}/10-pods.conflist"), &list.to_string())
}

fn ipam(node: &Node) -> Value {
    let ranges = cidr::pods_of_node(node.number()).map(|net| json!([{"subnet": net.to_string()}]));
    json!({
        "type": "host-local",
        "ranges": ranges,
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    })
}
