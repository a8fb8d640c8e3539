//! How much a Service asks for, counted before anything is made of it.
//!
//! Invariant: nothing here takes more time than the object is long, and nothing takes memory.

use k8s_openapi::api::core::v1::{self, ServiceSpec};

use super::Service;
use crate::{
    model::{IpFamily, RefusalReason, Refusals},
    options::{Limit, Limits},
};

/// Refuses a Service with a list that is longer than its limit.
pub(super) fn check_lists(
    service: &v1::Service,
    spec: &ServiceSpec,
    limits: &Limits,
    refusals: &mut Refusals<'_>,
) -> Option<()> {
    fn length<T>(list: &Option<Vec<T>>) -> usize {
        list.as_ref().map_or(0, Vec::len)
    }
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.map_or(0, |status| length(&status.ingress));
    let external = length(&spec.external_ips) + ingress;
    let ranges = length(&spec.load_balancer_source_ranges);
    check("spec.ports", length(&spec.ports), limits.ports, refusals)?;
    check("spec.externalIPs", external, limits.external_addresses, refusals)?;
    check("spec.loadBalancerSourceRanges", ranges, limits.source_ranges, refusals)
}

/// Refuses a Service with more frontends than the limit.
pub(super) fn check_frontends(
    service: &Service,
    limits: &Limits,
    refusals: &mut Refusals<'_>,
) -> Option<()> {
    check("spec", service.frontend_count(), limits.frontends, refusals)
}

fn check(field: &str, count: usize, limit: Limit, refusals: &mut Refusals<'_>) -> Option<()> {
    if let Some(message) = limit.exceeded_by(count) {
        refusals.add(RefusalReason::TooLarge, field, message);
        return None;
    }
    Some(())
}

impl Service {
    /// The most frontends that it can have, without those of its node ports at the node's own
    /// addresses: how many of these there are is not the Service's choice.
    pub fn frontend_count(&self) -> usize {
        let node_ports = self.ports.iter().filter(|port| port.node_port.is_some()).count();
        let of_family = |family| {
            let addresses = self.load_balancer_ips.iter().chain(&self.external_ips);
            let external = addresses.filter(|ip| IpFamily::of(**ip) == family).count();
            // Each address has a frontend for each port, and one as a whole.
            (1 + external) * (self.ports.len() + 1) + node_ports
        };
        self.cluster_ips.iter().map(|ip| of_family(IpFamily::of(*ip))).sum()
    }
}
