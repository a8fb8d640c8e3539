//! Nodes and ServiceCIDRs.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::{core::v1, networking::v1::ServiceCIDR};

use super::{Parsed, Refusals};
use crate::watch::Kind;

/// The label that names a node's zone.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// What matters of a Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// The zone; absent or empty means that no hint names it.
    pub zone: Option<Box<str>>,
    /// InternalIP and ExternalIP addresses, in the object's order.
    pub addresses: Vec<IpAddr>,
    /// The InternalIP addresses among them.
    pub internal_ips: Vec<IpAddr>,
}

/// Reads a Node.
pub fn parse(node: &v1::Node) -> Parsed<Node> {
    let mut refusals = Refusals::new(Kind::Node, &node.metadata);
    let zone = node.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE_LABEL));
    let list = node.status.as_ref().and_then(|status| status.addresses.as_deref());
    let (mut addresses, mut internal_ips) = (Vec::new(), Vec::new());
    for (index, address) in list.unwrap_or_default().iter().enumerate() {
        if !matches!(address.type_.as_str(), "InternalIP" | "ExternalIP") {
            continue;
        }
        match super::parse_address(&address.address) {
            Ok(ip) => {
                addresses.push(ip);
                internal_ips.extend((address.type_ == "InternalIP").then_some(ip));
            }
            Err(message) => refusals.add(format!("status.addresses[{index}].address"), message),
        }
    }
    let zone = zone.filter(|zone| !zone.is_empty()).map(|zone| zone.as_str().into());
    Parsed { value: Some(Node { zone, addresses, internal_ips }), refusals: refusals.list }
}

/// Reads the prefixes of a ServiceCIDR.
pub fn parse_service_cidr(object: &ServiceCIDR) -> Parsed<Vec<IpNet>> {
    let mut refusals = Refusals::new(Kind::ServiceCidr, &object.metadata);
    let list = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
    let mut prefixes = Vec::with_capacity(list.len());
    for (index, text) in list.iter().enumerate() {
        match text.parse::<IpNet>() {
            Ok(prefix) => prefixes.push(prefix.trunc()),
            Err(_) => refusals
                .add(format!("spec.cidrs[{index}]"), format!("\"{text}\" is not an IP prefix")),
        }
    }
    Parsed { value: Some(prefixes), refusals: refusals.list }
}
