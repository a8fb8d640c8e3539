//! flannel, as its administrator installs it: a DaemonSet that writes the configuration of the CNI
//! plug-ins and keeps a VXLAN device, its routes and the masquerade rules of each node.

use serde_json::{Value, json};

use super::cni::{CONFIGURATION, PLUGINS};
use super::objects::{from_field, workload};
use super::plan::{API_PORT, control_plane};
use crate::harness::netns::topology::plan::cidr;

/// The namespace of its objects.
pub(super) const NAMESPACE: &str = "kube-flannel";
/// The name of its objects.
pub(super) const NAME: &str = "flannel";

/// Its objects. flanneld finds the API server by the ClusterIP, or with `direct` by its address,
/// where nobody serves Services.
pub(super) fn objects(image: &str, direct: bool) -> Vec<Value> {
    let meta = json!({"name": NAME, "namespace": NAMESPACE});
    let group = "rbac.authorization.k8s.io";
    vec![
        json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": NAMESPACE,
                "labels": {"pod-security.kubernetes.io/enforce": "privileged"},
            },
        }),
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta}),
        json!({
            "apiVersion": format!("{group}/v1"),
            "kind": "ClusterRole",
            "metadata": {"name": NAME},
            "rules": [
                {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]},
                {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
                {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
            ],
        }),
        json!({
            "apiVersion": format!("{group}/v1"),
            "kind": "ClusterRoleBinding",
            "metadata": {"name": NAME},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": NAME},
            "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}],
        }),
        json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": meta,
            "data": {"cni-conf.json": plugins(), "net-conf.json": network()},
        }),
        daemon_set(image, direct, &meta),
    ]
}

/// The configuration of the CNI plug-ins: flannel's writes that of the bridge plug-in from what
/// flanneld says about the node.
fn plugins() -> String {
    let list = json!({
        "name": "cbr0",
        // The plug-in knows none after 0.4.0; flannel's own manifest has this one.
        "cniVersion": "0.3.1",
        "plugins": [
            {"type": "flannel", "delegate": {"hairpinMode": true, "isDefaultGateway": true}},
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    list.to_string()
}

fn network() -> String {
    let network = json!({
        "Network": cidr::PODS_V4.to_string(),
        "EnableIPv6": true,
        "IPv6Network": cidr::PODS_V6.to_string(),
        "Backend": {"Type": "vxlan"},
    });
    network.to_string()
}

fn daemon_set(image: &str, direct: bool, meta: &Value) -> Value {
    let labels = json!({"app": NAME});
    let mut environment = vec![
        from_field("POD_NAME", "metadata.name"),
        from_field("POD_NAMESPACE", "metadata.namespace"),
    ];
    if direct {
        let value = |name: &str, value: String| json!({"name": name, "value": value});
        environment.push(value("KUBERNETES_SERVICE_HOST", control_plane().v4.to_string()));
        environment.push(value("KUBERNETES_SERVICE_PORT", API_PORT.to_string()));
    }
    let mount = |name: &str, path: &str| json!({"name": name, "mountPath": path});
    let copy = |name: &str, from: &str, to: String, mounts: [Value; 2]| {
        json!({
            "name": name,
            "image": image,
            "command": ["cp", "-f", from, to],
            "volumeMounts": mounts,
        })
    };
    let settings = mount("settings", "/etc/kube-flannel");
    let of_host = |name: &str, path: &str, kind: &str| json!({"name": name, "hostPath": {"path": path, "type": kind}});
    let pod = json!({
        "serviceAccountName": NAME,
        "priorityClassName": "system-node-critical",
        "hostNetwork": true,
        "tolerations": [{"operator": "Exists", "effect": "NoSchedule"}],
        "initContainers": [
            copy(
                "install-plugin",
                "/flannel",
                format!("{PLUGINS}/flannel"),
                [mount("plugins", PLUGINS), settings.clone()],
            ),
            copy(
                "install-configuration",
                "/etc/kube-flannel/cni-conf.json",
                format!("{CONFIGURATION}/10-flannel.conflist"),
                [mount("configuration", CONFIGURATION), settings.clone()],
            ),
        ],
        "containers": [{
            "name": NAME,
            "image": image,
            "args": ["--ip-masq", "--kube-subnet-mgr"],
            "env": environment,
            "resources": {"requests": {"cpu": "100m", "memory": "50Mi"}},
            "securityContext": {
                "privileged": false,
                "capabilities": {"add": ["NET_ADMIN", "NET_RAW"]},
            },
            "volumeMounts": [
                mount("run", "/run/flannel"),
                mount("lock", "/run/xtables.lock"),
                settings,
            ],
        }],
        "volumes": [
            of_host("run", "/run/flannel", "DirectoryOrCreate"),
            of_host("lock", "/run/xtables.lock", "FileOrCreate"),
            of_host("plugins", PLUGINS, "Directory"),
            of_host("configuration", CONFIGURATION, "DirectoryOrCreate"),
            {"name": "settings", "configMap": {"name": NAME}},
        ],
    });
    workload("DaemonSet", meta, &labels, &pod)
}
