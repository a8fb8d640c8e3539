//! The scene of the demo: its pods, its Services and the two paths of a call.

use std::time::Duration;

use anyhow::Result;

use super::stop::Stop;
use crate::harness::netns::topology::plan::{Family, balancer_ip, cidr, cluster_ip, node_port};
use crate::harness::netns::words::manifests::{Endpoint, Service};
use crate::harness::netns::words::scenario::{PORT, Scenario, TARGET};

/// The pod that calls; it is also its own backend, for the hairpin.
pub(super) const CLIENT: &str = "client";
/// The backend on the client's node.
pub(super) const NEAR: &str = "near";
/// The backend on the other node.
pub(super) const FAR: &str = "far";
/// The port of `web` that speaks HTTP.
pub(super) const HTTP_PORT: u16 = 8000;

/// The Services of the demo. A Service's addresses and node port end in its number.
#[derive(Clone, Copy, Debug)]
pub(super) enum Number {
    /// One backend, on the client's node.
    Near = 1,
    /// One backend, on the other node.
    Far = 2,
    /// One backend: the client.
    Own = 3,
    /// A backend on each node.
    Web = 4,
    /// As `web`, with session affinity.
    Sticky = 5,
    /// No endpoint.
    Empty = 6,
    /// One backend, on node1; `externalTrafficPolicy: Local`.
    Local = 7,
    /// One backend; its `loadBalancerSourceRanges` allow pods only.
    Private = 8,
    /// A backend on each node, at node ports too.
    Public = 9,
    /// One backend, on the other node; external mode `dsr`, so it answers clients itself.
    Direct = 10,
    /// ClusterIPs that no Service has.
    NoService = 99,
}

/// Where the destination of a call is translated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Path {
    /// At connect() and sendmsg().
    Connect,
    /// Packet by packet.
    Packet,
}

impl Path {
    pub(super) const ALL: [Self; 2] = [Self::Connect, Self::Packet];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Packet => "packet",
        }
    }

    /// The agent's arguments under which every call takes this path.
    pub(super) fn arguments(self) -> [&'static str; 2] {
        match self {
            Self::Connect => ["--socket-lb", "all"],
            Self::Packet => ["--socket-lb", "off"],
        }
    }
}

/// Every Service with its endpoints.
fn objects(world: &Scenario) -> Vec<(Service, Vec<Endpoint>)> {
    let service = |name, number: Number| world.service(name, number as u8);
    let at_nodes = |name, number: Number| service(name, number).node_port(node_port(number as u8));
    let exposed = |name, number: Number| world.exposed(name, number as u8);
    let balancer = |number: Number| balancer_ip(number as u8);
    let (near, far) = (world.endpoints(&[NEAR]), world.endpoints(&[FAR]));
    let both = world.endpoints(&[NEAR, FAR]);
    let web = service("web", Number::Web).tcp(HTTP_PORT, TARGET + 1);
    let sticky = Service::new("sticky")
        .cluster_ips(cluster_ip(Number::Sticky as u8))
        .tcp(PORT, TARGET)
        .affinity(Duration::from_secs(10_800));
    let local = at_nodes("local", Number::Local).external_local();
    let private = service("private", Number::Private)
        .balancer(balancer(Number::Private))
        .source_range(cidr::PODS_V4.to_string())
        .source_range(cidr::PODS_V6.to_string());
    vec![
        (exposed("near", Number::Near), near.clone()),
        (exposed("far", Number::Far), far.clone()),
        (exposed("direct", Number::Direct).external_mode("dsr"), far),
        (service("own", Number::Own), world.endpoints(&[CLIENT])),
        (web.balancer(balancer(Number::Web)), both.clone()),
        (sticky, both.clone()),
        (at_nodes("empty", Number::Empty), Vec::new()),
        (local.balancer(balancer(Number::Local)), near.clone()),
        (private, near),
        (at_nodes("public", Number::Public), both),
    ]
}

/// Publishes all Services at once and waits until both agents have programmed them.
pub(super) fn publish(world: &Scenario, stop: Stop) -> Result<()> {
    let services = objects(world);
    let (mut ports, mut backends) = (0, 0);
    for (service, endpoints) in &services {
        world.manifests.publish(service, endpoints)?;
        let of_service = service.object()["spec"]["ports"].as_array().map_or(0, Vec::len);
        ports += of_service * Family::ALL.len();
        backends += of_service * endpoints.len();
    }
    world.wait(|agent| {
        stop.check()?;
        let shown = agent.get("services")?;
        let rows = shown.as_array().map(Vec::as_slice).unwrap_or_default();
        let found: u64 = rows.iter().filter_map(|row| row["cluster_backends"].as_u64()).sum();
        Ok((rows.len(), found) == (ports, backends as u64))
    })
}
