//! The objects of a small cluster in which everything gets in the way of everything else.

use std::collections::BTreeMap;

use super::*;

/// How many objects of each kind there may be.
pub(super) const COUNT: u8 = 6;

/// Random bits, which decide about the fields of an object, lowest first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draw(pub(super) u32);

impl Draw {
    /// A number below `count`, which has so many bits.
    fn below(&mut self, count: u32) -> u32 {
        let drawn = self.0 % count;
        self.0 /= count;
        drawn
    }

    fn is(&mut self) -> bool {
        self.below(2) == 1
    }
}

/// What is true: the last readable version of each object.
#[derive(Debug, Default)]
pub(super) struct World {
    objects: BTreeMap<(ObjectKind, ObjectName), Object>,
}

impl World {
    pub(super) fn apply(&mut self, event: &ObjectEvent) {
        let key = |object: &Object| (object.kind(), object.name());
        match event {
            ObjectEvent::Applied(object) => {
                self.objects.insert(key(object), object.clone());
            }
            ObjectEvent::Deleted(kind, name) => self.delete(*kind, |other| other == name),
            ObjectEvent::Replaced(kind, objects) => self.replace(*kind, objects, &[]),
            ObjectEvent::ReplacedExcept(kind, objects, unreadable) => {
                self.replace(*kind, objects, unreadable);
            }
            ObjectEvent::Unreadable(..) => {}
        }
    }

    fn replace(&mut self, kind: ObjectKind, objects: &[Object], unreadable: &[Unreadable]) {
        let is_kept = |name: &ObjectName| {
            objects.iter().any(|object| object.name() == *name)
                || unreadable.iter().any(|object| object.name == *name)
        };
        self.delete(kind, |name| !is_kept(name));
        for object in objects {
            self.objects.insert((kind, object.name()), object.clone());
        }
    }

    fn delete(&mut self, kind: ObjectKind, is_gone: impl Fn(&ObjectName) -> bool) {
        // The last state of the own Node stays.
        let stays = |name: &ObjectName| kind == ObjectKind::Node && name.name == "here";
        self.objects.retain(|(of, name), _| *of != kind || stays(name) || !is_gone(name));
    }

    pub(super) fn get(&self, kind: ObjectKind, number: u8) -> Option<Object> {
        self.objects.get(&(kind, name(kind, number))).cloned()
    }
}

pub(super) fn name(kind: ObjectKind, number: u8) -> ObjectName {
    let (namespace, name) = match kind {
        ObjectKind::Service => ("shop", format!("s{number}")),
        ObjectKind::EndpointSlice => ("shop", format!("e{number}")),
        ObjectKind::Node if number == 0 => ("", "here".to_owned()),
        ObjectKind::Node => ("", format!("n{number}")),
        ObjectKind::ServiceCidr => ("", format!("c{number}")),
    };
    ObjectName { namespace: namespace.to_owned(), name }
}

pub(super) fn unreadable(kind: ObjectKind, number: u8) -> Unreadable {
    let (field, error) = ("spec".to_owned(), "no object".to_owned());
    Unreadable { name: name(kind, number), uid: String::new(), field, error }
}

pub(super) fn object(kind: ObjectKind, number: u8, draw: Draw) -> Object {
    let ObjectName { namespace, name } = name(kind, number);
    let mut object = match kind {
        ObjectKind::Service => service(draw),
        ObjectKind::EndpointSlice => slice(draw),
        ObjectKind::Node => node(number, draw),
        ObjectKind::ServiceCidr => {
            let cidrs = ["10.0.0.0/24", "203.0.113.0/24", "10.0.1.0/24", "no cidr"];
            json!({ "metadata": {}, "spec": { "cidrs": [cidrs[draw.0 as usize % 4]] } })
        }
    };
    object["metadata"]["name"] = name.into();
    if !namespace.is_empty() {
        object["metadata"]["namespace"] = namespace.into();
    }
    let read = "an object";
    match kind {
        ObjectKind::Service => serde_json::from_value::<v1::Service>(object).expect(read).into(),
        ObjectKind::EndpointSlice => {
            serde_json::from_value::<EndpointSlice>(object).expect(read).into()
        }
        ObjectKind::Node => serde_json::from_value::<v1::Node>(object).expect(read).into(),
        ObjectKind::ServiceCidr => {
            let range: k8s_openapi::api::networking::v1::ServiceCIDR =
                serde_json::from_value(object).expect(read);
            range.into()
        }
    }
}

fn service(mut draw: Draw) -> serde_json::Value {
    let ip = draw.below(5);
    let ips = match draw.below(8) {
        0 => json!(["None"]),
        1 | 2 => json!([format!("10.0.0.{ip}"), format!("fd00::{ip}")]),
        3 => json!(["not an address"]),
        _ => json!([format!("10.0.0.{ip}")]),
    };
    let kind = ["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"][draw.below(4) as usize];
    let local = |is_local| if is_local { "Local" } else { "Cluster" };
    let mut ports = vec![json!({ "name": "http", "port": 80 + draw.below(2), "protocol": "TCP" })];
    if kind != "ClusterIP" {
        ports[0]["nodePort"] = json!(30_000 + draw.below(3));
    }
    match draw.below(4) {
        0 => ports.push(json!({ "name": "dns", "port": 53, "protocol": "UDP" })),
        1 => ports.push(json!({ "name": "sctp", "port": 80, "protocol": "SCTP" })),
        _ => {}
    }
    let mut spec = json!({
        "type": kind, "clusterIP": ips[0], "clusterIPs": ips, "ports": ports,
        "internalTrafficPolicy": local(draw.is()), "externalTrafficPolicy": local(draw.is()),
        "sessionAffinity": if draw.is() { "ClientIP" } else { "None" },
    });
    if draw.is() {
        spec["externalIPs"] = json!([format!("198.51.100.{}", draw.below(2))]);
    }
    let ranges = ["10.0.0.0/8", "fd00::/8", "192.0.2.0/24"];
    spec["loadBalancerSourceRanges"] = json!(ranges[..draw.below(4) as usize]);
    if draw.is() {
        spec["healthCheckNodePort"] = json!(32_000 + draw.below(2));
    }
    let day = draw.below(3);
    let mut object = json!({ "metadata": {}, "spec": spec });
    if day > 0 {
        object["metadata"]["creationTimestamp"] = format!("2026-01-0{day}T00:00:00Z").into();
    }
    if kind == "LoadBalancer" {
        let ip = format!("203.0.113.{}", draw.below(2));
        object["status"] = json!({ "loadBalancer": { "ingress": [{ "ip": ip }] } });
    }
    if draw.is() {
        object["metadata"]["annotations"] = json!({ "lb-agent/external-mode": "dsr" });
    }
    object
}

fn slice(mut draw: Draw) -> serde_json::Value {
    let (of, is_v6) = (draw.below(6), draw.below(4) == 0);
    let count = draw.below(5);
    let endpoints: Vec<_> = (0..count)
        .map(|_| {
            let ip = draw.below(6);
            let ip = if is_v6 { format!("fd01::{}", ip + 1) } else { format!("10.1.0.{}", ip + 1) };
            let state = draw.below(4);
            let node = ["here", "n1", "n2"][draw.below(3) as usize];
            let conditions =
                json!({ "ready": state > 1, "serving": state > 0, "terminating": state == 1 });
            let mut endpoint =
                json!({ "addresses": [ip], "conditions": conditions, "nodeName": node });
            if state == 3 {
                endpoint["hints"] = json!({ "forZones": [{ "name": "a" }] });
            }
            endpoint
        })
        .collect();
    let number = 8080 + draw.below(2);
    json!({
        "metadata": { "labels": { "kubernetes.io/service-name": format!("s{of}") } },
        "addressType": if is_v6 { "IPv6" } else { "IPv4" },
        "endpoints": endpoints,
        "ports": [
            { "name": "http", "port": number, "protocol": "TCP" },
            { "name": "dns", "port": 53, "protocol": "UDP" },
        ],
    })
}

fn node(number: u8, mut draw: Draw) -> serde_json::Value {
    let ip = format!("192.0.2.{}", u32::from(number) * 2 + draw.below(2));
    let zone = ["a", "b"][draw.below(2) as usize];
    json!({
        "metadata": { "labels": { "topology.kubernetes.io/zone": zone } },
        "status": { "addresses": [{ "type": "InternalIP", "address": ip }] },
    })
}

/// What is known of the node.
pub(super) fn facts(bits: u8) -> NodeFacts {
    let has = |bit: u8| bits & (1 << bit) != 0;
    let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
    let listed = |texts: &[(bool, &str)]| {
        texts.iter().filter(|(is_there, _)| *is_there).map(|(_, text)| ip(text)).collect()
    };
    NodeFacts {
        addresses: listed(&[(has(0), "192.0.2.10"), (has(1), "10.1.0.1")]),
        held_addresses: listed(&[(has(2), "10.0.0.1")]),
        node_port_addresses: listed(&[(has(3), "192.0.2.10"), (has(4), "fd00:2::10")]),
        masquerade_all: has(5),
        ..NodeFacts::default()
    }
}
