//! The objects of a large cluster, as an API server sends them: with the fields that no agent
//! reads, which are most of the text; and as a client creates them.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde_json::{Value, json};

use crate::harness::netns::topology::plan::cidr;

/// The port of every Service.
pub const PORT: u16 = 80;
/// The port of every endpoint.
pub const TARGET: u16 = 8080;
/// The place of the first Service in the range; the one before is the API server's own.
const FIRST_SERVICE: u32 = 2;
/// The first address of endpoints.
const ENDPOINTS: u32 = u32::from_be_bytes([10, 128, 0, 0]);
/// The first address of endpoints that replace others.
const REPLACEMENTS: u32 = u32::from_be_bytes([10, 192, 0, 0]);
/// How many addresses those have, one after the other.
const REPLACEMENT_COUNT: u32 = 1 << 18;
/// How many nodes the endpoints are on.
const NODES: u32 = 100;
/// How many namespaces the Services are in.
pub const NAMESPACES: u32 = 100;

/// So many Services, each with one slice of so many endpoints.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Services.
    pub services: u32,
    /// Endpoints of each.
    pub endpoints: u32,
}

impl Size {
    /// All objects by the plural of their kind; `node` is the node that watches, at `address`.
    pub fn objects(self, node: &str, address: Ipv4Addr) -> HashMap<&'static str, Vec<Value>> {
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node, "uid": "n"},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]},
        });
        let range = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
            "metadata": {"name": "kubernetes"}, "spec": {"cidrs": [self.range().to_string()]},
        });
        HashMap::from([
            ("services", (0..self.services).map(service).collect()),
            ("endpointslices", (0..self.services).map(|of| self.slice(of, true)).collect()),
            ("nodes", vec![node]),
            ("servicecidrs", vec![range]),
        ])
    }

    /// The range of ClusterIPs: that of the tests, or a larger one if it is too small.
    fn range(self) -> Ipv4Net {
        let usual = cidr::SERVICES_V4;
        let is_small = self.services + FIRST_SERVICE < 1 << 16;
        if is_small { usual } else { Ipv4Net::new_assert(usual.network(), 12) }
    }

    /// The slice of a Service. Its first endpoint is ready or not.
    pub fn slice(self, service: u32, is_first_ready: bool) -> Value {
        self.slice_of(service, is_first_ready, |number| self.endpoint(service, number))
    }

    /// The slice of a Service whose first endpoint has been replaced for the `generation`-th time.
    pub fn slice_replaced(self, service: u32, generation: u32) -> Value {
        let first = Ipv4Addr::from(REPLACEMENTS + generation % REPLACEMENT_COUNT);
        let address = |number| if number == 0 { first } else { self.endpoint(service, number) };
        self.slice_of(service, true, address)
    }

    fn slice_of(
        self,
        service: u32,
        is_first_ready: bool,
        address: impl Fn(u32) -> Ipv4Addr,
    ) -> Value {
        let endpoints = (0..self.endpoints).map(|number| {
            let node = (service * self.endpoints + number) % NODES;
            let is_ready = number > 0 || is_first_ready;
            json!({
                "addresses": [address(number)],
                "conditions": {"ready": is_ready, "serving": is_ready, "terminating": false},
                "nodeName": format!("worker-{node:04}"),
                "targetRef": {
                    "kind": "Pod", "namespace": namespace(service),
                    "name": format!("web-{service:05}-5d59d67564-{number:05}"), "uid": uid(service),
                },
                "zone": format!("region-1{}", ["a", "b", "c"][node as usize % 3]),
            })
        });
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("web-{service:05}-x7k2p"), "generateName": format!("web-{service:05}-"),
                "namespace": namespace(service), "uid": uid(service), "resourceVersion": "1",
                "generation": 7, "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {
                    "app": "web", "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                    "kubernetes.io/service-name": format!("web-{service:05}"),
                },
                "ownerReferences": [{
                    "apiVersion": "v1", "kind": "Service", "name": format!("web-{service:05}"),
                    "uid": uid(service), "controller": true, "blockOwnerDeletion": true,
                }],
                "managedFields": managed_fields("kube-controller-manager"),
            },
            "addressType": "IPv4",
            "endpoints": endpoints.collect::<Vec<_>>(),
            "ports": [{"name": "http", "port": TARGET, "protocol": "TCP"}],
        })
    }

    /// The address of an endpoint.
    pub fn endpoint(self, service: u32, number: u32) -> Ipv4Addr {
        Ipv4Addr::from(ENDPOINTS + service * self.endpoints + number + 1)
    }
}

/// The ClusterIP of a Service.
pub fn cluster_ip(service: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(cidr::SERVICES_V4.network()) + service + FIRST_SERVICE)
}

/// The object as a client creates it: without what the server fills in, and without what would
/// have controllers change or remove it.
pub fn created(mut object: Value) -> Value {
    const OF_SERVER: [&str; 6] = [
        "uid",
        "resourceVersion",
        "generation",
        "creationTimestamp",
        "managedFields",
        "generateName",
    ];
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.retain(|key, _| !OF_SERVER.contains(&key.as_str()) && key != "ownerReferences");
        if let Some(labels) = metadata.get_mut("labels").and_then(Value::as_object_mut) {
            labels.remove("endpointslice.kubernetes.io/managed-by");
        }
    }
    if let Some(spec) = object["spec"].as_object_mut() {
        spec.remove("selector");
    }
    object
}

/// The Service of this number, as [`Size::objects`] lists it.
pub fn service(number: u32) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": format!("web-{number:05}"), "namespace": namespace(number), "uid": uid(number),
            "resourceVersion": "1", "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app": "web", "app.kubernetes.io/managed-by": "Helm", "chart": "web-1.2.3"},
            "annotations": {"meta.helm.sh/release-name": "web", "meta.helm.sh/release-namespace": namespace(number)},
            "managedFields": managed_fields("helm"),
        },
        "spec": {
            "clusterIP": cluster_ip(number), "clusterIPs": [cluster_ip(number)],
            "internalTrafficPolicy": "Cluster", "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "ports": [{"name": "http", "port": PORT, "protocol": "TCP", "targetPort": TARGET}],
            "selector": {"app": "web", "release": format!("web-{number:05}")},
            "sessionAffinity": "None", "type": "ClusterIP",
        },
        "status": {"loadBalancer": {}},
    })
}

/// The namespace of a Service.
pub fn namespace(service: u32) -> String {
    format!("team-{:02}", service % NAMESPACES)
}

fn uid(number: u32) -> String {
    format!("0b0e2c4a-5d59-4d67-8a64-{number:012}")
}

fn managed_fields(manager: &str) -> Value {
    let fields = json!({
        "f:metadata": {"f:labels": {".": {}, "f:app": {}}, "f:annotations": {".": {}}},
        "f:spec": {"f:ports": {".": {}, "k:{\"port\":80}": {".": {}, "f:name": {}, "f:port": {}}}},
    });
    json!([{
        "manager": manager, "operation": "Update", "apiVersion": "v1",
        "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1", "fieldsV1": fields,
    }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_service_has_an_address_of_the_range_that_the_objects_name() {
        for (services, range) in [(10_000, "10.96.0.0/16"), (100_000, "10.96.0.0/12")] {
            let size = Size { services, endpoints: 1 };
            assert_eq!(size.range().to_string(), range);
            assert!(size.range().contains(&cluster_ip(services - 1)), "{services}");
        }
    }

    #[test]
    fn a_replaced_endpoint_is_another_and_the_rest_stay() {
        let size = Size { services: 2, endpoints: 3 };
        let addresses = |slice: &Value| -> Vec<String> {
            let endpoints = slice["endpoints"].as_array().unwrap().iter();
            endpoints.map(|one| one["addresses"][0].as_str().unwrap().to_owned()).collect()
        };
        let before = addresses(&size.slice(1, true));
        assert_eq!(before, ["10.128.0.4", "10.128.0.5", "10.128.0.6"]);
        let after = addresses(&size.slice_replaced(1, 7));
        assert_eq!(after, ["10.192.0.7", "10.128.0.5", "10.128.0.6"]);
    }

    #[test]
    fn what_is_created_has_nothing_that_a_controller_acts_on() {
        let slice = created(Size { services: 1, endpoints: 1 }.slice(0, true));
        let labels = json!({"app": "web", "kubernetes.io/service-name": "web-00000"});
        let name = "web-00000-x7k2p";
        let metadata = json!({"name": name, "namespace": "team-00", "labels": labels});
        assert_eq!(slice["metadata"], metadata);
        assert!(created(service(0))["spec"].get("selector").is_none());
    }
}
