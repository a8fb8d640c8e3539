//! Outcomes of first packets.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

/// A verdict on a first packet, of kube-proxy or of lb.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Decided {
    /// It goes to one of these endpoints.
    To(BTreeSet<SocketAddr>),
    /// It is rejected.
    Refused,
    /// It is dropped.
    Dropped,
    /// The call fails with EPERM.
    Denied,
    /// It goes on unchanged.
    Untouched,
}

/// The outcome of a first packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// The packet was translated to this address and port.
    To(SocketAddr, Source),
    /// The sender was rejected.
    Refused(Refusal),
    /// The sender's call failed with EPERM.
    Denied,
    /// The packet was dropped.
    Dropped,
    /// The packet went on unchanged.
    Untouched,
}

/// The source that the receiver sees.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Source {
    /// The sender.
    Kept,
    /// The node.
    Node,
}

/// How a sender is rejected.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// A TCP reset.
    Reset,
    /// ICMP: port unreachable.
    PortUnreachable,
    /// ICMP: protocol unreachable; ICMPv6 has port unreachable for it.
    ProtocolUnreachable,
    /// The call of a process of the node failed with ECONNREFUSED.
    Connection,
}

impl fmt::Display for Decided {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::To(endpoints) => {
                let each: Vec<String> = endpoints.iter().map(ToString::to_string).collect();
                write!(formatter, "to {}", each.join(" or "))
            }
            Self::Refused => formatter.write_str("refused"),
            Self::Dropped => formatter.write_str("dropped"),
            Self::Denied => formatter.write_str("denied: EPERM"),
            Self::Untouched => formatter.write_str("untouched"),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::To(to, source) => write!(formatter, "to {to} from {source}"),
            Self::Refused(refusal) => write!(formatter, "refused: {refusal}"),
            Self::Denied => formatter.write_str("denied: EPERM"),
            Self::Dropped => formatter.write_str("dropped"),
            Self::Untouched => formatter.write_str("untouched"),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Kept => "the client",
            Self::Node => "the node",
        })
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Reset => "TCP reset",
            Self::PortUnreachable => "ICMP port unreachable",
            Self::ProtocolUnreachable => "ICMP protocol unreachable",
            Self::Connection => "ECONNREFUSED",
        })
    }
}
