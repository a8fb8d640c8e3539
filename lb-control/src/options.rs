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
