//! kube-proxy, as kubeadm installs it: a DaemonSet, and the ConfigMap that its overlay of lb reads
//! too.

use serde_json::{Value, json};

use super::objects::{from_field, workload};
use super::plan::{api_server, pod_cidrs};

/// The name of its objects, in the namespace `kube-system`.
pub const NAME: &str = "kube-proxy";

/// Where the ConfigMap is mounted.
const DIRECTORY: &str = "/var/lib/kube-proxy";
/// Where a pod finds what the API server knows it by.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Its objects.
pub(super) fn objects(image: &str) -> Vec<Value> {
    let meta = json!({"name": NAME, "namespace": "kube-system"});
    let group = "rbac.authorization.k8s.io";
    vec![
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta}),
        json!({
            "apiVersion": format!("{group}/v1"),
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "kubeadm:node-proxier"},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "system:node-proxier"},
            "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": "kube-system"}],
        }),
        json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": meta,
            "data": {
                "config.conf": configuration().to_string(),
                "kubeconfig.conf": kubeconfig().to_string(),
            },
        }),
        daemon_set(image, &meta),
    ]
}

/// kubeadm's, but for what belongs to the machine and not to a node of it: the limit of tracked
/// connections, their timeouts, and the score by which the kernel chooses what to kill.
fn configuration() -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "bindAddress": "0.0.0.0",
        "clientConnection": {"kubeconfig": format!("{DIRECTORY}/kubeconfig.conf")},
        "clusterCIDR": pod_cidrs(),
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpCloseWaitTimeout": "0s",
            "tcpEstablishedTimeout": "0s",
            "udpStreamTimeout": "0s",
            "udpTimeout": "0s",
        },
        "mode": "",
        "oomScoreAdj": 0,
    })
}

fn kubeconfig() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": "default",
            "cluster": {
                "certificate-authority": format!("{ACCOUNT}/ca.crt"),
                "server": api_server(),
            },
        }],
        "users": [{"name": "default", "user": {"tokenFile": format!("{ACCOUNT}/token")}}],
        "contexts": [{
            "name": "default",
            "context": {"cluster": "default", "namespace": "default", "user": "default"},
        }],
        "current-context": "default",
    })
}

fn daemon_set(image: &str, meta: &Value) -> Value {
    let labels = json!({"k8s-app": NAME});
    let mount = |name: &str, path: &str| json!({"name": name, "mountPath": path});
    let pod = json!({
        "serviceAccountName": NAME,
        "priorityClassName": "system-node-critical",
        "hostNetwork": true,
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"operator": "Exists"}],
        "containers": [{
            "name": NAME,
            "image": image,
            "command": [
                "/usr/local/bin/kube-proxy",
                format!("--config={DIRECTORY}/config.conf"),
                "--hostname-override=$(NODE_NAME)",
            ],
            "env": [from_field("NODE_NAME", "spec.nodeName")],
            "securityContext": {"privileged": true},
            "volumeMounts": [
                mount(NAME, DIRECTORY),
                mount("xtables-lock", "/run/xtables.lock"),
            ],
        }],
        "volumes": [
            {"name": NAME, "configMap": {"name": NAME}},
            {
                "name": "xtables-lock",
                "hostPath": {"path": "/run/xtables.lock", "type": "FileOrCreate"},
            },
        ],
    });
    workload("DaemonSet", meta, &labels, &pod)
}
