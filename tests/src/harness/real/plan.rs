//! Names, directories and addresses of a cluster. Everything follows from its name, so that
//! whoever knows the name finds all of it, and nothing else has to be remembered.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::harness::netns::topology::plan::{Addresses, cidr};

/// The name that `cargo xtask cluster` uses.
pub const DEFAULT_NAME: &str = "lb-cluster";

/// How many nodes a cluster has.
pub const NODES: u8 = 3;

/// The address of the DNS Service.
pub const CLUSTER_DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// The port of the API server.
pub(super) const API_PORT: u16 = 6443;

/// Prefix lengths of the subnet that nodes, control plane and outside client share.
pub(super) const SUBNET: (u8, u8) = (24, 64);

/// Where clusters keep their files. Not below /run or /var/lib, which nodes have for themselves.
const PARENT: &str = "/var/cache";

/// A cluster's name, and what follows from it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Plan {
    name: String,
}

impl Plan {
    /// The plan of the cluster with this name.
    ///
    /// # Errors
    /// A name with other characters than small letters, digits and dashes, or a long one.
    pub fn new(name: &str) -> Result<Self> {
        let is_plain =
            name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        ensure!(
            is_plain && name.starts_with("lb-") && name.len() <= 32,
            "cluster name {name:?}: it starts with `lb-`, has small letters, digits and dashes, \
             and at most 32 of them"
        );
        Ok(Self { name: name.to_owned() })
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The command that removes it.
    pub fn command_down(&self) -> String {
        let name = if self.name == DEFAULT_NAME {
            String::new()
        } else {
            format!(" --name {}", self.name)
        };
        format!("cargo xtask cluster down{name}")
    }

    /// All files of the cluster.
    pub fn directory(&self) -> PathBuf {
        Path::new(PARENT).join(&self.name)
    }

    /// Held while a cluster of this name is made or removed.
    pub(super) fn lock_file(&self) -> PathBuf {
        Path::new("/run/lock").join(format!("{}.lock", self.name))
    }

    /// The file of a network namespace's name: `fabric`, `control`, `outside` or a node's.
    pub(super) fn namespace(&self, of: &str) -> String {
        format!("{}-{of}", self.name)
    }

    /// The cgroup of a node below each hierarchy's root.
    pub(super) fn cgroup(&self, of: &str) -> String {
        format!("{}/{of}", self.name)
    }

    /// Where kubeconfig files of the control plane are.
    pub(super) fn control(&self) -> PathBuf {
        self.directory().join(crate::harness::controlplane::DIRECTORY)
    }

    /// A kubeconfig file of the control plane; `admin` has every right.
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        self.control().join(format!("{user}.kubeconfig"))
    }
}

/// The name of a node; nodes count from 1.
pub fn node_name(number: u8) -> String {
    format!("node{number}")
}

/// The names of all nodes.
pub fn node_names() -> Vec<String> {
    (1..=NODES).map(node_name).collect()
}

/// The addresses of a node; nodes count from 1.
pub fn node(number: u8) -> Addresses {
    host(10 + u16::from(number))
}

/// The addresses of the control plane.
pub fn control_plane() -> Addresses {
    host(2)
}

/// The default gateway, which forwards nothing: what leaves the cluster goes nowhere. It has to
/// be there, because packets to a ClusterIP leave a node's stack by the default route.
pub(super) fn gateway() -> Addresses {
    host(1)
}

/// The addresses of the client that is no node and has no route to pods.
pub fn outside() -> Addresses {
    host(0x64)
}

/// Where the API server listens.
pub fn api_server() -> String {
    format!("https://{}:{API_PORT}", IpAddr::from(control_plane().v4))
}

/// `--cluster-cidr` of what runs in the cluster.
pub fn pod_cidrs() -> String {
    cidr::cluster()
}

fn host(number: u16) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(172, 18, 0, number as u8),
        v6: Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, number),
    }
}
