//! The options that decisions depend on.

use std::str::FromStr;

use ipnet::IpNet;

/// How external packets reach a backend on another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExternalMode {
    /// With the node's address as their source.
    Snat,
    /// Encapsulated; the backend's node answers the client itself.
    Dsr,
}

impl ExternalMode {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Snat, Self::Dsr];

    /// The name in flags and annotations.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Snat => "snat",
            Self::Dsr => "dsr",
        }
    }
}

impl FromStr for ExternalMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.name() == text)
            .ok_or_else(|| format!("{text:?} is neither snat nor dsr"))
    }
}

/// On which addresses of the node NodePorts are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The first InternalIP of each family.
    Primary,
    /// Those inside one of these ranges.
    Ranges(Vec<IpNet>),
}

impl FromStr for NodePortAddresses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim() == "primary" {
            return Ok(Self::Primary);
        }
        let range = |text: &str| {
            text.trim().parse().map_err(|_| format!("{text:?} is neither a CIDR nor primary"))
        };
        text.split(',').map(range).collect::<Result<_, _>>().map(Self::Ranges)
    }
}

/// How much a part of a Service may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// The most that is allowed.
    pub most: usize,
    /// What is counted, in words.
    pub what: &'static str,
    /// The flag that sets it.
    pub flag: &'static str,
}

impl Limit {
    /// What to say if there are `count`, which is more than is allowed.
    pub fn exceeded_by(self, count: usize) -> Option<String> {
        let Self { most, what, flag } = self;
        (count > most).then(|| {
            format!(
                "{count} {what} are more than {most}, the most for one Service: it is not served; \
                 split it, or raise {flag} on every node"
            )
        })
    }
}

/// What one Service, and all Services of one namespace, may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Entries of `spec.ports`.
    pub ports: Limit,
    /// Load balancer addresses and external IPs together.
    pub external_addresses: Limit,
    /// Frontends: addresses times ports, of both families, without those at addresses of nodes.
    pub frontends: Limit,
    /// Entries of `spec.loadBalancerSourceRanges`.
    pub source_ranges: Limit,
    /// Backends: endpoints times ports, of both families.
    pub backends: Limit,
    /// How many percent of the entries of a map that are free to them the Services of a namespace
    /// may have; 100 means no limit.
    pub namespace_share: u32,
}

impl Default for Limits {
    fn default() -> Self {
        let limit = |most, what, flag| Limit { most, what, flag };
        Self {
            ports: limit(1_024, "ports", "--max-service-ports"),
            external_addresses: limit(
                256,
                "load balancer addresses and external IPs",
                "--max-service-external-addresses",
            ),
            frontends: limit(4_096, "frontends", "--max-service-frontends"),
            source_ranges: limit(1_024, "source ranges", "--max-service-source-ranges"),
            backends: limit(65_536, "backends", "--max-service-backends"),
            namespace_share: 50,
        }
    }
}
