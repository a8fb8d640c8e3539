//! Objects that tests create: servers that tell which client they see, and their Services.

use serde_json::{Value, json};

use super::images::ECHO;
use super::plan::node_name;

/// The port that servers listen on, TCP and UDP.
pub const TARGET: u16 = 8080;
/// The port that servers listen on for HTTP.
pub const TARGET_HTTP: u16 = 8000;
/// The ports of Services, TCP and UDP, and for HTTP.
pub const PORT: u16 = 80;
/// See [`PORT`].
pub const HTTP: u16 = 8000;

/// Servers of a name, which is the value of the label `app` of their pods.
#[derive(Clone, Copy, Debug)]
pub struct App<'a> {
    /// The name.
    pub name: &'a str,
    /// How many pods.
    pub replicas: u8,
    /// The only node that they run on.
    pub node: Option<u8>,
    /// How long a pod goes on serving after its end was asked for.
    pub grace: u16,
}

impl<'a> App<'a> {
    /// Pods on any node, which end after a second.
    pub fn new(name: &'a str, replicas: u8) -> Self {
        Self { name, replicas, node: None, grace: 1 }
    }

    /// On this node alone.
    #[must_use]
    pub fn on(self, node: u8) -> Self {
        Self { node: Some(node), ..self }
    }

    /// With so many seconds until the pod is killed; it serves as long.
    #[must_use]
    pub fn grace(self, seconds: u16) -> Self {
        Self { grace: seconds, ..self }
    }

    /// A Deployment.
    pub fn deployment(self) -> Value {
        self.workload("Deployment")
    }

    /// A StatefulSet behind a headless Service of the same name.
    pub fn stateful_set(self) -> Value {
        let mut set = self.workload("StatefulSet");
        set["spec"]["serviceName"] = json!(self.name);
        set["spec"]["podManagementPolicy"] = json!("Parallel");
        set
    }

    fn workload(self, kind: &str) -> Value {
        let labels = json!({"app": self.name});
        let node = self.node.map(|node| json!({"kubernetes.io/hostname": node_name(node)}));
        let ports = [("--tcp", TARGET), ("--udp", TARGET), ("--http", TARGET_HTTP)];
        let ports = ports.iter().flat_map(|(flag, port)| [(*flag).to_owned(), port.to_string()]);
        let arguments = ["serve", "--name", "$(POD_NAME)"].map(str::to_owned);
        let arguments: Vec<String> = arguments.into_iter().chain(ports).collect();
        let pod = json!({
            "nodeSelector": node,
            "terminationGracePeriodSeconds": self.grace,
            "topologySpreadConstraints": [spread(&labels)],
            "containers": [{
                "name": "server",
                "image": ECHO,
                "args": arguments,
                "env": [from_field("POD_NAME", "metadata.name")],
                // Without a request a pod gets next to nothing of a busy machine.
                "resources": {"requests": {"cpu": "100m"}},
                "readinessProbe": {
                    "tcpSocket": {"port": TARGET},
                    "periodSeconds": 1,
                    "timeoutSeconds": 5,
                },
            }],
        });
        let mut workload = workload(kind, &json!({"name": self.name}), &labels, &pod);
        workload["spec"]["replicas"] = json!(self.replicas);
        workload
    }
}

/// A Deployment, DaemonSet or StatefulSet of pods with these labels and this spec.
pub fn workload(kind: &str, metadata: &Value, labels: &Value, pod: &Value) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": metadata,
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    })
}

/// An environment variable with the value of a field of the pod.
pub fn from_field(name: &str, path: &str) -> Value {
    json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}})
}

/// A readiness probe that asks once a second.
pub fn http_probe(path: &str, port: u16) -> Value {
    json!({"httpGet": {"path": path, "port": port}, "periodSeconds": 1})
}

/// A constraint that spreads the pods with these labels over the nodes where that is possible.
pub(super) fn spread(labels: &Value) -> Value {
    json!({
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": labels},
    })
}

/// A dual-stack Service of the pods of `app`; change what is to be different.
pub fn service(name: &str, app: &str, kind: &str) -> Value {
    let port = |name: &str, protocol: &str, port: u16, target: u16| json!({"name": name, "protocol": protocol, "port": port, "targetPort": target});
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "type": kind,
            "ipFamilyPolicy": "RequireDualStack",
            "selector": {"app": app},
            "ports": [
                port("tcp", "TCP", PORT, TARGET),
                port("udp", "UDP", PORT, TARGET),
                port("http", "TCP", HTTP, TARGET_HTTP),
            ],
        },
    })
}

/// A document of several objects.
pub fn list(items: &[Value]) -> String {
    json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string()
}
