//! What one tenant can ask for, and what it cannot take from others.

mod claims;
mod cost;
mod limits;
mod room;

use serde_json::{Value, json};

use super::*;
use crate::model::{RefusalReason, service::parse};

fn object(name: &str, spec: Value, ingress: Vec<Value>) -> v1::Service {
    let object = json!({
        "metadata": {
            "namespace": "shop", "name": name, "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": spec,
        "status": { "loadBalancer": { "ingress": ingress } },
    });
    serde_json::from_value(object).expect("a Service")
}

fn ports(count: usize, has_node_ports: bool) -> Vec<Value> {
    let port = |n: usize| {
        let node_port = if has_node_ports { 20_000 + n } else { 0 };
        json!({ "name": format!("p{n}"), "port": n + 1, "nodePort": node_port })
    };
    (0..count).map(port).collect()
}

fn addresses(first: u8, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{first}.{}.{}.{}", n >> 16, (n >> 8) & 255, n & 255)).collect()
}

/// A Service of an age, with a spec.
fn aged(name: &str, day: u8, spec: Value, ingress: &[&str]) -> Object {
    let ingress = ingress.iter().map(|ip| json!({ "ip": ip })).collect();
    let mut object = object(name, spec, ingress);
    let created = format!("2026-01-{day:02}T00:00:00Z");
    object.metadata.creation_timestamp =
        Some(serde_json::from_value(json!(created)).expect("a time"));
    object.into()
}

fn service_cidr(prefix: &str) -> ObjectEvent {
    let object = json!({ "metadata": { "name": "services" }, "spec": { "cidrs": [prefix] } });
    let object: k8s_openapi::api::networking::v1::ServiceCIDR =
        serde_json::from_value(object).expect("a ServiceCIDR");
    ObjectEvent::Applied(object.into())
}

/// Who serves each address and port of IPv4, but for addresses as a whole.
fn served(fake: &Fake) -> Vec<String> {
    let of_ports = fake.frontends4.iter().filter(|(key, _)| key.protocol != 0);
    let of_ports = of_ports.filter(|(key, _)| key.address != Address4::default());
    let mut found: Vec<_> = of_ports
        .map(|(key, frontend)| {
            let name = fake.names[frontend.service as usize];
            let name = String::from_utf8_lossy(&name.text[..name.length.into()]).into_owned();
            format!("{}:{} {name}", Ipv4Addr::from(key.address), key.port.get())
        })
        .collect();
    found.sort();
    found
}
