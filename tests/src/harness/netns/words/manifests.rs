//! Service, EndpointSlice and Node objects as files for `--manifests`, from a few words each.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::netns::topology::plan::{
    Addresses, Family, balancer_ip, external_ip, node_port,
};

/// A directory of manifests; removed when it is dropped.
#[derive(Debug)]
pub struct Manifests {
    directory: TempDir,
}

impl Manifests {
    /// An empty directory.
    ///
    /// # Errors
    /// No permission.
    pub fn new() -> Result<Self> {
        // The form of all names here, by which what a killed run left is found.
        let prefix = format!("lb-{}-0-manifests-", std::process::id());
        let directory = tempfile::Builder::new().prefix(&prefix).tempdir()?;
        Ok(Self { directory })
    }

    /// For `--manifests`.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Writes a file at once: a reader sees the old content or the new one.
    ///
    /// # Errors
    /// The disk is full.
    pub fn write(&self, file: &str, content: &str) -> Result<()> {
        let unfinished = self.path().join(format!(".{file}.new"));
        fs::write(&unfinished, content)
            .and_then(|()| fs::rename(&unfinished, self.path().join(file)))
            .with_context(|| format!("cannot write {file}"))
    }

    /// Removes a file.
    ///
    /// # Errors
    /// It is not there.
    pub fn remove(&self, file: &str) -> Result<()> {
        fs::remove_file(self.path().join(file)).with_context(|| format!("cannot remove {file}"))
    }

    /// Writes a Service and a slice for each family that has endpoints; a family without loses
    /// its slice.
    ///
    /// # Errors
    /// As [`Manifests::write`].
    pub fn publish(&self, service: &Service, endpoints: &[Endpoint]) -> Result<()> {
        // Slices first: a Service that is new finds its endpoints.
        self.endpoints(service, endpoints)?;
        self.service(service)
    }

    /// Writes the Service alone.
    ///
    /// # Errors
    /// As [`Manifests::write`].
    pub fn service(&self, service: &Service) -> Result<()> {
        self.write(&service.file(), &format!("{:#}", service.object()))
    }

    /// Writes the Service's slices alone.
    ///
    /// # Errors
    /// As [`Manifests::write`].
    pub fn endpoints(&self, service: &Service, endpoints: &[Endpoint]) -> Result<()> {
        for family in Family::ALL {
            let file = service.slice_file(family);
            let of_family: Vec<_> =
                endpoints.iter().filter(|one| Family::of(one.address) == family).collect();
            if !of_family.is_empty() {
                self.write(&file, &format!("{:#}", service.slice(family, &of_family)))?;
            } else if self.path().join(&file).exists() {
                self.remove(&file)?;
            }
        }
        Ok(())
    }

    /// Removes the Service and its slices.
    ///
    /// # Errors
    /// There is none.
    pub fn delete(&self, service: &Service) -> Result<()> {
        self.remove(&service.file())?;
        self.endpoints(service, &[])
    }

    /// Writes a Node object.
    ///
    /// # Errors
    /// As [`Manifests::write`].
    pub fn node(&self, name: &str, addresses: Addresses, zone: Option<&str>) -> Result<()> {
        let mut node = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "status": {"addresses": [
                {"type": "InternalIP", "address": addresses.v4},
                {"type": "InternalIP", "address": addresses.v6},
                {"type": "Hostname", "address": name},
            ]},
        });
        if let Some(zone) = zone {
            node["metadata"]["labels"]["topology.kubernetes.io/zone"] = json!(zone);
        }
        self.write(&format!("node-{name}.json"), &format!("{node:#}"))
    }
}

/// A Service of type ClusterIP, until it is given more.
#[derive(Clone, Debug)]
pub struct Service {
    namespace: String,
    name: String,
    pub(super) cluster_ips: Vec<IpAddr>,
    pub(super) ports: Vec<Port>,
    pub(super) affinity: Option<Duration>,
    pub(super) internal_local: bool,
    pub(super) node_port: Option<u16>,
    pub(super) balancer_ips: Vec<IpAddr>,
    pub(super) external_ips: Vec<IpAddr>,
    pub(super) external_local: bool,
    pub(super) source_ranges: Vec<String>,
    pub(super) external_mode: Option<&'static str>,
}

#[derive(Clone, Debug)]
pub(super) struct Port {
    pub(super) name: String,
    protocol: &'static str,
    pub(super) number: u16,
    target: u16,
}

impl Port {
    fn object(&self, node_port: Option<u16>) -> Value {
        let mut port = json!({
            "name": self.name,
            "protocol": self.protocol,
            "port": self.number,
            "targetPort": self.target,
        });
        if let Some(number) = node_port {
            port["nodePort"] = json!(number);
        }
        port
    }
}

impl Service {
    /// A Service in the namespace `default`, without an address or a port.
    pub fn new(name: &str) -> Self {
        Self {
            namespace: "default".to_owned(),
            name: name.to_owned(),
            cluster_ips: Vec::new(),
            ports: Vec::new(),
            affinity: None,
            internal_local: false,
            node_port: None,
            balancer_ips: Vec::new(),
            external_ips: Vec::new(),
            external_local: false,
            source_ranges: Vec::new(),
            external_mode: None,
        }
    }

    /// In another namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = namespace.to_owned();
        self
    }

    /// One more ClusterIP.
    #[must_use]
    pub fn cluster_ip(mut self, address: impl Into<IpAddr>) -> Self {
        self.cluster_ips.push(address.into());
        self
    }

    /// A ClusterIP of each family.
    #[must_use]
    pub fn cluster_ips(self, addresses: Addresses) -> Self {
        self.cluster_ip(addresses.v4).cluster_ip(addresses.v6)
    }

    /// A TCP port and the endpoints' port behind it, called `tcp-NUMBER`.
    #[must_use]
    pub fn tcp(self, number: u16, target: u16) -> Self {
        self.port(&format!("tcp-{number}"), "TCP", number, target)
    }

    /// A UDP port and the endpoints' port behind it, called `udp-NUMBER`.
    #[must_use]
    pub fn udp(self, number: u16, target: u16) -> Self {
        self.port(&format!("udp-{number}"), "UDP", number, target)
    }

    /// Any port.
    #[must_use]
    pub fn port(mut self, name: &str, protocol: &'static str, number: u16, target: u16) -> Self {
        self.ports.push(Port { name: name.to_owned(), protocol, number, target });
        self
    }

    /// `sessionAffinity: ClientIP` with this timeout.
    #[must_use]
    pub fn affinity(mut self, timeout: Duration) -> Self {
        self.affinity = Some(timeout);
        self
    }

    /// `internalTrafficPolicy: Local`.
    #[must_use]
    pub fn internal_local(mut self) -> Self {
        self.internal_local = true;
        self
    }

    /// `type: NodePort`, with this node port for every port: one of each protocol at most.
    #[must_use]
    pub fn node_port(mut self, number: u16) -> Self {
        self.node_port = Some(number);
        self
    }

    /// `type: LoadBalancer`, with ingress addresses of each family.
    #[must_use]
    pub fn balancer(mut self, addresses: Addresses) -> Self {
        self.balancer_ips.extend(Family::ALL.map(|family| addresses.get(family)));
        self
    }

    /// `externalIPs` of each family.
    #[must_use]
    pub fn external_ips(mut self, addresses: Addresses) -> Self {
        self.external_ips.extend(Family::ALL.map(|family| addresses.get(family)));
        self
    }

    /// All of [`Service::node_port`], [`Service::balancer`] and [`Service::external_ips`], as
    /// the [`plan`](crate::harness::netns::topology::plan) has them for this number.
    #[must_use]
    pub fn exposed(self, number: u8) -> Self {
        self.node_port(node_port(number))
            .balancer(balancer_ip(number))
            .external_ips(external_ip(number))
    }

    /// `externalTrafficPolicy: Local`.
    #[must_use]
    pub fn external_local(mut self) -> Self {
        self.external_local = true;
        self
    }

    /// One more of `loadBalancerSourceRanges`, as it is written.
    #[must_use]
    pub fn source_range(mut self, range: impl Into<String>) -> Self {
        self.source_ranges.push(range.into());
        self
    }

    /// Packets of clients outside reach backends on other nodes like this: `snat` or `dsr`.
    #[must_use]
    pub fn external_mode(mut self, mode: &'static str) -> Self {
        self.external_mode = Some(mode);
        self
    }

    /// `namespace/name`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// The file that [`Manifests`] keeps it in.
    pub fn file(&self) -> String {
        format!("service-{}-{}.json", self.namespace, self.name)
    }

    /// The file that [`Manifests`] keeps its slice of a family in.
    pub fn slice_file(&self, family: Family) -> String {
        format!("slice-{}-{}-{}.json", self.namespace, self.name, address_type(family))
    }

    /// The object.
    pub fn object(&self) -> Value {
        let families: Vec<_> =
            self.cluster_ips.iter().map(|ip| address_type(Family::of(*ip))).collect();
        let ports: Vec<_> = self.ports.iter().map(|port| port.object(self.node_port)).collect();
        let policy = |is_local| if is_local { "Local" } else { "Cluster" };
        let mut service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"namespace": self.namespace, "name": self.name},
            "spec": {
                "type": self.kind(),
                "clusterIP": self.cluster_ips.first(),
                "clusterIPs": self.cluster_ips,
                "externalIPs": self.external_ips,
                "ipFamilies": families,
                "internalTrafficPolicy": policy(self.internal_local),
                "ports": ports,
            },
        });
        let spec = &mut service["spec"];
        if self.kind() != "ClusterIP" || !self.external_ips.is_empty() {
            spec["externalTrafficPolicy"] = json!(policy(self.external_local));
        }
        if !self.source_ranges.is_empty() {
            spec["loadBalancerSourceRanges"] = json!(self.source_ranges);
        }
        if let Some(timeout) = self.affinity {
            spec["sessionAffinity"] = json!("ClientIP");
            let config = json!({"clientIP": {"timeoutSeconds": timeout.as_secs()}});
            spec["sessionAffinityConfig"] = config;
        }
        if let Some(mode) = self.external_mode {
            service["metadata"]["annotations"] = json!({"lb-agent/external-mode": mode});
        }
        if !self.balancer_ips.is_empty() {
            let ingress: Vec<_> = self.balancer_ips.iter().map(|ip| json!({"ip": ip})).collect();
            service["status"] = json!({"loadBalancer": {"ingress": ingress}});
        }
        service
    }

    fn kind(&self) -> &'static str {
        match (self.balancer_ips.is_empty(), self.node_port) {
            (false, _) => "LoadBalancer",
            (true, Some(_)) => "NodePort",
            (true, None) => "ClusterIP",
        }
    }

    fn slice(&self, family: Family, endpoints: &[&Endpoint]) -> Value {
        let kind = address_type(family);
        let ports: Vec<_> = self
            .ports
            .iter()
            .map(|port| json!({"name": port.name, "protocol": port.protocol, "port": port.target}))
            .collect();
        let endpoints: Vec<_> = endpoints.iter().map(|endpoint| endpoint.object()).collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": self.namespace,
                "name": format!("{}-{}", self.name, kind.to_lowercase()),
                "labels": {"kubernetes.io/service-name": self.name},
            },
            "addressType": kind,
            "ports": ports,
            "endpoints": endpoints,
        })
    }
}

/// One endpoint of a slice.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub(super) address: IpAddr,
    pub(super) node: Option<String>,
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: bool,
}

impl Endpoint {
    /// A ready endpoint of no node.
    pub fn at(address: impl Into<IpAddr>) -> Self {
        let address = address.into();
        Self { address, node: None, ready: true, serving: true, terminating: false }
    }

    /// Ready endpoints for a pod, one of each family.
    pub fn of_pod(pod: &crate::harness::netns::topology::node::Pod) -> [Self; 2] {
        Family::ALL.map(|family| Self::at(pod.ip(family)).node(&pod.node_name()))
    }

    /// On this node.
    #[must_use]
    pub fn node(mut self, name: &str) -> Self {
        self.node = Some(name.to_owned());
        self
    }

    /// Neither ready nor serving.
    #[must_use]
    pub fn not_ready(mut self) -> Self {
        (self.ready, self.serving) = (false, false);
        self
    }

    /// Terminating, and still serving.
    #[must_use]
    pub fn terminating(mut self) -> Self {
        (self.ready, self.serving, self.terminating) = (false, true, true);
        self
    }

    fn object(&self) -> Value {
        let mut endpoint = json!({
            "addresses": [self.address],
            "conditions": {
                "ready": self.ready,
                "serving": self.serving,
                "terminating": self.terminating,
            },
        });
        if let Some(node) = &self.node {
            endpoint["nodeName"] = json!(node);
        }
        endpoint
    }
}

fn address_type(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}
