//! Services.

mod outside;
mod size;

use std::{net::IpAddr, num::NonZeroU16, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::{
    api::core::v1::{self, ServiceSpec},
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};

use super::{
    IpFamily, Parsed, Protocol, RefusalReason, Refusals, event::ObjectKind, is_label,
    keys::PROXY_NAME_LABEL, parse_address, parse_port, text::Quoted,
};
use crate::options::{ExternalMode, Limits};

/// `sessionAffinityConfig.clientIP.timeoutSeconds` where it is not set.
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;

/// The longest affinity that an API server accepts: a day.
const MAX_AFFINITY_SECONDS: i32 = 86_400;

/// A Service that has frontends.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// `namespace/name`.
    pub name: Arc<str>,
    /// The object's identity; empty if unknown.
    pub uid: Box<str>,
    /// When it was created, if known.
    pub created: Option<Timestamp>,
    /// At most one address of each family.
    pub cluster_ips: Vec<IpAddr>,
    /// The ports; no two have the same name and protocol, or number and protocol, or node
    /// port and protocol.
    pub ports: Vec<Port>,
    /// The load balancer's addresses that are served here.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// `loadBalancerSourceRanges`, of either family.
    pub source_ranges: Vec<IpNet>,
    /// Seconds of session affinity by client; 0 = none.
    pub affinity_seconds: u32,
    /// Its traffic policies.
    pub policy: Policy,
    /// How clients outside reach backends on other nodes, if the Service says it.
    pub external_mode: Option<ExternalMode>,
    /// The port of its health check server, if it needs one.
    pub health_check_node_port: Option<u16>,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The name; may be empty.
    pub name: Box<str>,
    /// The port that clients connect to.
    pub number: u16,
    /// The protocol.
    pub protocol: Protocol,
    /// The port of every node that leads here.
    pub node_port: Option<NonZeroU16>,
}

/// The policies that decide which sets of endpoints a Service needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// It has a node port, a load balancer's address or an external IP.
    pub externally_reachable: bool,
}

impl Policy {
    /// Whether clients may get any endpoint of the cluster.
    pub fn uses_cluster_set(self) -> bool {
        !self.internal_local || self.externally_reachable
    }

    /// Whether some clients get endpoints of this node only: by a policy, or because another
    /// node has encapsulated their packets and sent them here.
    pub fn uses_local_set(self) -> bool {
        self.internal_local || self.externally_reachable
    }
}

/// Reads a Service. A headless Service, an ExternalName, and a Service of another proxy give
/// neither a value nor a refusal.
///
/// A Service that asks for more than the limits is refused as a whole, before anything is made of
/// its lists: the cost of such an object is that of its length.
pub fn parse(service: &v1::Service, limits: &Limits) -> Parsed<Service> {
    let mut refusals = Refusals::new(ObjectKind::Service, &service.metadata);
    let value = parse_into(service, limits, &mut refusals);
    Parsed { value, refusals: refusals.into_list() }
}

fn parse_into(
    service: &v1::Service,
    limits: &Limits,
    refusals: &mut Refusals<'_>,
) -> Option<Service> {
    let metadata = &service.metadata;
    let spec = service.spec.as_ref()?;
    let is_foreign = PROXY_NAME_LABEL.label(metadata).is_some();
    if is_foreign || spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    let addresses = cluster_ip_texts(spec);
    if addresses.is_empty() {
        return None;
    }
    let object = super::object_name(metadata);
    for (field, text) in [("namespace", &object.namespace), ("name", &object.name)] {
        if !is_label(text) {
            refusals.add(
                RefusalReason::InvalidName,
                format!("metadata.{field}"),
                format!("{} is not a DNS label", Quoted(text)),
            );
            return None;
        }
    }
    size::check_lists(service, spec, limits, refusals)?;
    let (ports, mut policy) = (ports(spec, refusals), policy(spec, refusals));
    let outside = outside::read(service, spec, refusals);
    policy.externally_reachable = !outside.load_balancer_ips.is_empty()
        || !outside.external_ips.is_empty()
        || ports.iter().any(|port| port.node_port.is_some());
    let service = Service {
        name: format!("{}/{}", object.namespace, object.name).into(),
        uid: metadata.uid.clone().unwrap_or_default().into(),
        created: metadata.creation_timestamp.as_ref().map(|Time(time)| *time),
        cluster_ips: cluster_ips(&addresses, refusals),
        ports,
        load_balancer_ips: outside.load_balancer_ips,
        external_ips: outside.external_ips,
        source_ranges: outside.source_ranges,
        affinity_seconds: affinity_seconds(spec, refusals),
        policy,
        external_mode: outside.mode,
        health_check_node_port: health_check_node_port(spec, refusals),
    };
    size::check_frontends(&service, limits, refusals)?;
    Some(service)
}

/// The ClusterIPs with their field paths; empty for a headless Service.
fn cluster_ip_texts(spec: &ServiceSpec) -> Vec<(String, &str)> {
    let list = spec.cluster_ips.as_deref().unwrap_or_default();
    let texts: Vec<_> = if list.is_empty() {
        let single = spec.cluster_ip.as_deref().unwrap_or_default();
        vec![("spec.clusterIP".to_owned(), single)]
    } else {
        let path = |index| format!("spec.clusterIPs[{index}]");
        list.iter().enumerate().map(|(index, text)| (path(index), text.as_str())).collect()
    };
    if spec.cluster_ip.as_deref() == Some("None") {
        return Vec::new();
    }
    texts.into_iter().filter(|(_, text)| !matches!(*text, "" | "None")).collect()
}

fn cluster_ips(texts: &[(String, &str)], refusals: &mut Refusals<'_>) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::with_capacity(texts.len());
    for (field, text) in texts {
        match parse_address(text) {
            Err(message) => refusals.add(RefusalReason::InvalidAddress, field, message),
            Ok(address) => {
                let family = IpFamily::of(address);
                if addresses.iter().any(|other| IpFamily::of(*other) == family) {
                    let message =
                        format!("{address} is a second ClusterIP of IPv{}", family.number());
                    refusals.add(RefusalReason::Duplicate, field, message);
                } else {
                    addresses.push(address);
                }
            }
        }
    }
    addresses
}

fn ports(spec: &ServiceSpec, refusals: &mut Refusals<'_>) -> Vec<Port> {
    let list = spec.ports.as_deref().unwrap_or_default();
    let mut ports: Vec<Port> = Vec::with_capacity(list.len());
    let mut names = std::collections::HashSet::new();
    let mut numbers = std::collections::HashSet::new();
    let mut node_ports = std::collections::HashSet::new();
    for (index, port) in list.iter().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        let Some(protocol) = Protocol::parse(port.protocol.as_deref()) else {
            let text = port.protocol.as_deref().unwrap_or_default();
            refusals.add(
                RefusalReason::UnsupportedProtocol,
                field("protocol"),
                format!("protocol {} is not supported, only TCP and UDP are", Quoted(text)),
            );
            continue;
        };
        let number = match parse_port(port.port) {
            Ok(number) => number,
            Err(message) => {
                refusals.add(RefusalReason::InvalidPort, field("port"), message);
                continue;
            }
        };
        let name = port.name.as_deref().unwrap_or_default();
        if !name.is_empty() && !is_label(name) {
            refusals.add(
                RefusalReason::InvalidName,
                field("name"),
                format!("{} is not a port name", Quoted(name)),
            );
            continue;
        }
        if names.contains(&(name, protocol)) {
            refusals.add(
                RefusalReason::Duplicate,
                field("name"),
                format!("{} is the name of an earlier port of the same protocol", Quoted(name)),
            );
            continue;
        }
        if !numbers.insert((number, protocol)) {
            refusals.add(
                RefusalReason::Duplicate,
                field("port"),
                format!("{number} is the number of an earlier port of the same protocol"),
            );
            continue;
        }
        names.insert((name, protocol));
        let node_port = node_port(port.node_port).and_then(|number| match number {
            Some(number) if !node_ports.insert((number, protocol)) => {
                let message =
                    format!("{number} is the node port of an earlier port of the same protocol");
                Err((RefusalReason::Duplicate, message))
            }
            number => Ok(number),
        });
        let node_port = node_port.unwrap_or_else(|(reason, message)| {
            refusals.add(reason, field("nodePort"), message);
            None
        });
        ports.push(Port { name: name.into(), number, protocol, node_port });
    }
    ports
}

/// Reads a node port; 0 means none.
fn node_port(number: Option<i32>) -> Result<Option<NonZeroU16>, (RefusalReason, String)> {
    match number {
        None | Some(0) => Ok(None),
        Some(number) => match parse_port(number) {
            Ok(number) => Ok(NonZeroU16::new(number)),
            Err(message) => Err((RefusalReason::InvalidPort, message)),
        },
    }
}

fn affinity_seconds(spec: &ServiceSpec, refusals: &mut Refusals<'_>) -> u32 {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return 0,
        Some("ClientIP") => {}
        Some(text) => {
            refusals.add(
                RefusalReason::UnknownValue,
                "spec.sessionAffinity",
                format!("{} is neither None nor ClientIP", Quoted(text)),
            );
            return 0;
        }
    }
    let timeout = spec
        .session_affinity_config
        .as_ref()
        .and_then(|config| config.client_ip.as_ref())
        .and_then(|client_ip| client_ip.timeout_seconds);
    match timeout {
        None => DEFAULT_AFFINITY_SECONDS,
        Some(seconds) if (1..=MAX_AFFINITY_SECONDS).contains(&seconds) => seconds.unsigned_abs(),
        Some(seconds) => {
            refusals.add(
                RefusalReason::OutOfRange,
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                format!(
                    "{seconds} is not between 1 and {MAX_AFFINITY_SECONDS}; \
                     {DEFAULT_AFFINITY_SECONDS} is used"
                ),
            );
            DEFAULT_AFFINITY_SECONDS
        }
    }
}

/// Reads the policies, without [`Policy::externally_reachable`].
fn policy(spec: &ServiceSpec, refusals: &mut Refusals<'_>) -> Policy {
    let mut is_local = |field: &str, text: Option<&str>| match text {
        None | Some("" | "Cluster") => false,
        Some("Local") => true,
        Some(text) => {
            refusals.add(
                RefusalReason::UnknownValue,
                format!("spec.{field}"),
                format!("{} is neither Cluster nor Local; Cluster is used", Quoted(text)),
            );
            false
        }
    };
    Policy {
        internal_local: is_local("internalTrafficPolicy", spec.internal_traffic_policy.as_deref()),
        external_local: is_local("externalTrafficPolicy", spec.external_traffic_policy.as_deref()),
        externally_reachable: false,
    }
}

/// The health check port. Only load balancers with `externalTrafficPolicy: Local` use one, to
/// find the nodes that have endpoints.
fn health_check_node_port(spec: &ServiceSpec, refusals: &mut Refusals<'_>) -> Option<u16> {
    let is_asked_for = spec.type_.as_deref() == Some("LoadBalancer")
        && spec.external_traffic_policy.as_deref() == Some("Local");
    let number = spec.health_check_node_port.filter(|number| is_asked_for && *number != 0)?;
    let refuse = |message| {
        refusals.add(RefusalReason::InvalidPort, "spec.healthCheckNodePort", message);
    };
    parse_port(number).map_err(refuse).ok()
}

#[cfg(test)]
mod tests;
