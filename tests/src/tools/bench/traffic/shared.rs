//! The control plane of all lanes, and the objects in it.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::case::{FAR, NEAR};
use crate::harness::controlplane::live::create_pod;
use crate::harness::controlplane::{ControlPlane, Options, successful};
use crate::harness::netns::topology::cluster::Cluster;
use crate::harness::netns::topology::node;
use crate::harness::netns::topology::plan::{NODE_GATEWAY, cluster_ip};
use crate::harness::wait::{PATIENCE, within};

/// The first port of the servers.
pub(super) const TARGET: u16 = 8080;
/// The first port of Services.
pub(super) const PORT: u16 = 80;
/// The first node port.
pub(super) const NODE_PORT: u16 = 30_080;

/// The control plane that all lanes share.
pub struct Shared {
    pub(super) plane: ControlPlane,
    pub(super) cluster: Cluster,
}

impl Shared {
    /// Starts it, in a cluster of its own.
    ///
    /// # Errors
    /// What cannot be made or started.
    pub fn start() -> Result<Self> {
        let cluster = Cluster::builder().nodes(1).build()?;
        let namespace = cluster.fabric().netns().path();
        let plane = ControlPlane::start(&namespace, NODE_GATEWAY.v4.into(), Options::default())?;
        Ok(Self { plane, cluster })
    }

    /// Creates nodes and pods as this cluster, and that of every lane, has them, the Services that
    /// are used, and `others` that are not.
    ///
    /// # Errors
    /// The API server refuses one.
    pub fn fill(&mut self, cluster: &Cluster, others: usize) -> Result<()> {
        for node in cluster.nodes() {
            let addresses = node.addresses();
            self.plane.create_node(node.name(), &[addresses.v4.into(), addresses.v6.into()])?;
        }
        for name in [NEAR, FAR] {
            self.add_backend(&cluster.pod(name), &service(name))?;
        }
        self.add_others(others)
    }

    /// Creates a pod of the lanes, and a Service that selects it by the label `app`, and waits for its
    /// EndpointSlices, one of each family.
    ///
    /// # Errors
    /// The API server refuses one.
    pub fn add_backend(&mut self, pod: &node::Pod, service: &Value) -> Result<()> {
        let name = pod.name();
        create_pod(&self.plane, name, pod)?;
        self.plane.apply(&service.to_string())?;
        self.plane
            .wait_for_slice("default", name, PATIENCE, |endpoints| endpoints.len() == 2)
            .map(drop)
    }

    /// Services beside those that are used, each with the endpoints of [`FAR`].
    fn add_others(&self, count: usize) -> Result<()> {
        let others: Vec<_> = (0..count).map(other_service).collect();
        for part in others.chunks(PART) {
            let list = json!({"apiVersion": "v1", "kind": "List", "items": part});
            self.plane.apply(&list.to_string())?;
        }
        // Two families each.
        let wanted = 2 * count;
        within(OTHERS, || {
            let slices = ["get", "endpointslices", "-l", OTHER, "-o", "name"];
            let said = successful("kubectl", self.plane.kubectl(slices)?)?;
            let found = said.lines().count();
            ensure!(found == wanted, "{found} of {wanted} EndpointSlices");
            Ok(())
        })
    }
}

/// The label of [`other_service`], which its EndpointSlices have as well.
const OTHER: &str = "traffic=other";
/// How many Services are applied at once.
const PART: usize = 250;
/// How long the control plane may take to make their EndpointSlices.
const OTHERS: Duration = Duration::from_secs(300);

fn other_service(number: usize) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "namespace": "default",
            "name": format!("other-{number}"),
            "labels": {"traffic": "other"},
        },
        "spec": {
            "selector": {"app": FAR},
            "ipFamilyPolicy": "RequireDualStack",
            "ports": [{"name": "tcp", "protocol": "TCP", "port": PORT, "targetPort": TARGET}],
        },
    })
}

/// The numbers that the ClusterIPs of a Service end with.
pub(super) fn number(service: &str) -> u8 {
    if service == NEAR { 40 } else { 41 }
}

/// [`FAR`] is there for clients outside as well.
fn service(name: &str) -> Value {
    let addresses = cluster_ip(number(name));
    let is_exposed = name == FAR;
    // Those of iperf3 and nginx are the last two.
    let ports = [("TCP", 4), ("UDP", 2)].into_iter().flat_map(|(protocol, count)| {
        (0..count).map(move |offset: u16| {
            let mut port = json!({
                "name": format!("{}-{offset}", protocol.to_lowercase()),
                "protocol": protocol,
                "port": PORT + offset,
                "targetPort": TARGET + offset,
            });
            if is_exposed {
                port["nodePort"] = json!(NODE_PORT + offset);
            }
            port
        })
    });
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "default", "name": name},
        "spec": {
            "type": if is_exposed { "NodePort" } else { "ClusterIP" },
            "selector": {"app": name},
            "ipFamilyPolicy": "RequireDualStack",
            "clusterIP": addresses.v4,
            "clusterIPs": [addresses.v4.to_string(), addresses.v6.to_string()],
            "ports": ports.collect::<Vec<_>>(),
        },
    })
}
