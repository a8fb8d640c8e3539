//! Kubernetes objects as small validated types.
//!
//! Every object is validated here, once; the rest of the crate relies on it. Fields that an
//! API server would have defaulted may be missing. A bad part never costs the rest of the
//! object: a bad port or endpoint is left out and becomes a [`Refusal`], the others stay.

pub mod event;
pub mod keys;
pub mod network;
pub mod node;
mod refusal;
pub mod service;
pub mod slice;
pub mod source_ports;
pub mod text;

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use lb_common::abi::frontend;

use event::ObjectName;
use refusal::Refusals;
pub use refusal::{MAX_REFUSALS, Refusal, RefusalReason, add_some};
use text::Quoted;

/// A transport protocol that lb balances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// The protocol's number in an IP header.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => frontend::TCP,
            Self::Udp => frontend::UDP,
        }
    }

    /// Reads the `protocol` field of a port; absent or empty means TCP.
    fn parse(text: Option<&str>) -> Option<Self> {
        match text {
            None | Some("" | "TCP") => Some(Self::Tcp),
            Some("UDP") => Some(Self::Udp),
            Some(_) => None,
        }
    }
}

/// IPv4 or IPv6, as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpFamily {
    /// Both, for loops.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// As Kubernetes spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// The unspecified address, `0.0.0.0` or `::`.
    pub fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }

    /// 4 or 6.
    pub fn number(self) -> u8 {
        match self {
            Self::V4 => 4,
            Self::V6 => 6,
        }
    }
}

/// The result of parsing an object.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed<T> {
    /// The object; none if it is not for a proxy, or if it is wrong as a whole.
    pub value: Option<T>,
    /// The parts that were left out.
    pub refusals: Vec<Refusal>,
}

/// Names that many objects share, each in memory once.
#[derive(Debug, Default)]
pub struct SharedNames {
    names: HashSet<Arc<str>>,
}

impl SharedNames {
    /// The name, shared with all objects that have it.
    pub fn share(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.names.get(name) {
            return Arc::clone(known);
        }
        let new: Arc<str> = name.into();
        self.names.insert(Arc::clone(&new));
        new
    }

    /// Each name, and how often it is shared.
    pub fn shared(&self) -> impl Iterator<Item = (&Arc<str>, usize)> {
        self.names.iter().map(|name| (name, Arc::strong_count(name) - 1))
    }

    /// Drops the names that no object has any more.
    pub fn forget_unused(&mut self) {
        self.names.retain(|name| Arc::strong_count(name) > 1);
    }
}

/// Namespace and name of an object; an absent namespace is `default`.
pub fn object_name(metadata: &ObjectMeta) -> ObjectName {
    let namespace = match metadata.namespace.as_deref() {
        None | Some("") => "default",
        Some(namespace) => namespace,
    };
    ObjectName { namespace: namespace.to_owned(), name: metadata.name.clone().unwrap_or_default() }
}

/// Whether `text` can be part of a service port's name: not empty, at most 63 bytes,
/// and free of the separators.
fn is_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

/// Reads an address that packets can be sent to.
fn parse_address(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr =
        text.parse().map_err(|_| format!("{} is not an IP address", Quoted(text)))?;
    let why = if address.is_unspecified() {
        "the unspecified address"
    } else if address.is_loopback() {
        "a loopback address"
    } else if address.is_multicast() {
        "a multicast address"
    } else if matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some()) {
        "an IPv4 address in IPv6 form"
    } else {
        return Ok(address);
    };
    Err(format!("{} is {why}", Quoted(text)))
}

/// Reads a port number.
fn parse_port(number: i32) -> Result<u16, String> {
    u16::try_from(number)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| format!("{number} is not a port number (1 to 65535)"))
}
