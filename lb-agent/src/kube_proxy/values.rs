//! The types of values that are written as strings.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    time,
};

use ipnet::IpNet;
use lb_control::options::NodePortAddresses;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, Unexpected, Visitor},
};

use crate::options::values::{BindAddress, duration};

/// Parses a string; `expected` describes it in errors.
struct Text<F> {
    expected: &'static str,
    parse: F,
}

impl<T, F: Fn(&str) -> Option<T>> Visitor<'_> for Text<F> {
    type Value = T;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.expected)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
    }
}

fn text<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    expected: &'static str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<T, D::Error> {
    deserializer.deserialize_str(Text { expected, parse })
}

const DURATION: &str = "a duration such as 15m0s";

/// A duration in Go's format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd)]
pub struct Duration(pub time::Duration);

impl Duration {
    pub(super) const fn from_secs(seconds: u64) -> Self {
        Self(time::Duration::from_secs(seconds))
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanoseconds = self.0.as_nanos();
        match nanoseconds {
            0 => formatter.write_str("0s"),
            1..1_000 => write!(formatter, "{nanoseconds}ns"),
            1_000..1_000_000 => write!(formatter, "{}\u{b5}s", fraction(nanoseconds, 1_000)),
            1_000_000..1_000_000_000 => {
                write!(formatter, "{}ms", fraction(nanoseconds, 1_000_000))
            }
            _ => {
                let seconds = fraction(nanoseconds % 60_000_000_000, 1_000_000_000);
                match self.0.as_secs() / 60 {
                    0 => write!(formatter, "{seconds}s"),
                    minutes @ 1..60 => write!(formatter, "{minutes}m{seconds}s"),
                    minutes => {
                        write!(formatter, "{}h{}m{seconds}s", minutes / 60, minutes % 60)
                    }
                }
            }
        }
    }
}

/// `number / unit` as a decimal without trailing zeros.
fn fraction(number: u128, unit: u128) -> String {
    let width = unit.ilog10() as usize;
    let text = format!("{}.{:0width$}", number / unit, number % unit);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text(deserializer, DURATION, |text| duration(text).ok().map(Self))
    }
}

impl Serialize for Duration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A duration or a number of nanoseconds; it is written in the form that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum FlushFrequency {
    /// Nanoseconds.
    Nanoseconds(u64),
    /// A duration.
    Text(Duration),
}

impl Default for FlushFrequency {
    fn default() -> Self {
        Self::Nanoseconds(0)
    }
}

impl<'de> Deserialize<'de> for FlushFrequency {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = FlushFrequency;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a duration such as 5s, or a number of nanoseconds")
            }

            fn visit_u64<E: de::Error>(self, nanoseconds: u64) -> Result<FlushFrequency, E> {
                Ok(FlushFrequency::Nanoseconds(nanoseconds))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<FlushFrequency, E> {
                let parsed = duration(text).map(Duration).map(FlushFrequency::Text);
                parsed.map_err(|_| E::invalid_value(Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// A size such as `512`, `1K` or `2Ki`; it is written as it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Quantity(String);

impl Default for Quantity {
    fn default() -> Self {
        Self("0".to_owned())
    }
}

impl Quantity {
    fn parse(text: &str) -> Option<Self> {
        const UNITS: [&str; 16] =
            ["", "n", "u", "m", "k", "K", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi"];
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let is_valid = number.parse::<f64>().is_ok() && (UNITS.contains(&unit) || unit == "Ei");
        is_valid.then(|| Self(text.to_owned()))
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = Quantity;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a size such as 512 or 2Ki")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Quantity, E> {
                Ok(Quantity(bytes.to_string()))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Quantity, E> {
                Quantity::parse(text).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// The address that a server listens on; `None` if it is not set or the server is disabled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bind(pub(crate) Option<SocketAddr>);

const BIND: &str = "an address with or without a port";

impl Bind {
    pub(super) fn at(ip: IpAddr, port: u16) -> Self {
        Self(Some((ip, port).into()))
    }

    pub(super) fn healthz<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let parse = |text: &str| BindAddress::healthz(text).ok();
        text(deserializer, BIND, parse).map(|BindAddress(address)| Self(address))
    }

    pub(super) fn metrics<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let parse = |text: &str| BindAddress::metrics(text).ok();
        text(deserializer, BIND, parse).map(|BindAddress(address)| Self(address))
    }
}

impl Serialize for Bind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Some(address) => serializer.collect_str(&address),
            None => serializer.serialize_str(""),
        }
    }
}

/// kube-proxy's mode. lb only uses it to select the section whose syncPeriod applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum Mode {
    /// kube-proxy chooses the mode.
    #[default]
    #[serde(rename = "")]
    Unset,
    /// iptables.
    #[serde(rename = "iptables")]
    Iptables,
    /// IPVS.
    #[serde(rename = "ipvs")]
    Ipvs,
    /// nftables.
    #[serde(rename = "nftables")]
    Nftables,
}

impl<'de> Deserialize<'de> for Mode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text(deserializer, "iptables, ipvs or nftables", |text| {
            Some(match text {
                "" => Self::Unset,
                "iptables" => Self::Iptables,
                "ipvs" => Self::Ipvs,
                "nftables" => Self::Nftables,
                _ => return None,
            })
        })
    }
}

/// How kube-proxy recognises traffic of pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DetectLocalMode {
    /// By the pod CIDRs of the cluster.
    ClusterCidr,
    /// By the pod CIDRs of the Node.
    NodeCidr,
    /// By the bridge that it arrives on.
    BridgeInterface,
    /// By the name of the interface that it arrives on.
    InterfaceNamePrefix,
}

impl DetectLocalMode {
    const ALL: [Self; 4] =
        [Self::ClusterCidr, Self::NodeCidr, Self::BridgeInterface, Self::InterfaceNamePrefix];

    /// The name in kube-proxy.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ClusterCidr => "ClusterCIDR",
            Self::NodeCidr => "NodeCIDR",
            Self::BridgeInterface => "BridgeInterface",
            Self::InterfaceNamePrefix => "InterfaceNamePrefix",
        }
    }
}

/// A [`DetectLocalMode`]; `None` if it is not set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalMode(pub(crate) Option<DetectLocalMode>);

impl<'de> Deserialize<'de> for LocalMode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const EXPECTED: &str = "ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix";
        text(deserializer, EXPECTED, |text| match text {
            "" => Some(Self(None)),
            text => DetectLocalMode::ALL
                .into_iter()
                .find(|mode| mode.name() == text)
                .map(|mode| Self(Some(mode))),
        })
    }
}

impl Serialize for LocalMode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.map_or("", DetectLocalMode::name))
    }
}

/// The addresses that serve NodePorts; `None` if they are not set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePorts(pub(crate) Option<NodePortAddresses>);

impl<'de> Deserialize<'de> for NodePorts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let items = Vec::<NodePort>::deserialize(deserializer)?;
        let count = items.len();
        let ranges = items.into_iter().map(|NodePort(range)| range).collect::<Option<Vec<_>>>();
        match ranges {
            Some(ranges) if ranges.is_empty() => Ok(Self(None)),
            Some(ranges) => Ok(Self(Some(NodePortAddresses::Ranges(ranges)))),
            None if count == 1 => Ok(Self(Some(NodePortAddresses::Primary))),
            None => Err(de::Error::custom("primary must be alone, without CIDRs")),
        }
    }
}

impl Serialize for NodePorts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            None => serializer.serialize_none(),
            Some(NodePortAddresses::Primary) => ["primary"].serialize(serializer),
            Some(NodePortAddresses::Ranges(ranges)) => {
                serializer.collect_seq(ranges.iter().map(ToString::to_string))
            }
        }
    }
}

/// A CIDR; `None` for `primary`.
struct NodePort(Option<IpNet>);

impl<'de> Deserialize<'de> for NodePort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text(deserializer, "a CIDR or primary", |text| match text.trim() {
            "primary" => Some(Self(None)),
            text => text.parse().ok().map(|range| Self(Some(range))),
        })
    }
}

/// An address; an empty string is `None`.
pub(super) mod ip {
    use super::*;

    pub(in crate::kube_proxy) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<IpAddr>, D::Error> {
        text(deserializer, "an IP address", |text| match text {
            "" => Some(None),
            text => text.parse().ok().map(Some),
        })
    }

    pub(in crate::kube_proxy) fn serialize<S: Serializer>(
        ip: &Option<IpAddr>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match ip {
            Some(ip) => serializer.collect_str(ip),
            None => serializer.serialize_str(""),
        }
    }
}

/// CIDRs in one string, separated by commas.
pub(super) mod comma {
    use super::*;

    pub(in crate::kube_proxy) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<IpNet>, D::Error> {
        const EXPECTED: &str = "CIDRs separated by commas, such as 10.244.0.0/16,fd00::/48";
        text(deserializer, EXPECTED, |text| {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            items.map(str::parse).collect::<Result<_, _>>().ok()
        })
    }

    pub(in crate::kube_proxy) fn serialize<S: Serializer>(
        ranges: &[IpNet],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let texts: Vec<_> = ranges.iter().map(ToString::to_string).collect();
        serializer.serialize_str(&texts.join(","))
    }
}

/// Writes a number as Go does: without a decimal point if it is an integer.
pub(super) fn number<S: Serializer>(number: &f32, serializer: S) -> Result<S::Ok, S::Error> {
    if number.fract() == 0.0 && number.abs() < 1e15 {
        serializer.serialize_i64(*number as i64)
    } else {
        serializer.serialize_f32(*number)
    }
}
