//! Nodes and ServiceCIDRs.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::{core::v1, networking::v1::ServiceCIDR};

use super::{
    IpFamily, Parsed, RefusalReason, Refusals, event::ObjectKind, keys::ZONE_LABEL, text::Quoted,
};

/// The parts of a Node that decisions need.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// The zone; absent or empty means that no hint names it.
    pub zone: Option<Box<str>>,
    /// Its addresses.
    pub addresses: NodeAddresses,
    /// The prefixes of its pods' addresses, in order.
    pub pod_cidrs: Vec<IpNet>,
}

/// The addresses of a Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeAddresses {
    /// InternalIP and ExternalIP addresses, in the object's order.
    pub all: Vec<IpAddr>,
    /// The InternalIP addresses among them.
    pub internal: Vec<IpAddr>,
}

impl NodeAddresses {
    /// The address of a family at which other nodes reach it.
    pub fn internal_ip(&self, family: IpFamily) -> Option<IpAddr> {
        self.internal.iter().copied().find(|ip| IpFamily::of(*ip) == family)
    }
}

/// Reads a Node.
pub fn parse(node: &v1::Node) -> Parsed<Node> {
    let mut refusals = Refusals::new(ObjectKind::Node, &node.metadata);
    let zone = ZONE_LABEL.label(&node.metadata).filter(|zone| !zone.is_empty());
    let list = node.status.as_ref().and_then(|status| status.addresses.as_deref());
    let mut addresses = NodeAddresses::default();
    for (index, address) in list.unwrap_or_default().iter().enumerate() {
        if !matches!(address.type_.as_str(), "InternalIP" | "ExternalIP") {
            continue;
        }
        match super::parse_address(&address.address) {
            Ok(ip) => {
                addresses.all.push(ip);
                addresses.internal.extend((address.type_ == "InternalIP").then_some(ip));
            }
            Err(message) => refusals.add(
                RefusalReason::InvalidAddress,
                format!("status.addresses[{index}].address"),
                message,
            ),
        }
    }
    let pod_cidrs = pod_cidrs(node, &mut refusals);
    Parsed {
        value: Some(Node { zone: zone.map(Into::into), addresses, pod_cidrs }),
        refusals: refusals.into_list(),
    }
}

/// Reads the prefixes of a ServiceCIDR.
pub fn parse_service_cidr(object: &ServiceCIDR) -> Parsed<Vec<IpNet>> {
    let mut refusals = Refusals::new(ObjectKind::ServiceCidr, &object.metadata);
    let list = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
    let texts = list.iter().enumerate();
    let texts = texts.map(|(index, text)| (format!("spec.cidrs[{index}]"), text.as_str()));
    Parsed { value: Some(prefixes(texts, &mut refusals)), refusals: refusals.into_list() }
}

fn pod_cidrs(node: &v1::Node, refusals: &mut Refusals<'_>) -> Vec<IpNet> {
    let Some(spec) = &node.spec else { return Vec::new() };
    let list = spec.pod_cidrs.as_deref().unwrap_or_default();
    let texts = list.iter().enumerate();
    let texts = texts.map(|(index, text)| (format!("spec.podCIDRs[{index}]"), text.as_str()));
    let single = spec.pod_cidr.as_deref().filter(|text| list.is_empty() && !text.is_empty());
    let single = single.map(|text| ("spec.podCIDR".to_owned(), text));
    let mut prefixes = prefixes(texts.chain(single), refusals);
    prefixes.sort_unstable();
    prefixes
}

/// The prefixes, without bits beyond their length. A text that is not a prefix is refused.
fn prefixes<'a>(
    texts: impl Iterator<Item = (String, &'a str)>,
    refusals: &mut Refusals<'_>,
) -> Vec<IpNet> {
    let mut prefixes = Vec::new();
    for (field, text) in texts {
        match text.parse::<IpNet>() {
            Ok(prefix) => prefixes.push(prefix.trunc()),
            Err(_) => refusals.add(
                RefusalReason::InvalidPrefix,
                field,
                format!("{} is not an IP prefix", Quoted(text)),
            ),
        }
    }
    prefixes
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[track_caller]
    fn check_pod_cidrs(spec: Value, expected: &[&str], refused: &[&str]) {
        let node = json!({ "metadata": { "name": "one" }, "spec": spec });
        let parsed = parse(&serde_json::from_value(node).expect("a Node"));
        let found = parsed.value.map(|node| node.pod_cidrs).unwrap_or_default();
        assert_eq!(found.iter().map(ToString::to_string).collect::<Vec<_>>(), expected);
        let refusals: Vec<_> = parsed.refusals.iter().map(|it| it.field.as_str()).collect();
        assert_eq!(refusals, refused);
    }

    #[test]
    fn pods_have_the_prefixes_of_their_node() {
        let both = ["10.1.0.0/24", "fd00:1::/64"];
        check_pod_cidrs(json!({}), &[], &[]);
        check_pod_cidrs(json!({ "podCIDR": "10.1.0.0/24" }), &both[..1], &[]);
        check_pod_cidrs(json!({ "podCIDR": "10.1.0.0/24", "podCIDRs": both }), &both, &[]);
        let bad = json!({ "podCIDRs": ["10.1.0.0", "10.1.0.7/24"] });
        check_pod_cidrs(bad, &both[..1], &["spec.podCIDRs[0]"]);
    }

    #[test]
    fn internal_ips_are_distinguished_from_external_ones() {
        let node = json!({
            "metadata": { "name": "one" },
            "status": { "addresses": [
                { "type": "ExternalIP", "address": "203.0.113.1" },
                { "type": "InternalIP", "address": "192.0.2.1" },
                { "type": "Hostname", "address": "one" },
            ] },
        });
        let node = parse(&serde_json::from_value(node).expect("a Node")).value.expect("a node");
        let internal = IpAddr::from([192, 0, 2, 1]);
        assert_eq!(node.addresses.all.len(), 2);
        assert_eq!(node.addresses.internal, [internal]);
        assert_eq!(node.addresses.internal_ip(IpFamily::V4), Some(internal));
        assert_eq!(node.addresses.internal_ip(IpFamily::V6), None);
    }
}
