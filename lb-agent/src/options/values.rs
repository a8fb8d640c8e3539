//! The types of flags' values.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
    time::Duration,
};

/// Interfaces, chosen by the agent or by name patterns with `*` and `?`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Patterns {
    /// Chosen by the agent.
    Auto,
    /// Interfaces whose name matches one of the patterns.
    Named(Vec<String>),
}

impl Patterns {
    /// Whether one of the patterns matches `name`; `None` for [`Self::Auto`].
    pub fn matches(&self, name: &str) -> Option<bool> {
        match self {
            Self::Auto => None,
            Self::Named(patterns) => Some(
                patterns.iter().any(|pattern| pattern_matches(pattern.as_bytes(), name.as_bytes())),
            ),
        }
    }
}

impl FromStr for Patterns {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim() == "auto" {
            return Ok(Self::Auto);
        }
        let names: Vec<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
        if names.iter().any(String::is_empty) {
            return Err("expected auto, or names separated by commas".to_owned());
        }
        Ok(Self::Named(names))
    }
}

fn pattern_matches(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), None) => pattern_matches(rest, name),
        (Some((b'*', rest)), Some((_, shorter))) => {
            pattern_matches(rest, name) || pattern_matches(pattern, shorter)
        }
        (Some((b'?', pattern)), Some((_, name))) => pattern_matches(pattern, name),
        (Some((wanted, pattern)), Some((found, name))) => {
            wanted == found && pattern_matches(pattern, name)
        }
        (None, Some(_)) | (Some(_), None) => false,
    }
}

/// The default port of the health server.
pub const HEALTHZ_PORT: u16 = 10256;
/// The default port of the metrics server.
pub const METRICS_PORT: u16 = 10249;

/// The address that a server listens on; `None` if the server is disabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BindAddress(pub Option<SocketAddr>);

impl BindAddress {
    /// Parses the address of the health server; an address without a port gets
    /// [`HEALTHZ_PORT`].
    ///
    /// # Errors
    /// If `text` is not an address.
    pub fn healthz(text: &str) -> Result<Self, String> {
        Self::parse(text, HEALTHZ_PORT)
    }

    /// Parses the address of the metrics server; an address without a port gets
    /// [`METRICS_PORT`].
    ///
    /// # Errors
    /// If `text` is not an address.
    pub fn metrics(text: &str) -> Result<Self, String> {
        Self::parse(text, METRICS_PORT)
    }

    fn parse(text: &str, default_port: u16) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self(None));
        }
        if let Some(port) = text.strip_prefix(':').and_then(|port| port.parse().ok()) {
            return Ok(Self(Some((Ipv4Addr::UNSPECIFIED, port).into())));
        }
        socket_or_address(text, default_port).map(|address| Self(Some(address)))
    }
}

/// Parses `address:port`, or an address without a port, which gets `default_port`.
///
/// # Errors
/// If `text` is neither.
pub fn socket_or_address(text: &str, default_port: u16) -> Result<SocketAddr, String> {
    if let Ok(socket) = text.parse() {
        return Ok(socket);
    }
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    match bare.parse::<IpAddr>() {
        Ok(address) => Ok((address, default_port).into()),
        Err(_) => Err(format!("{text:?} is not an IP address, with or without a port")),
    }
}

/// The destination of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Address and port; port 0 for ICMP.
    pub address: SocketAddr,
    /// The protocol.
    pub protocol: Protocol,
}

/// A Service, or a port of one, as `get` names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePattern(String);

impl ServicePattern {
    /// Whether the service port `name`, `namespace/service:port`, is meant.
    pub fn matches(&self, name: &str) -> bool {
        name.strip_prefix(&self.0).is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
    }
}

impl FromStr for ServicePattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, service)) if !namespace.is_empty() && !service.is_empty() => {
                Ok(Self(text.to_owned()))
            }
            _ => Err(format!("{text:?} is not a Service such as default/kubernetes:https")),
        }
    }
}

/// The protocols that `explain` supports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, protocol) = text.rsplit_once('/').unwrap_or((text, "tcp"));
        let address = address.parse().map_err(|_| {
            format!("{address:?} is not an address with a port, e.g. 10.96.0.1:443")
        })?;
        let protocol = match protocol.to_ascii_lowercase().as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(format!("protocol {protocol:?} is neither tcp nor udp")),
        };
        Ok(Self { address, protocol })
    }
}

/// Parses a boolean as Go does.
///
/// # Errors
/// If `text` is not a boolean.
pub fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "True" | "TRUE" => Ok(true),
        "0" | "f" | "F" | "false" | "False" | "FALSE" => Ok(false),
        _ => Err(format!("{text:?} is neither true nor false")),
    }
}

/// Parses a duration as Go writes it: `90s`, `1h30m`, `1.5s`, `500ms`, `0`.
///
/// # Errors
/// If `text` is not a duration.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration such as 90s or 1h30m");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let (number, after) = rest.split_at(digits);
        let unit_length =
            after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_length);
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "\u{b5}s" => 1e-6,
            "ns" => 1e-9,
            _ => return Err(wrong()),
        };
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let part = Duration::try_from_secs_f64(number * seconds).map_err(|_| wrong())?;
        total = total.checked_add(part).ok_or_else(wrong)?;
        rest = after;
    }
    if text.is_empty() { Err(wrong()) } else { Ok(total) }
}
