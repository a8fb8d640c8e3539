//! Admits the objects that concern this proxy, and drops the fields that lb does not read.
//!
//! It does not validate: it passes on the other fields unchanged. Invariant: two objects that
//! differ only in fields that are not read are equal afterwards.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        core::v1::{Node, NodeSpec, NodeStatus, Service, ServiceStatus},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use lb_control::model::{
    event::{Object, ObjectKind},
    keys::{self, Key},
};

/// The label selector of the objects of a kind, as an API server takes it.
pub fn selector(kind: ObjectKind) -> Option<String> {
    let labels: Vec<_> = keys::excluding(kind).iter().map(|label| format!("!{label}")).collect();
    (!labels.is_empty()).then(|| labels.join(","))
}

/// The object without the fields that are not read; none if its labels exclude it.
pub fn admit(mut object: Object) -> Option<Object> {
    if is_excluded(&object) {
        return None;
    }
    strip_metadata(object.metadata_mut());
    match &mut object {
        Object::Service(service) => strip_service(service),
        Object::EndpointSlice(slice) => strip_slice(slice),
        Object::Node(node) => strip_node(node),
        Object::ServiceCidr(range) => range.status = None,
    }
    Some(object)
}

fn is_excluded(object: &Object) -> bool {
    let has = |label: &Key| label.label(object.metadata()).is_some();
    keys::excluding(object.kind()).iter().any(has)
}

fn strip_metadata(metadata: &mut ObjectMeta) {
    let taken = std::mem::take(metadata);
    *metadata = ObjectMeta {
        name: taken.name,
        namespace: taken.namespace,
        uid: taken.uid,
        creation_timestamp: taken.creation_timestamp,
        deletion_timestamp: taken.deletion_timestamp,
        labels: kept(taken.labels),
        annotations: kept(taken.annotations),
        ..ObjectMeta::default()
    };
}

fn kept(entries: Option<BTreeMap<String, String>>) -> Option<BTreeMap<String, String>> {
    let mut entries = entries?;
    entries.retain(|key, _| keys::is_kept(key));
    (!entries.is_empty()).then_some(entries)
}

fn strip_service(service: &mut Service) {
    if let Some(spec) = &mut service.spec {
        spec.selector = None;
    }
    if let Some(status) = service.status.take()
        && status.load_balancer.is_some()
    {
        service.status =
            Some(ServiceStatus { load_balancer: status.load_balancer, ..ServiceStatus::default() });
    }
}

fn strip_slice(slice: &mut EndpointSlice) {
    // The uid of a slice is never shown, and there are many slices.
    slice.metadata.uid = None;
    slice.metadata.creation_timestamp = None;
    for endpoint in slice.endpoints.iter_mut().flatten() {
        endpoint.addresses.truncate(1);
        endpoint.addresses.shrink_to_fit();
        endpoint.deprecated_topology = None;
        endpoint.hostname = None;
        endpoint.target_ref = None;
    }
    if let Some(endpoints) = &mut slice.endpoints {
        endpoints.shrink_to_fit();
    }
}

fn strip_node(node: &mut Node) {
    if let Some(spec) = node.spec.take() {
        node.spec = Some(NodeSpec {
            pod_cidr: spec.pod_cidr,
            pod_cidrs: spec.pod_cidrs,
            taints: spec.taints,
            ..NodeSpec::default()
        });
    }
    if let Some(status) = node.status.take() {
        node.status = Some(NodeStatus { addresses: status.addresses, ..NodeStatus::default() });
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
    };

    use k8s_openapi::api::networking::v1::ServiceCIDR;
    use lb_control::model::keys::{HEADLESS_LABEL, PROXY_NAME_LABEL};
    use serde_json::json;

    use super::*;

    fn service(labels: serde_json::Value) -> Object {
        let service: Service = serde_json::from_value(json!({
            "metadata": {
                "name": "web", "namespace": "default", "labels": labels,
                "resourceVersion": "7", "managedFields": [{"manager": "kubectl"}],
                "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"},
            },
            "spec": {"clusterIP": "10.0.0.1", "selector": {"app": "web"}},
        }))
        .unwrap();
        service.into()
    }

    #[test]
    fn a_service_of_another_proxy_is_dropped() {
        assert_eq!(admit(service(json!({PROXY_NAME_LABEL: "mesh"}))), None);
        assert!(admit(service(json!({"app": "web"}))).is_some());
    }

    #[test]
    fn slices_of_headless_services_and_of_other_proxies_are_dropped() {
        for label in [HEADLESS_LABEL, PROXY_NAME_LABEL] {
            let slice: EndpointSlice = serde_json::from_value(json!({
                "metadata": {"name": "web-1", "labels": {label: ""}},
                "addressType": "IPv4", "endpoints": [],
            }))
            .unwrap();
            assert_eq!(admit(slice.into()), None, "{label}");
        }
    }

    #[test]
    fn objects_that_differ_in_unread_fields_become_equal() {
        let other = match service(json!({"app": "other"})) {
            Object::Service(mut service) => {
                service.metadata.resource_version = Some("8".to_owned());
                service.metadata.managed_fields = None;
                service.metadata.annotations = None;
                Object::Service(service)
            }
            _ => unreachable!(),
        };
        assert_eq!(admit(service(json!({}))), admit(other));
    }

    #[test]
    fn every_key_that_the_model_reads_is_kept() {
        let keys: BTreeMap<String, String> =
            keys::KEPT.iter().map(|key| (key.to_string(), "value".to_owned())).collect();
        let mut all = keys.clone();
        all.insert("other".to_owned(), "value".to_owned());
        for mut object in [
            Object::from(Service::default()),
            EndpointSlice::default().into(),
            Node::default().into(),
            ServiceCIDR::default().into(),
        ] {
            object.metadata_mut().labels = Some(all.clone());
            object.metadata_mut().annotations = Some(all.clone());
            let admitted = admit(object).expect("an object that no label excludes");
            let metadata = admitted.metadata();
            assert_eq!(metadata.labels.as_ref(), Some(&keys), "{}", admitted.kind());
            assert_eq!(metadata.annotations.as_ref(), Some(&keys), "{}", admitted.kind());
        }
    }

    /// The sources below a directory, but tests, that read labels or annotations.
    fn readers(directory: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.file_stem().is_some_and(|name| name == "tests") {
                continue;
            } else if path.is_dir() {
                found.extend(readers(&path));
            } else {
                let text = fs::read_to_string(&path).unwrap();
                let is_reader = text.contains(".labels") || text.contains(".annotations");
                found.extend(is_reader.then_some(path));
            }
        }
        found
    }

    #[test]
    fn the_model_reads_labels_and_annotations_through_its_list_of_keys() {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lb-control/src");
        assert_eq!(readers(&sources), [sources.join("model/keys.rs")]);
    }

    #[test]
    fn the_selectors_leave_out_headless_services_and_those_of_other_proxies() {
        let proxy_name = "!service.kubernetes.io/service-proxy-name";
        assert_eq!(selector(ObjectKind::Service).as_deref(), Some(proxy_name));
        let slices = format!("!service.kubernetes.io/headless,{proxy_name}");
        assert_eq!(selector(ObjectKind::EndpointSlice), Some(slices));
        assert_eq!((selector(ObjectKind::Node), selector(ObjectKind::ServiceCidr)), (None, None));
    }

    #[test]
    fn a_heartbeat_of_a_node_changes_nothing() {
        let node = |heartbeat: &str| {
            let node: Node = serde_json::from_value(json!({
                "metadata": {"name": "one", "labels": {"topology.kubernetes.io/zone": "a"}},
                "spec": {"podCIDR": "10.1.0.0/24"},
                "status": {
                    "addresses": [{"type": "InternalIP", "address": "192.168.0.1"}],
                    "conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": heartbeat}],
                },
            }))
            .unwrap();
            admit(node.into())
        };
        let one = node("2026-01-01T00:00:00Z");
        assert_eq!(one, node("2026-01-01T00:05:00Z"));
        let Some(Object::Node(one)) = one else { panic!("a node is never dropped") };
        assert_eq!(one.metadata.labels.map(|labels| labels.len()), Some(1));
        assert_eq!(one.status.and_then(|status| status.addresses).map(|all| all.len()), Some(1));
    }
}
