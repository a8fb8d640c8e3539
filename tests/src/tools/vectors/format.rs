//! The form of a flow-vector file. An unknown field is an error and never skipped: a flow that is
//! read wrongly would pass or fail for the wrong reason.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// A file of vectors.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct File {
    /// Which kube-proxy gave the answers.
    #[serde(default)]
    pub kubernetes_version: Option<String>,
    /// The licence of the data.
    #[serde(default)]
    pub license: Option<String>,
    /// Remarks for readers.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Objects with flows.
    #[serde(default)]
    pub groups: Vec<Group>,
    /// Endpoint selections.
    #[serde(default)]
    pub endpoint_selection: Vec<Selection>,
}

/// Objects, the node that sees them, and flows.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Group {
    /// Names the group in reports.
    pub id: String,
    /// Which kind of kube-proxy gave the answers.
    pub proxier: Proxier,
    /// The source file that it was taken from.
    #[serde(default)]
    pub test: Option<String>,
    /// The place in that file.
    #[serde(default)]
    pub source: Option<Value>,
    /// The node.
    pub node: Node,
    /// Services.
    #[serde(default, deserialize_with = "objects")]
    pub services: Vec<Service>,
    /// EndpointSlices.
    #[serde(default, deserialize_with = "objects")]
    pub endpoint_slices: Vec<EndpointSlice>,
    /// First packets.
    #[serde(default)]
    pub flows: Vec<Flow>,
}

/// A kind of kube-proxy.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum Proxier {
    /// iptables.
    Iptables,
    /// IPVS.
    Ipvs,
    /// nftables.
    Nftables,
}

/// The node that the proxy runs on, and how it is configured.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// The family that kube-proxy's answers are of; lb serves both at once.
    pub ip_family: Family,
    /// Its first InternalIP.
    #[serde(rename = "primaryIP")]
    pub primary_ip: IpAddr,
    /// All its addresses, without those of loopback.
    #[serde(rename = "localIPs")]
    pub local_ips: Vec<IpAddr>,
    /// The prefixes of its pods.
    #[serde(default, rename = "podCIDR")]
    pub pod_cidr: List<IpNet>,
    /// How pods are recognised, as a match of kube-proxy's rules.
    #[serde(default)]
    pub detect_local: DetectLocal,
    /// Labels of the Node.
    #[serde(default)]
    pub topology_labels: Option<BTreeMap<String, String>>,
    /// Where node ports are served; none: by default.
    #[serde(default)]
    pub node_port_addresses: List<IpNet>,
    /// Whether node ports are served on 127.0.0.1; by default they are.
    #[serde(default)]
    pub localhost_node_ports: Option<bool>,
    /// `--masquerade-all`.
    #[serde(default)]
    pub masquerade_all: Option<bool>,
    /// The prefixes of ClusterIPs.
    #[serde(default, rename = "serviceCIDRs")]
    pub service_cidrs: List<IpNet>,
}

/// An address family.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
pub enum Family {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
}

/// A first packet and what kube-proxy does with it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Flow {
    /// Its name in reports. It has no effect.
    pub name: String,
    /// The sender.
    #[serde(rename = "sourceIP")]
    pub source_ip: IpAddr,
    /// TCP by default.
    #[serde(default)]
    pub protocol: Protocol,
    /// The receiver.
    #[serde(rename = "destIP")]
    pub dest_ip: IpAddr,
    /// The receiver's port.
    #[serde(default)]
    pub dest_port: u16,
    /// kube-proxy's answer.
    pub expect: Answer,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// What kube-proxy does with a packet.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Answer {
    /// The verdict.
    pub result: Verdict,
    /// Where it may go to, as `IP:PORT`.
    #[serde(default)]
    pub dnat: Option<Vec<std::net::SocketAddr>>,
    /// Whether it gets the node's address as its source.
    #[serde(default)]
    pub masquerade: bool,
}

/// What kube-proxy does with a packet.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    /// It goes to one of the endpoints.
    Dnat,
    /// It is answered with an error.
    Reject,
    /// It is dropped.
    Drop,
    /// It goes on unchanged.
    Accept,
    /// No rule touches it.
    None,
}

impl Verdict {
    /// The same verdict by one name: an accepted packet goes on unchanged.
    pub fn settled(self) -> Self {
        if self == Self::Accept { Self::None } else { self }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Dnat => "DNAT",
            Self::Reject => "REJECT",
            Self::Drop => "DROP",
            Self::Accept => "ACCEPT",
            Self::None => "NONE",
        })
    }
}

/// An endpoint selection.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selection {
    /// Its name in reports.
    pub name: String,
    /// The node's name.
    #[serde(default)]
    pub node_name: String,
    /// Its labels.
    #[serde(default)]
    pub node_labels: Option<BTreeMap<String, String>>,
    /// Whether node hints are read.
    #[serde(default)]
    pub prefer_same_traffic_distribution_enabled: bool,
    /// The Service.
    pub service: Traits,
    /// Its endpoints.
    #[serde(default)]
    pub endpoints: Vec<Candidate>,
    /// What kube-proxy chooses.
    pub expect: Chosen,
}

/// The traits of a Service that matter for the selection.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Traits {
    /// `externalTrafficPolicy: Local`.
    #[serde(default)]
    pub external_traffic_policy_local: bool,
    /// `internalTrafficPolicy: Local`.
    #[serde(default)]
    pub internal_traffic_policy_local: bool,
    /// Whether clients outside reach it.
    #[serde(default)]
    pub externally_accessible: bool,
    /// The port of its health check.
    #[serde(default)]
    pub health_check_node_port: u16,
    /// Its node port.
    #[serde(default)]
    pub node_port: u16,
    /// Whether any client gets the endpoints of the cluster.
    pub uses_cluster_endpoints: bool,
    /// Whether any client gets only the endpoints of the node.
    pub uses_local_endpoints: bool,
}

/// An endpoint to choose from.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Candidate {
    /// Its address and port.
    pub endpoint: std::net::SocketAddr,
    /// Nodes that it is for.
    #[serde(default)]
    pub for_nodes: Option<Vec<Box<str>>>,
    /// Zones that it is for.
    #[serde(default)]
    pub for_zones: Option<Vec<Box<str>>>,
    /// Whether it is on this node.
    #[serde(default)]
    pub is_local: bool,
    /// A condition.
    #[serde(default)]
    pub ready: bool,
    /// A condition.
    #[serde(default)]
    pub serving: bool,
    /// A condition.
    #[serde(default)]
    pub terminating: bool,
}

/// The endpoints that kube-proxy selects; none if it makes no such selection.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Chosen {
    /// For clients of the cluster.
    #[serde(default)]
    pub cluster_endpoints: Option<Vec<std::net::SocketAddr>>,
    /// For those of a `Local` policy.
    #[serde(default)]
    pub local_endpoints: Option<Vec<std::net::SocketAddr>>,
    /// Both.
    #[serde(default)]
    pub all_locally_reachable_endpoints: Option<Vec<std::net::SocketAddr>>,
    /// Whether any endpoint serves anywhere.
    pub has_any_endpoints: bool,
}

/// How kube-proxy recognises pods.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum DetectLocal {
    /// Not at all.
    #[default]
    Nohow,
    /// By their addresses.
    Prefix(IpNet),
    /// By the interface that they come from.
    Interface,
}

impl<'de> Deserialize<'de> for DetectLocal {
    /// Reads a match of iptables (`-s PREFIX`, `-i NAME`) or nftables (`ip saddr PREFIX`,
    /// `iifname NAME`).
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?.unwrap_or_default();
        let words: Vec<&str> = text.split_whitespace().collect();
        match words[..] {
            [] => Ok(Self::Nohow),
            ["-s", prefix] | ["ip" | "ip6", "saddr", prefix] => {
                prefix.parse().map(Self::Prefix).map_err(D::Error::custom)
            }
            ["-i", _] | ["iif" | "iifname", _] => Ok(Self::Interface),
            _ => Err(D::Error::custom(format!("detectLocal {text:?} is of no known form"))),
        }
    }
}

/// A list that may be written as an array, as words (`[a b]`, `a,b`), or as null.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct List<T>(pub Vec<T>);

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: std::str::FromStr<Err: fmt::Display>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Words(String),
            Array(Vec<String>),
        }
        let words = match Option::<Form>::deserialize(deserializer)? {
            None => Vec::new(),
            Some(Form::Array(words)) => words,
            Some(Form::Words(text)) => {
                let separators = [' ', ',', '[', ']'];
                text.split(separators).filter(|word| !word.is_empty()).map(str::to_owned).collect()
            }
        };
        let parse = |word: &String| {
            word.parse().map_err(|error| D::Error::custom(format!("{word:?}: {error}")))
        };
        words.iter().map(parse).collect::<Result<_, _>>().map(Self)
    }
}

/// Kubernetes objects, each with only fields that its type has.
fn objects<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned + serde::Serialize,
{
    let values = Option::<Vec<Value>>::deserialize(deserializer)?.unwrap_or_default();
    let read = |value: Value| {
        let object: T = serde_json::from_value(value.clone()).map_err(D::Error::custom)?;
        let known = serde_json::to_value(&object).map_err(D::Error::custom)?;
        match unknown(&value, &known, String::new()) {
            Some(path) => Err(D::Error::custom(format!("unknown field {path}"))),
            None => Ok(object),
        }
    };
    values.into_iter().map(read).collect()
}

/// The path of a field that the type does not have.
fn unknown(given: &Value, read: &Value, path: String) -> Option<String> {
    match (given, read) {
        (Value::Object(given), Value::Object(read)) => {
            given.iter().filter(|(_, value)| !value.is_null()).find_map(|(name, value)| {
                let path = format!("{path}.{name}");
                match read.get(name) {
                    Some(read) => unknown(value, read, path),
                    None => Some(path),
                }
            })
        }
        (Value::Array(given), Value::Array(read)) => {
            let pairs = given.iter().zip(read).enumerate();
            pairs
                .into_iter()
                .find_map(|(index, (given, read))| unknown(given, read, format!("{path}[{index}]")))
        }
        _ => None,
    }
}

impl File {
    /// Reads a file.
    ///
    /// # Errors
    /// It is not JSON of this form, or has no case.
    pub fn read(path: &std::path::Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let file: Self = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a file of flow vectors", path.display()))?;
        if file.groups.iter().all(|group| group.flows.is_empty())
            && file.endpoint_selection.is_empty()
        {
            bail!("{} has neither flows nor endpoint selections", path.display());
        }
        Ok(file)
    }

    /// All flows, with their groups.
    pub fn flows(&self) -> impl Iterator<Item = (&Group, &Flow)> {
        self.groups.iter().flat_map(|group| group.flows.iter().map(move |flow| (group, flow)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(change: impl FnOnce(&mut Value)) -> Result<Group, serde_json::Error> {
        let mut value = serde_json::json!({
            "id": "a", "proxier": "iptables", "test": "t",
            "node": {
                "name": "n", "ipFamily": "IPv4", "primaryIP": "192.0.2.1",
                "localIPs": ["192.0.2.1"], "podCIDR": null, "detectLocal": "-s 10.0.0.0/8",
                "nodePortAddresses": "[0.0.0.0/0 192.0.2.0/24]",
            },
            "services": [{
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"},
                "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]},
            }],
            "flows": [{
                "name": "f", "sourceIP": "10.0.0.1", "destIP": "10.96.0.1", "destPort": 80,
                "expect": {"result": "DNAT", "dnat": ["10.0.0.2:80"], "masquerade": false},
            }],
        });
        change(&mut value);
        serde_json::from_value(value)
    }

    #[test]
    fn lists_and_matches_are_read_in_every_form() {
        let read = group(|_| ()).expect("a good group");
        assert_eq!(read.node.node_port_addresses.0.len(), 2);
        assert_eq!(read.node.pod_cidr.0, []);
        let prefix = "10.0.0.0/8".parse().expect("a prefix");
        assert_eq!(read.node.detect_local, DetectLocal::Prefix(prefix));
        for (text, expected) in [
            ("ip saddr 10.0.0.0/8", DetectLocal::Prefix(prefix)),
            ("iifname cbr0", DetectLocal::Interface),
            ("", DetectLocal::Nohow),
        ] {
            let read = group(|value| value["node"]["detectLocal"] = text.into());
            assert_eq!(read.expect("a good group").node.detect_local, expected);
        }
        let array = serde_json::json!(["10.96.0.0/16", "fd00::/112"]);
        let read = group(|value| value["node"]["serviceCIDRs"] = array);
        assert_eq!(read.expect("a good group").node.service_cidrs.0.len(), 2);
    }

    #[test]
    fn what_is_not_known_is_an_error() {
        type Change = fn(&mut Value);
        let changes: [(Change, &str); 7] = [
            (|value| value["more"] = 1.into(), "more"),
            (|value| value["node"]["zone"] = "a".into(), "zone"),
            (|value| value["proxier"] = "userspace".into(), "userspace"),
            (|value| value["flows"][0]["protocol"] = "ICMP".into(), "ICMP"),
            (|value| value["flows"][0]["expect"]["result"] = "MAYBE".into(), "MAYBE"),
            (|value| value["node"]["detectLocal"] = "-m mark 1".into(), "detectLocal"),
            (|value| value["services"][0]["spec"]["ports"][0]["mode"] = 1.into(), "ports[0].mode"),
        ];
        for (change, named) in changes {
            let error = group(change).expect_err("an unknown field or form").to_string();
            assert!(error.contains(named), "{named}: {error}");
        }
    }
}
