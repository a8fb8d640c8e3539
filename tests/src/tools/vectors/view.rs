//! What the objects of a group say, read independently of the agent: who a client is, what a
//! destination is, which endpoints serve (docs/semantics.md, sections 1, 2 and 5).

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};

use super::format::{DetectLocal, Flow, Group, Node, Protocol, Proxier};

/// Who sends a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Client {
    /// A process of the node.
    Node,
    /// A pod of the node.
    Pod,
    /// A pod of another node.
    OtherPod,
    /// Any other client.
    Outside,
}

/// The frontend that a packet is addressed to.
#[derive(Clone, Copy, Debug)]
pub enum Frontend<'a> {
    /// A port of a ClusterIP.
    ClusterIp(&'a Service, &'a ServicePort),
    /// A ClusterIP, at a port that no Service has there.
    OtherPort,
    /// A ClusterIP, with a protocol that Services do not carry.
    OtherProtocol,
    /// A node port, at an address of the node or of loopback, served there or not.
    NodePort(&'a Service, &'a ServicePort),
    /// An address of a load balancer or an external IP.
    External {
        /// The Service.
        service: &'a Service,
        /// Its port.
        port: &'a ServicePort,
        /// Whether `loadBalancerSourceRanges` apply: only at load balancer addresses.
        is_ranged: bool,
    },
    /// No Service, but inside a ServiceCIDR.
    ServiceCidr,
    /// No Service.
    Other,
}

/// The objects of a group.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    group: &'a Group,
}

impl<'a> View<'a> {
    /// The view of this group.
    pub fn new(group: &'a Group) -> Self {
        Self { group }
    }

    /// The node.
    pub fn node(&self) -> &'a Node {
        &self.group.node
    }

    /// The kind of kube-proxy that gave the answers.
    pub fn proxier(&self) -> Proxier {
        self.group.proxier
    }

    /// The client that has this address.
    pub fn client(&self, ip: IpAddr) -> Client {
        let node = self.node();
        let is_in = |prefixes: &[IpNet]| prefixes.iter().any(|prefix| prefix.contains(&ip));
        if self.is_of_node(ip) {
            Client::Node
        } else if is_in(&node.pod_cidr.0) {
            Client::Pod
        } else if matches!(&node.detect_local, DetectLocal::Prefix(prefix) if prefix.contains(&ip))
        {
            Client::OtherPod
        } else {
            Client::Outside
        }
    }

    /// Whether this is an address of the node, or of loopback.
    pub fn is_of_node(&self, ip: IpAddr) -> bool {
        ip.is_loopback() || self.node().local_ips.contains(&ip)
    }

    /// The address of the node that is served by default.
    pub fn primary(&self, like: IpAddr) -> Option<IpAddr> {
        let node = self.node();
        let mut all = [node.primary_ip].into_iter().chain(node.local_ips.iter().copied());
        all.find(|ip| ip.is_ipv4() == like.is_ipv4())
    }

    /// Whether node ports are served at an address of the node.
    pub fn serves_node_ports_at(&self, ip: IpAddr) -> bool {
        let listed = &self.node().node_port_addresses.0;
        match ip.is_loopback() {
            true if self.node().localhost_node_ports == Some(false) => false,
            true if listed.is_empty() => true,
            false if listed.is_empty() => self.primary(ip) == Some(ip),
            _ => listed.iter().any(|prefix| prefix.contains(&ip)),
        }
    }

    /// The frontend that a flow is addressed to. Services carry TCP and UDP.
    pub fn frontend(&self, flow: &Flow) -> Frontend<'a> {
        match self.frontend_of_any_protocol(flow) {
            found if flow.protocol != Protocol::Sctp => found,
            Frontend::ClusterIp(..) | Frontend::OtherPort => Frontend::OtherProtocol,
            Frontend::ServiceCidr => Frontend::ServiceCidr,
            _ => Frontend::Other,
        }
    }

    /// The frontend that a flow is addressed to, where Services carry SCTP too.
    pub fn frontend_of_any_protocol(&self, flow: &Flow) -> Frontend<'a> {
        let (ip, number) = (flow.dest_ip, i32::from(flow.dest_port));
        let is_live = self.services().any(|(_, spec)| cluster_ips(spec).any(|own| own == ip));
        let ports = || {
            self.services().flat_map(|(service, spec)| {
                let ports = spec.ports.iter().flatten();
                let ports = ports.filter(|port| is_of(port.protocol.as_deref(), flow.protocol));
                ports.map(move |port| (service, spec, port))
            })
        };
        for (service, spec, port) in ports() {
            if port.port == number && cluster_ips(spec).any(|own| own == ip) {
                return Frontend::ClusterIp(service, port);
            }
            let is_ranged = balancer_ips(service, spec).any(|own| own == ip);
            if port.port == number && (is_ranged || external_ips(spec).any(|own| own == ip)) {
                return Frontend::External { service, port, is_ranged };
            }
        }
        let node_ports = || ports().filter(|(.., port)| port.node_port == Some(number));
        match node_ports().find(|_| self.is_of_node(ip)) {
            Some((service, _, port)) => Frontend::NodePort(service, port),
            None if is_live => Frontend::OtherPort,
            None if self.node().service_cidrs.0.iter().any(|net| net.contains(&ip)) => {
                Frontend::ServiceCidr
            }
            None => Frontend::Other,
        }
    }

    /// Whether clients outside send to the node what is for this address, which no node holds.
    pub fn is_routed_here(&self, ip: IpAddr) -> bool {
        let of_service = |(service, spec)| {
            let of_balancer = balancer_ips(service, spec).any(|own| own == ip);
            of_balancer || external_ips(spec).any(|own| own == ip)
        };
        !self.is_of_node(ip) && self.services().any(of_service)
    }

    /// The endpoints that clients of the cluster get.
    pub fn cluster_set(&self, service: &Service, port: &ServicePort, like: IpAddr) -> Endpoints {
        let all = self.endpoints(service, port, like);
        let ready = all.iter().filter(|(_, endpoint)| is_ready(endpoint));
        let ready: Vec<_> = ready.cloned().collect();
        if ready.is_empty() {
            return addresses(all.iter().filter(|(_, endpoint)| is_draining(endpoint)));
        }
        addresses(self.hinted(&ready).iter())
    }

    /// The endpoints of this node.
    pub fn local_set(&self, service: &Service, port: &ServicePort, like: IpAddr) -> Endpoints {
        let here = self.endpoints(service, port, like).into_iter();
        let here: Vec<_> = here.filter(|(_, endpoint)| self.is_local(endpoint)).collect();
        let ready = addresses(here.iter().filter(|(_, endpoint)| is_ready(endpoint)));
        if !ready.is_empty() {
            return ready;
        }
        addresses(here.iter().filter(|(_, endpoint)| is_draining(endpoint)))
    }

    /// Whether an endpoint of this address runs on the node.
    pub fn is_here(&self, ip: IpAddr) -> bool {
        self.here().any(|own| own == ip) || self.is_of_node(ip)
    }

    /// The addresses of the endpoints that run on the node.
    pub fn here(&self) -> impl Iterator<Item = IpAddr> {
        let endpoints =
            self.group.endpoint_slices.iter().flat_map(|slice| slice.endpoints.iter().flatten());
        let here = endpoints.filter(|endpoint| self.is_local(endpoint));
        here.filter_map(|endpoint| endpoint.addresses.first()?.parse().ok())
    }

    fn is_local(&self, endpoint: &Endpoint) -> bool {
        endpoint.node_name.as_deref() == Some(&self.node().name)
    }

    fn services(&self) -> impl Iterator<Item = (&'a Service, &'a ServiceSpec)> + use<'a> {
        const OTHER_PROXY: &str = "service.kubernetes.io/service-proxy-name";
        let group = self.group;
        group.services.iter().filter_map(|service| {
            let labels = service.metadata.labels.as_ref();
            let is_foreign = labels.is_some_and(|labels| labels.contains_key(OTHER_PROXY));
            let spec = service.spec.as_ref().filter(|_| !is_foreign)?;
            (spec.type_.as_deref() != Some("ExternalName")).then_some((service, spec))
        })
    }

    /// Every endpoint that is in a slice, as (address and port, object), once.
    fn endpoints(
        &self,
        service: &Service,
        port: &ServicePort,
        like: IpAddr,
    ) -> Vec<(SocketAddr, &'a Endpoint)> {
        let group = self.group;
        let slices = group.endpoint_slices.iter().filter(|slice| is_slice_of(slice, service));
        let mut found: Vec<(SocketAddr, &Endpoint)> = Vec::new();
        for slice in slices {
            let name = |name: &Option<String>| name.clone().unwrap_or_default();
            let numbers = slice.ports.iter().flatten().filter(|own| {
                own.name.is_some()
                    && name(&own.name) == name(&port.name)
                    && own.protocol.as_deref().unwrap_or("TCP")
                        == port.protocol.as_deref().unwrap_or("TCP")
            });
            for number in numbers.filter_map(|own| u16::try_from(own.port?).ok()) {
                let own = slice.endpoints.iter().flatten().filter_map(|endpoint| {
                    let ip: IpAddr = endpoint.addresses.first()?.parse().ok()?;
                    let is_meant = number != 0 && ip.is_ipv4() == like.is_ipv4();
                    is_meant.then_some((SocketAddr::new(ip, number), endpoint))
                });
                found.extend(own);
            }
        }
        found.sort_by_key(|(address, endpoint)| (*address, !self.is_local(endpoint)));
        found.dedup_by_key(|(address, _)| *address);
        found
    }

    /// Those of the ready endpoints whose hints name the node or its zone, or all.
    fn hinted(&self, ready: &[(SocketAddr, &'a Endpoint)]) -> Vec<(SocketAddr, &'a Endpoint)> {
        const ZONE: &str = "topology.kubernetes.io/zone";
        let labels = self.node().topology_labels.as_ref();
        let zone = labels.and_then(|labels| labels.get(ZONE)).filter(|zone| !zone.is_empty());
        let nodes = |endpoint: &Endpoint| -> Vec<String> {
            let hints = endpoint.hints.as_ref().and_then(|hints| hints.for_nodes.as_ref());
            hints.into_iter().flatten().map(|hint| hint.name.clone()).collect()
        };
        let zones = |endpoint: &Endpoint| -> Vec<String> {
            let hints = endpoint.hints.as_ref().and_then(|hints| hints.for_zones.as_ref());
            hints.into_iter().flatten().map(|hint| hint.name.clone()).collect()
        };
        let narrowed = |hints: &dyn Fn(&Endpoint) -> Vec<String>, own: &String| {
            let all_carry = ready.iter().all(|(_, endpoint)| !hints(endpoint).is_empty());
            let named = ready.iter().filter(|(_, endpoint)| hints(endpoint).contains(own));
            let named: Vec<_> = named.cloned().collect();
            (all_carry && !named.is_empty()).then_some(named)
        };
        narrowed(&nodes, &self.node().name)
            .or_else(|| narrowed(&zones, zone?))
            .unwrap_or_else(|| ready.to_vec())
    }
}

/// Endpoints, in order.
pub type Endpoints = Vec<SocketAddr>;

fn addresses<'e>(found: impl Iterator<Item = &'e (SocketAddr, &'e Endpoint)>) -> Endpoints {
    found.map(|(address, _)| *address).collect()
}

fn is_slice_of(slice: &EndpointSlice, service: &Service) -> bool {
    let labels = slice.metadata.labels.as_ref();
    let label = |name: &str| labels.and_then(|labels| labels.get(name));
    let is_same_namespace = slice.metadata.namespace.as_deref().unwrap_or("default")
        == service.metadata.namespace.as_deref().unwrap_or("default");
    is_same_namespace
        && label("service.kubernetes.io/headless").is_none()
        && label("kubernetes.io/service-name") == service.metadata.name.as_ref()
}

/// Whether a policy of a Service is Local.
pub fn is_local(service: &Service, policy: impl Fn(&ServiceSpec) -> Option<&str>) -> bool {
    service.spec.as_ref().and_then(policy) == Some("Local")
}

fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true)
}

fn is_draining(endpoint: &Endpoint) -> bool {
    let conditions = endpoint.conditions.as_ref();
    let is_serving = conditions.and_then(|conditions| conditions.serving).unwrap_or(true);
    is_serving && conditions.and_then(|conditions| conditions.terminating).unwrap_or(false)
}

fn is_of(text: Option<&str>, protocol: Protocol) -> bool {
    text.unwrap_or("TCP") == protocol.to_string()
}

fn cluster_ips(spec: &ServiceSpec) -> impl Iterator<Item = IpAddr> {
    let list = spec.cluster_ips.as_deref().unwrap_or_default();
    let single = spec.cluster_ip.iter().filter(|_| list.is_empty());
    list.iter().chain(single).filter_map(|text| text.parse().ok())
}

fn external_ips(spec: &ServiceSpec) -> impl Iterator<Item = IpAddr> {
    spec.external_ips.iter().flatten().filter_map(|text| text.parse().ok())
}

/// The addresses of a load balancer that are programmed.
pub fn balancer_ips(service: &Service, spec: &ServiceSpec) -> impl Iterator<Item = IpAddr> {
    let is_meant = spec.type_.as_deref() == Some("LoadBalancer");
    let status = service.status.as_ref().filter(|_| is_meant);
    let balancer = status.and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_ref()).into_iter().flatten();
    let vips = ingress.filter(|ingress| ingress.ip_mode.as_deref().unwrap_or("VIP") == "VIP");
    vips.filter_map(|ingress| ingress.ip.as_deref()?.parse().ok())
}
