//! MetalLB in the test's namespace: the controller gives LoadBalancer Services addresses of a
//! pool, the speaker on a node announces them in the network of the nodes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};
use lb_tests::harness::netns::topology::plan::{Addresses, Family};
use lb_tests::harness::real::objects::{from_field, http_probe, workload};
use lb_tests::harness::wait::eventually;
use serde_json::{Value, json};

use crate::world::World;

/// The first and the last address of the pool, in the subnet of nodes and client.
const POOL: [Addresses; 2] = [pool(200), pool(203)];

const GROUP: &str = "metallb.io";
const NAME: &str = "metallb";
const CONTROLLER: &str = "controller";
const SPEAKER: &str = "speaker";

/// Every kind that the programs ask for, with its plural and versions, of which the last one is
/// stored.
const KINDS: [(&str, &str, &[&str]); 8] = [
    ("BFDProfile", "bfdprofiles", &["v1beta1"]),
    ("BGPAdvertisement", "bgpadvertisements", &["v1beta1"]),
    ("BGPPeer", "bgppeers", &["v1beta1", "v1beta2"]),
    ("Community", "communities", &["v1beta1"]),
    ("IPAddressPool", "ipaddresspools", &["v1beta1"]),
    ("L2Advertisement", "l2advertisements", &["v1beta1"]),
    ("ServiceBGPStatus", "servicebgpstatuses", &["v1beta1"]),
    ("ServiceL2Status", "servicel2statuses", &["v1beta1"]),
];

const fn pool(number: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(172, 18, 0, number),
        v6: Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, number as u16),
    }
}

/// Installs MetalLB for a test, and removes what is not in the test's namespace after it.
pub(crate) fn with(world: &World, test: impl FnOnce() -> Result<()>) -> Result<()> {
    world.with_cluster_objects(&cluster_objects(world), || {
        let names = KINDS.map(|(_, plural, _)| format!("crd/{plural}.{GROUP}"));
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let wait = ["wait", "--for=condition=Established", "--timeout=60s"];
        world.kubectl(&[&wait[..], &names[..]].concat())?;
        world.apply(&objects(world)?)?;
        world.roll_out(&format!("daemonset/{SPEAKER}"))?;
        test()
    })
}

/// The addresses that a Service gets.
pub(crate) fn addresses(world: &World, service: &str) -> Result<Addresses> {
    let addresses = eventually(|| {
        let object = world.get_object(&["service", service])?;
        let ips = object["status"]["loadBalancer"]["ingress"].as_array().into_iter().flatten();
        let ips: Vec<&str> = ips.filter_map(|entry| entry["ip"].as_str()).collect();
        let v4 = ips.iter().find_map(|ip| ip.parse().ok());
        let v6 = ips.iter().find_map(|ip| ip.parse().ok());
        let missing = || format!("{service} has not an address of each family: {ips:?}");
        Ok(Addresses { v4: v4.with_context(missing)?, v6: v6.with_context(missing)? })
    })?;
    for family in Family::ALL {
        let [first, last] = POOL.map(|addresses| addresses.get(family));
        let address = addresses.get(family);
        ensure!((first..=last).contains(&address), "{address} is not in {first} to {last}");
    }
    world.wait_rows(service, "a frontend of the load balancer", |row| {
        let frontends = row["frontends"].to_string();
        Family::ALL.iter().any(|family| frontends.contains(&addresses.get(*family).to_string()))
    })?;
    Ok(addresses)
}

/// The hardware address that the client outside has learnt for an address by ARP or NDP.
pub(crate) fn announced_by(world: &World, address: IpAddr) -> Result<String> {
    let family = if address.is_ipv4() { "-4" } else { "-6" };
    let shown =
        world.run_outside("ip", &[family, "-json", "neigh", "show", &address.to_string()])?;
    let neighbours: Value = serde_json::from_str(&shown).context("ip printed no JSON")?;
    let hardware = neighbours[0]["lladdr"].as_str().map(str::to_owned);
    hardware.with_context(|| format!("nobody announces {address}: {neighbours}"))
}

fn cluster_objects(world: &World) -> Vec<Value> {
    let mut objects: Vec<Value> = KINDS.iter().map(definition).collect();
    let read = ["get", "list", "watch"];
    let rules = json!([
        {
            "apiGroups": [""],
            "resources": ["services", "nodes", "namespaces", "pods", "secrets", "configmaps"],
            "verbs": read,
        },
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": read},
        {"apiGroups": [""], "resources": ["services/status"], "verbs": ["update"]},
        {"apiGroups": ["", "events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch"]},
        {"apiGroups": [GROUP], "resources": ["*"], "verbs": ["*"]},
    ]);
    objects.extend(world.role(NAME, &rules));
    objects
}

/// The API server need not know what the fields are.
fn definition((kind, plural, versions): &(&str, &str, &[&str])) -> Value {
    let version = |name: &&str| {
        json!({
            "name": name,
            "served": true,
            "storage": versions.last() == Some(name),
            "subresources": {"status": {}},
            "schema": {"openAPIV3Schema": {
                "type": "object",
                "x-kubernetes-preserve-unknown-fields": true,
            }},
        })
    };
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.{GROUP}")},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase()},
            "versions": versions.iter().map(version).collect::<Vec<_>>(),
        },
    })
}

fn objects(world: &World) -> Result<Vec<Value>> {
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": NAME}});
    let ranges = Family::ALL.map(|family| {
        let [first, last] = POOL.map(|addresses| addresses.get(family));
        format!("{first}-{last}")
    });
    let own = |kind: &str, spec: Value| {
        json!({
            "apiVersion": format!("{GROUP}/v1beta1"),
            "kind": kind,
            "metadata": {"name": NAME},
            "spec": spec,
        })
    };
    let controller = program(world, "Deployment", CONTROLLER, &["--webhook-mode=disabled"])?;
    let mut speaker = program(world, "DaemonSet", SPEAKER, &[])?;
    speaker["spec"]["template"]["spec"]["hostNetwork"] = json!(true);
    Ok(vec![
        account,
        own("IPAddressPool", json!({"addresses": ranges})),
        own("L2Advertisement", json!({})),
        controller,
        speaker,
    ])
}

/// One of the two programs. Without an address to bind to, speakers do not watch each other.
fn program(world: &World, kind: &str, name: &str, arguments: &[&str]) -> Result<Value> {
    let pod = json!({
        "serviceAccountName": NAME,
        "terminationGracePeriodSeconds": 1,
        "containers": [{
            "name": name,
            "image": world.real.image(&format!("metallb/{name}:"))?,
            "args": arguments,
            "env": [
                from_field("METALLB_NAMESPACE", "metadata.namespace"),
                from_field("METALLB_POD_NAME", "metadata.name"),
                from_field("METALLB_NODE_NAME", "spec.nodeName"),
            ],
            "securityContext": {"capabilities": {"drop": ["ALL"], "add": ["NET_RAW"]}},
            "readinessProbe": http_probe("/metrics", 7472),
        }],
    });
    Ok(workload(kind, &json!({"name": name}), &json!({"app": name}), &pod))
}
