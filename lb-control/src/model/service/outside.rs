//! The addresses of a Service for clients outside the cluster, and which clients may use them.

use std::{collections::HashSet, net::IpAddr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{self, LoadBalancerIngress, ServiceSpec};

use crate::{
    model::{RefusalReason, Refusals, keys::EXTERNAL_MODE_ANNOTATION, parse_address, text::Quoted},
    options::ExternalMode,
};

/// The fields of a Service for clients outside the cluster, without its node ports.
pub(super) struct Outside {
    pub(super) load_balancer_ips: Vec<IpAddr>,
    pub(super) external_ips: Vec<IpAddr>,
    pub(super) source_ranges: Vec<IpNet>,
    pub(super) mode: Option<ExternalMode>,
}

pub(super) fn read(
    service: &v1::Service,
    spec: &ServiceSpec,
    refusals: &mut Refusals<'_>,
) -> Outside {
    let is_load_balancer = spec.type_.as_deref() == Some("LoadBalancer");
    Outside {
        load_balancer_ips: if is_load_balancer {
            load_balancer_ips(service, refusals)
        } else {
            Vec::new()
        },
        external_ips: external_ips(spec, refusals),
        source_ranges: source_ranges(spec, refusals),
        mode: mode(service, refusals),
    }
}

fn mode(service: &v1::Service, refusals: &mut Refusals<'_>) -> Option<ExternalMode> {
    let text = EXTERNAL_MODE_ANNOTATION.annotation(&service.metadata)?;
    let mode = text.parse::<ExternalMode>().ok();
    if mode.is_none() {
        refusals.add(
            RefusalReason::UnknownValue,
            EXTERNAL_MODE_ANNOTATION.annotation_path(),
            format!("{} is neither snat nor dsr; what --external-mode says is used", Quoted(text)),
        );
    }
    mode
}

/// The load balancer's addresses that packets still have as their destination when they arrive
/// here. A load balancer with `ipMode: Proxy`, or with a host name only, changes the
/// destination itself.
fn load_balancer_ips(service: &v1::Service, refusals: &mut Refusals<'_>) -> Vec<IpAddr> {
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let list = status.and_then(|status| status.ingress.as_deref()).unwrap_or_default();
    let is_vip = |ingress: &LoadBalancerIngress| {
        matches!(ingress.ip_mode.as_deref(), None | Some("" | "VIP"))
    };
    let texts = list.iter().enumerate().filter(|(_, ingress)| is_vip(ingress));
    let texts = texts.filter_map(|(index, ingress)| {
        let text = ingress.ip.as_deref().filter(|text| !text.is_empty())?;
        Some((format!("status.loadBalancer.ingress[{index}].ip"), text))
    });
    addresses(texts, refusals)
}

fn external_ips(spec: &ServiceSpec, refusals: &mut Refusals<'_>) -> Vec<IpAddr> {
    let list = spec.external_ips.as_deref().unwrap_or_default();
    let field = |index| format!("spec.externalIPs[{index}]");
    addresses(list.iter().enumerate().map(|(index, text)| (field(index), text.as_str())), refusals)
}

/// Reads an address that other machines can reach a Service at.
fn parse_external_address(text: &str) -> Result<IpAddr, String> {
    let address = parse_address(text)?;
    let why = match address {
        IpAddr::V4(v4) if v4.is_link_local() => "a link-local address",
        IpAddr::V6(v6) if v6.is_unicast_link_local() => "a link-local address",
        IpAddr::V4(v4) if v4.is_broadcast() => "the broadcast address",
        _ => return Ok(address),
    };
    Err(format!("{} is {why}", Quoted(text)))
}

/// The addresses, each once. A text that is not an address is refused.
fn addresses<'a>(
    texts: impl Iterator<Item = (String, &'a str)>,
    refusals: &mut Refusals<'_>,
) -> Vec<IpAddr> {
    let (mut addresses, mut seen) = (Vec::new(), HashSet::new());
    for (field, text) in texts {
        match parse_external_address(text) {
            Ok(address) if !seen.insert(address) => {}
            Ok(address) => addresses.push(address),
            Err(message) => refusals.add(RefusalReason::InvalidAddress, field, message),
        }
    }
    addresses
}

/// The ranges in order, each once. A text that is not a prefix is refused, the others hold. As
/// with kube-proxy, a list without any valid range admits every client.
fn source_ranges(spec: &ServiceSpec, refusals: &mut Refusals<'_>) -> Vec<IpNet> {
    let list = spec.load_balancer_source_ranges.as_deref().unwrap_or_default();
    let mut ranges: Vec<IpNet> = Vec::with_capacity(list.len());
    for (index, text) in list.iter().enumerate() {
        match text.trim().parse::<IpNet>() {
            Ok(range) => ranges.push(range.trunc()),
            Err(_) => {
                let field = format!("spec.loadBalancerSourceRanges[{index}]");
                refusals.add(
                    RefusalReason::InvalidPrefix,
                    field,
                    format!("{} is not an IP prefix", Quoted(text)),
                );
            }
        }
    }
    ranges.sort_unstable();
    ranges.dedup();
    ranges
}
