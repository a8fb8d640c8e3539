//! Traefik in the test's namespace: an ingress controller, and its Service of type LoadBalancer.

use std::net::IpAddr;

use anyhow::{Context, Result};
use lb_tests::harness::real::objects::{http_probe, workload};
use serde_json::{Value, json};

use crate::world::World;

/// The name of its Service and of everything else that it has.
pub(crate) const NAME: &str = "traefik";
/// The ports of its Service.
pub(crate) const HTTP: u16 = 80;
/// See [`HTTP`].
pub(crate) const HTTPS: u16 = 443;

/// Reaches backends by their Services' ClusterIPs, which lb serves, and not by their pods.
const ARGUMENTS: [&str; 11] = [
    "--entrypoints.web.address=:8000",
    "--entrypoints.websecure.address=:8443",
    "--entrypoints.websecure.http.tls=true",
    "--entrypoints.traefik.address=:9000",
    "--ping=true",
    "--accesslog=true",
    "--accesslog.format=json",
    "--providers.kubernetesingress.nativelbbydefault=true",
    "--providers.kubernetesingress.strictprefixmatching=true",
    "--global.checknewversion=false",
    "--global.sendanonymoususage=false",
];

/// Installs Traefik on a node for a test, and removes what is not in the test's namespace after
/// it.
pub(crate) fn with(world: &World, node: &str, test: impl FnOnce() -> Result<()>) -> Result<()> {
    let read = ["get", "list", "watch"];
    let rules = json!([
        {"apiGroups": [""], "resources": ["services", "secrets", "nodes"], "verbs": read},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": read},
        {
            "apiGroups": ["networking.k8s.io"],
            "resources": ["ingresses", "ingressclasses"],
            "verbs": read,
        },
        {"apiGroups": ["networking.k8s.io"], "resources": ["ingresses/status"], "verbs": ["update"]},
    ]);
    world.with_cluster_objects(&world.role(NAME, &rules), || {
        world.apply(&objects(world, node)?)?;
        test()
    })
}

/// The client addresses in Traefik's log of requests for a path.
pub(crate) fn logged_clients(world: &World, path: &str) -> Result<Vec<IpAddr>> {
    let log = world.kubectl(&["logs", &format!("deployment/{NAME}")])?;
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let client = |line: Value| {
        let host = line["ClientHost"].as_str().with_context(|| format!("no client in {line}"))?;
        host.parse().with_context(|| format!("{host} is no address"))
    };
    lines.filter(|line| line["RequestPath"] == path).map(client).collect()
}

fn objects(world: &World, node: &str) -> Result<[Value; 3]> {
    let labels = json!({"app": NAME});
    let namespace = format!("--providers.kubernetesingress.namespaces={}", world.namespace());
    let arguments = [&ARGUMENTS[..], &[&namespace]].concat();
    let port = |name: &str, port: u16, target: u16| json!({"name": name, "port": port, "targetPort": target});
    let meta = json!({"name": NAME});
    let pod = json!({
        "serviceAccountName": NAME,
        "nodeSelector": {"kubernetes.io/hostname": node},
        "terminationGracePeriodSeconds": 1,
        "containers": [{
            "name": NAME,
            "image": world.real.image("/traefik:")?,
            "args": arguments,
            "readinessProbe": http_probe("/ping", 9000),
        }],
    });
    Ok([
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta}),
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": meta,
            "spec": {
                "type": "LoadBalancer",
                "externalTrafficPolicy": "Local",
                "ipFamilyPolicy": "RequireDualStack",
                "selector": labels,
                "ports": [port("http", HTTP, 8000), port("https", HTTPS, 8443)],
            },
        }),
        workload("Deployment", &meta, &labels, &pod),
    ])
}
