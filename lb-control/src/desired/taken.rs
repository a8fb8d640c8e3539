//! Addresses that no Service gets on this node, because they are somebody else's: the API server's,
//! those that only the API server gives out, those of pods, or that of a process that serves a
//! ClusterIP itself.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use lb_common::abi::frontend::TCP;

use super::{
    DesiredFrontend, FrontendAddress, NodeFacts,
    claims::{Claim, ClaimKind},
};
use crate::{
    model::{Refusal, RefusalReason, event::ObjectKind},
    snapshot::Entry,
};

/// The Service whose endpoints are the API servers.
pub const API_SERVER: &str = "default/kubernetes";

/// Addresses and ports of API servers.
pub type ApiServers = BTreeSet<(IpAddr, u16)>;

/// The addresses that are not for Services, or not for every claim of a Service.
#[derive(Debug, Default)]
pub struct Taken {
    /// The endpoints of [`API_SERVER`].
    api_servers: ApiServers,
    /// Where this agent itself looks for API servers.
    configured: ApiServers,
    /// In here the API server gives out each address, as a ClusterIP.
    service_cidrs: Vec<IpNet>,
}

/// Who has an address that a Service wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Holder {
    /// An API server.
    ApiServer,
    /// A ServiceCIDR: the address is, or will be, some Service's ClusterIP.
    ServiceCidr,
    /// A process of this node, on an interface with the ClusterIP: a cache of DNS.
    Process,
    /// A pod: the address is inside of the prefixes of pods. A tenant who had it as an external IP
    /// would get the packets that Services send to that pod.
    Pod,
}

impl Taken {
    /// Sets the API servers: the endpoints of [`API_SERVER`]. Returns whether they changed.
    pub fn set_api_servers(&mut self, entry: Option<&Entry>) -> bool {
        let mut found = BTreeSet::new();
        for slice in entry.into_iter().flat_map(Entry::slices) {
            for endpoint in &slice.endpoints {
                found.extend(slice.ports.iter().map(|port| (endpoint.address, port.number)));
            }
        }
        let is_changed = self.api_servers != found;
        self.api_servers = found;
        is_changed
    }

    /// Sets the API servers that this agent is configured with. Returns whether they changed.
    pub fn set_configured(&mut self, configured: ApiServers) -> bool {
        let is_changed = self.configured != configured;
        self.configured = configured;
        is_changed
    }

    /// Sets the prefixes of the ServiceCIDRs. Returns whether they changed.
    pub fn set_service_cidrs(&mut self, prefixes: impl Iterator<Item = IpNet>) -> bool {
        let prefixes = prefixes.collect();
        let is_changed = self.service_cidrs != prefixes;
        self.service_cidrs = prefixes;
        is_changed
    }

    /// Who has the address that a Service claims; `None` if the Service can have it.
    pub fn holder(&self, service: &str, claim: &Claim, facts: &NodeFacts) -> Option<Holder> {
        let Claim { frontend, kind } = claim;
        let ip = frontend.at.ip;
        if frontend.kind.is_internal() && facts.held_addresses.contains(&ip) {
            return Some(Holder::Process);
        }
        if self.is_api_server(frontend) && service != API_SERVER {
            return Some(Holder::ApiServer);
        }
        if frontend.is_external() && self.service_cidrs.iter().any(|range| range.contains(&ip)) {
            return Some(Holder::ServiceCidr);
        }
        // Only this node knows its own addresses, and some clusters give pods and nodes addresses
        // of one network.
        let is_pod = *kind == ClaimKind::ExternalIp
            && !facts.addresses.contains(&ip)
            && facts.pod_prefixes.iter().any(|range| range.contains(&ip));
        is_pod.then_some(Holder::Pod)
    }

    /// Whether a frontend is an API server's. An address as a whole is, if any of its ports is,
    /// because packets to such an address must not be dropped for want of a port.
    fn is_api_server(&self, frontend: &DesiredFrontend) -> bool {
        let FrontendAddress { ip, port, protocol } = frontend.at;
        let ports = match protocol {
            TCP => port..=port,
            0 if frontend.is_external() => 0..=u16::MAX,
            _ => return false,
        };
        let (first, last) = ((ip, *ports.start()), (ip, *ports.end()));
        let has = |servers: &ApiServers| servers.range(first..=last).next().is_some();
        has(&self.api_servers) || has(&self.configured)
    }
}

/// The refusal of a frontend whose address has a holder; none where that is no fault of the
/// Service's, or where the address as a whole is refused already.
pub fn refusal(service: &str, frontend: FrontendAddress, holder: Holder) -> Option<Refusal> {
    let FrontendAddress { ip, port, protocol } = frontend;
    let (field, reason, message) = match (holder, protocol) {
        (Holder::ApiServer, TCP) => (
            "spec.ports",
            RefusalReason::AddressInUse,
            format!(
                "{ip} port {port} is an API server (an endpoint of {API_SERVER}, or where lb-agent \
                 looks for one): give the Service another address or port"
            ),
        ),
        (Holder::ServiceCidr, 0) => (
            "spec.ports",
            RefusalReason::ForbiddenAddress,
            format!(
                "{ip} is in a ServiceCIDR, where only the API server gives out \
                 addresses: give the Service an address outside of it"
            ),
        ),
        (Holder::Pod, 0) => (
            "spec.externalIPs",
            RefusalReason::ForbiddenAddress,
            format!(
                "{ip} is an address of pods (--cluster-cidr, or the Node's pod CIDRs): give the \
                 Service an address outside of them"
            ),
        ),
        (Holder::ApiServer | Holder::ServiceCidr | Holder::Process | Holder::Pod, _) => {
            return None;
        }
    };
    Some(Refusal {
        kind: ObjectKind::Service,
        object: service.into(),
        uid: String::new(),
        field: field.to_owned(),
        reason,
        message,
    })
}
