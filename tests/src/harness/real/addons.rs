//! What a cluster's administrator installs: lb from its manifests, CoreDNS, an example.

use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::kubectl::Kubectl;
use super::node::cgroup_of_nodes;
use super::objects::{http_probe, list, spread, workload};
use super::plan::{self, CLUSTER_DNS, Plan};

/// lb's manifests.
const MANIFESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests");

/// The namespace of the example, and its names.
pub const EXAMPLE: &str = "example";
/// The node port of the example.
pub const EXAMPLE_PORT: u16 = 30_080;

/// Writes an overlay over `manifests/base` with what this cluster needs, and returns its
/// directory, for `kubectl apply -k`.
fn overlay_of_lb(plan: &Plan) -> Result<PathBuf> {
    let directory = plan.directory().join("overlay");
    let settings = [
        ("LB_MASTER", plan::api_server()),
        ("LB_CLUSTER_CIDR", plan::pod_cidrs()),
        cgroup(plan)?,
        // The limit is the machine's.
        ("LB_CONNTRACK_MAX_PER_CORE", "0".to_owned()),
    ];
    write_overlay(&directory, "base", "create", &settings)?;
    Ok(directory)
}

/// Writes a directory with `manifests/overlays/kubeadm` in it, from which the commands of
/// docs/install.md can be run: the overlay of this repository, and the setting that a machine with
/// several nodes needs.
///
/// # Errors
/// It cannot be written.
pub fn write_clone(plan: &Plan) -> Result<PathBuf> {
    let clone = plan.directory().join("clone");
    let path = "overlays/kubeadm";
    write_overlay(&clone.join("manifests").join(path), path, "merge", &[cgroup(plan)?])?;
    let component = "components/labelled-nodes";
    let (from, to) =
        (Path::new(MANIFESTS).join(component), clone.join("manifests").join(component));
    fs::create_dir_all(&to).with_context(|| format!("cannot make {}", to.display()))?;
    fs::copy(from.join(KUSTOMIZATION), to.join(KUSTOMIZATION))
        .with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(clone)
}

/// The name of kustomize's file.
const KUSTOMIZATION: &str = "kustomization.yaml";

/// The node's part of the machine's cgroups, and no more.
fn cgroup(plan: &Plan) -> Result<(&'static str, String)> {
    Ok(("LB_CGROUP", format!("{}/$(NODE_NAME)", cgroup_of_nodes(plan)?.display())))
}

/// Writes an overlay over another one of `manifests`, or over its base, which makes the ConfigMap
/// of the agent or adds to it.
fn write_overlay(
    directory: &Path,
    over: &str,
    behavior: &str,
    settings: &[(&str, String)],
) -> Result<()> {
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let below = Path::new(MANIFESTS).join(over);
    let below =
        fs::canonicalize(&below).with_context(|| format!("cannot find {}", below.display()))?;
    let literals: Vec<String> =
        settings.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [relative(directory, &below)],
        "configMapGenerator": [{
            "name": "lb-agent",
            "namespace": "kube-system",
            "behavior": behavior,
            "literals": literals,
        }],
    });
    let file = directory.join(KUSTOMIZATION);
    fs::write(&file, kustomization.to_string())
        .with_context(|| format!("cannot write {}", file.display()))
}

/// Installs lb, without waiting for it.
pub(super) fn install_lb(kubectl: &Kubectl, plan: &Plan) -> Result<()> {
    let overlay = overlay_of_lb(plan)?;
    let overlay = overlay.to_str().context("a directory that is no text")?;
    kubectl.run(&["apply", "--server-side", "-k", overlay]).map(drop)
}

/// Installs CoreDNS from an image that the nodes have, without waiting for it.
pub(super) fn install_dns(kubectl: &Kubectl, image: &str) -> Result<()> {
    kubectl.apply(&list(&dns(image)))
}

/// A Deployment with a Service of every kind of address, and its namespace.
pub(super) fn install_example(kubectl: &Kubectl, image: &str) -> Result<()> {
    let labels = json!({"app": EXAMPLE});
    let meta = json!({"name": "web", "namespace": EXAMPLE});
    let pod = json!({
        "terminationGracePeriodSeconds": 1,
        "containers": [{
            "name": "web",
            "image": image,
            "args": ["netexec", "--http-port=8080", "--udp-port=8080"],
            "readinessProbe": http_probe("/healthz", 8080),
        }],
    });
    let mut web = workload("Deployment", &meta, &labels, &pod);
    web["spec"]["replicas"] = json!(3);
    let objects = [
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": EXAMPLE}}),
        web,
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": meta,
            "spec": {
                "type": "NodePort",
                "ipFamilyPolicy": "PreferDualStack",
                "selector": labels,
                "ports": [{"port": 80, "targetPort": 8080, "nodePort": EXAMPLE_PORT}],
            },
        }),
    ];
    kubectl.apply(&list(&objects))
}

/// As kubeadm installs it, without what asks servers outside.
fn dns(image: &str) -> Vec<Value> {
    let meta = json!({"name": "coredns", "namespace": "kube-system"});
    let labels = json!({"k8s-app": "kube-dns"});
    let corefile = ".:53 {\n    errors\n    health\n    ready\n    kubernetes cluster.local \
        in-addr.arpa ip6.arpa {\n        pods insecure\n        fallthrough in-addr.arpa \
        ip6.arpa\n        ttl 30\n    }\n    cache 30\n    loop\n    reload\n    loadbalance\n}\n";
    let read = |group: &str, resources: &[&str]| json!({"apiGroups": [group], "resources": resources, "verbs": ["list", "watch"]});
    vec![
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta}),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "system:coredns"},
            "rules": [
                read("", &["endpoints", "services", "pods", "namespaces"]),
                read("discovery.k8s.io", &["endpointslices"]),
            ],
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "system:coredns"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "system:coredns",
            },
            "subjects": [{"kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system"}],
        }),
        json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": meta,
            "data": {"Corefile": corefile},
        }),
        dns_deployment(image, &meta, &labels),
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": labels},
            "spec": {
                "selector": labels,
                "clusterIP": CLUSTER_DNS,
                "ports": [
                    {"name": "dns", "port": 53, "protocol": "UDP"},
                    {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
                    {"name": "metrics", "port": 9153, "protocol": "TCP"},
                ],
            },
        }),
    ]
}

fn dns_deployment(image: &str, meta: &Value, labels: &Value) -> Value {
    let pod = json!({
        "serviceAccountName": "coredns",
        "priorityClassName": "system-cluster-critical",
        "dnsPolicy": "Default",
        "topologySpreadConstraints": [spread(labels)],
        "containers": [{
            "name": "coredns",
            "image": image,
            "args": ["-conf", "/etc/coredns/Corefile"],
            "readinessProbe": http_probe("/ready", 8181),
            "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns", "readOnly": true}],
        }],
        "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
    });
    let mut deployment = workload("Deployment", meta, labels, &pod);
    deployment["spec"]["replicas"] = json!(2);
    deployment
}

/// The way from one absolute directory to another, which is all that kustomize takes.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let names =
        |path: &Path| path.components().filter(|part| matches!(part, Component::Normal(_))).count();
    let up = std::iter::repeat_n("..", names(from));
    up.collect::<PathBuf>().join(to.strip_prefix("/").unwrap_or(to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_way_goes_by_the_root() {
        let way = relative(Path::new("/var/cache/lb/overlay"), Path::new("/src/lb/manifests"));
        assert_eq!(way, Path::new("../../../../src/lb/manifests"));
    }
}
