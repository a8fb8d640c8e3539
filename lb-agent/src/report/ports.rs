//! Source ports of the node that are nearly used up.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};

/// Source ports of one address that flows to one backend use.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PortUse {
    /// The source address that the backend sees, one of the node's.
    pub address: IpAddr,
    /// The backend.
    pub backend: SocketAddr,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// How many ports are in use.
    pub used: u32,
    /// How many there are.
    pub ports: u32,
}

impl PortUse {
    /// The part that is in use, in percent.
    pub fn percent(&self) -> u32 {
        (u64::from(self.used) * 100 / u64::from(self.ports.max(1))) as u32
    }

    /// Whether these are the ports of the same address, backend and protocol.
    pub fn is_same(&self, other: &Self) -> bool {
        (self.address, self.backend, &self.protocol)
            == (other.address, other.backend, &other.protocol)
    }
}

impl fmt::Display for PortUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, backend, protocol, used, ports } = self;
        write!(
            f,
            "backend {backend}/{protocol}: {used} of {ports} source ports of {address} are in use"
        )
    }
}
