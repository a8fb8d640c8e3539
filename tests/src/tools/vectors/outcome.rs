//! What became of a first packet.

use std::fmt;
use std::net::SocketAddr;

/// What became of a first packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It went to another address and port.
    To(SocketAddr, Source),
    /// Its sender was told that there is nobody.
    Refused(Refusal),
    /// Its sender was told that it may not (EPERM).
    Denied,
    /// It is gone.
    Dropped,
    /// It went on as it came.
    Untouched,
}

/// Whom the receiver sees as the sender.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Source {
    /// The sender.
    Kept,
    /// The node.
    Node,
}

/// How a sender is told that there is nobody.
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
