//! Nodes and pods as a kubelet would report them, and the endpoints that the
//! controllers make of them.

use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{ControlPlane, POLL, successful};

/// A pod that runs on a node. Nothing runs in it: its addresses are those that
/// the test gives to whatever stands for the pod.
#[derive(Debug, Clone, Copy)]
pub struct Pod<'a> {
    /// Namespace and name.
    pub namespace: &'a str,
    /// Name.
    pub name: &'a str,
    /// Labels, for the selectors of Services.
    pub labels: &'a [(&'a str, &'a str)],
    /// Name of the node that it runs on.
    pub node: &'a str,
    /// Its addresses, at most one of each family.
    pub addresses: &'a [IpAddr],
    /// Whether it is Ready.
    pub ready: bool,
}

/// An endpoint of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// Its first address.
    pub address: IpAddr,
    /// Condition `ready`; absent means true, as for `serving`.
    pub ready: bool,
    /// Condition `serving`.
    pub serving: bool,
    /// Condition `terminating`; absent means false.
    pub terminating: bool,
    /// Name of the node that it is on.
    pub node: Option<String>,
    /// Name (empty if it has none) and number of each port of its slice.
    pub ports: Vec<(String, u16)>,
}

impl ControlPlane {
    /// Creates a Node with these addresses as its InternalIPs, in this order.
    ///
    /// # Errors
    /// The API server refuses it.
    pub fn create_node(&self, name: &str, internal_addresses: &[IpAddr]) -> Result<()> {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        let addresses: Vec<Value> = internal_addresses
            .iter()
            .map(|address| json!({"type": "InternalIP", "address": address}))
            .collect();
        self.apply(&node.to_string())?;
        // Server-side apply takes one address of a type: it merges them by type.
        let status = json!({"status": {"addresses": addresses}}).to_string();
        let patch = ["patch", "node", name, "--subresource=status", "--type=merge", "-p", &status];
        successful("kubectl patch node", self.kubectl(patch)?)?;
        Ok(())
    }

    /// Creates one pod and reports it as running.
    ///
    /// # Errors
    /// The API server refuses it.
    pub fn create_pod(&self, pod: Pod<'_>) -> Result<()> {
        self.create_pods(&[pod])
    }

    /// Creates pods and reports them as running, in two calls of kubectl.
    ///
    /// # Errors
    /// The API server refuses one.
    pub fn create_pods(&self, pods: &[Pod<'_>]) -> Result<()> {
        let objects: Vec<Value> = pods.iter().map(pod_object).collect();
        self.apply(&list(&objects).to_string())?;
        let reports: Vec<Value> =
            pods.iter().map(|pod| with_status(pod_object(pod), pod_status(pod))).collect();
        self.apply_with(&list(&reports).to_string(), &["--subresource=status"])
    }

    /// Reports a pod as Ready or not.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn set_ready(&self, namespace: &str, name: &str, ready: bool) -> Result<()> {
        let patch = json!({"status": {"conditions": [ready_condition(ready)]}}).to_string();
        let patched = self.kubectl([
            "patch",
            "pod",
            name,
            "-n",
            namespace,
            "--subresource=status",
            "--type=strategic",
            "-p",
            &patch,
        ])?;
        successful("kubectl patch pod", patched)?;
        Ok(())
    }

    /// Deletes a pod. With a grace period it stays, terminating, until it is
    /// deleted again with [`Duration::ZERO`]: no kubelet ends it.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn delete_pod(&self, namespace: &str, name: &str, grace: Duration) -> Result<()> {
        let grace_period = format!("--grace-period={}", grace.as_secs());
        let mut arguments =
            vec!["delete", "pod", name, "-n", namespace, "--wait=false", &grace_period];
        if grace.is_zero() {
            arguments.push("--force");
        }
        successful("kubectl delete pod", self.kubectl(arguments)?)?;
        Ok(())
    }

    /// The endpoints of a Service, of all its slices, sorted.
    ///
    /// # Errors
    /// The API server does not answer, or an address is none.
    pub fn endpoints(&self, namespace: &str, service: &str) -> Result<Vec<Endpoint>> {
        let selector = format!("kubernetes.io/service-name={service}");
        let slices = self.kubectl([
            "get",
            "endpointslices",
            "-n",
            namespace,
            "-l",
            &selector,
            "-o",
            "json",
        ])?;
        let slices: List<Slice> =
            serde_json::from_str(&successful("kubectl get endpointslices", slices)?)?;
        let mut endpoints = slices
            .items
            .into_iter()
            .map(Slice::into_endpoints)
            .collect::<Result<Vec<_>>>()?
            .concat();
        endpoints.sort();
        Ok(endpoints)
    }

    /// Waits until `condition` holds for the endpoints of a Service, and
    /// returns them.
    ///
    /// # Errors
    /// It does not hold within `deadline`; the error shows the last endpoints.
    pub fn wait_for_slice(
        &mut self,
        namespace: &str,
        service: &str,
        deadline: Duration,
        condition: impl Fn(&[Endpoint]) -> bool,
    ) -> Result<Vec<Endpoint>> {
        let end = Instant::now() + deadline;
        loop {
            let endpoints = self.endpoints(namespace, service)?;
            if condition(&endpoints) {
                return Ok(endpoints);
            }
            self.check_running()?;
            if Instant::now() >= end {
                bail!(
                    "the endpoints of {namespace}/{service} after {deadline:?}: {endpoints:#?}\n{}",
                    self.controller_manager
                        .as_ref()
                        .map(super::Process::log_tail)
                        .unwrap_or_default()
                );
            }
            thread::sleep(POLL);
        }
    }
}

fn pod_object(pod: &Pod<'_>) -> Value {
    let labels: serde_json::Map<String, Value> =
        pod.labels.iter().map(|&(key, value)| (key.to_owned(), value.into())).collect();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": pod.namespace, "name": pod.name, "labels": labels},
        "spec": {
            "nodeName": pod.node,
            "containers": [{"name": "main", "image": "none"}],
        },
    })
}

fn pod_status(pod: &Pod<'_>) -> Value {
    let addresses: Vec<Value> = pod.addresses.iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "phase": "Running",
        "podIP": pod.addresses.first(),
        "podIPs": addresses,
        "conditions": [ready_condition(pod.ready)],
    })
}

fn ready_condition(ready: bool) -> Value {
    json!({"type": "Ready", "status": if ready { "True" } else { "False" }})
}

/// The object as a report of its status: without its spec.
fn with_status(mut object: Value, status: Value) -> Value {
    if let Some(fields) = object.as_object_mut() {
        fields.remove("spec");
        fields.insert("status".to_owned(), status);
    }
    object
}

fn list(items: &[Value]) -> Value {
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

#[derive(Deserialize)]
struct List<T> {
    items: Vec<T>,
}

#[derive(Deserialize)]
struct Slice {
    #[serde(default)]
    endpoints: Option<Vec<SliceEndpoint>>,
    #[serde(default)]
    ports: Option<Vec<SlicePort>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SliceEndpoint {
    addresses: Vec<String>,
    #[serde(default)]
    conditions: Conditions,
    node_name: Option<String>,
}

#[derive(Deserialize, Default)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Deserialize)]
struct SlicePort {
    name: Option<String>,
    port: Option<u16>,
}

impl Slice {
    fn into_endpoints(self) -> Result<Vec<Endpoint>> {
        let ports: Vec<(String, u16)> = self
            .ports
            .unwrap_or_default()
            .into_iter()
            .map(|port| (port.name.unwrap_or_default(), port.port.unwrap_or_default()))
            .collect();
        self.endpoints
            .unwrap_or_default()
            .into_iter()
            .map(|endpoint| {
                let address = endpoint.addresses.first().context("an endpoint without address")?;
                Ok(Endpoint {
                    address: address
                        .parse()
                        .with_context(|| format!("address {address:?} of an endpoint"))?,
                    ready: endpoint.conditions.ready.unwrap_or(true),
                    serving: endpoint.conditions.serving.unwrap_or(true),
                    terminating: endpoint.conditions.terminating.unwrap_or(false),
                    node: endpoint.node_name,
                    ports: ports.clone(),
                })
            })
            .collect()
    }
}
