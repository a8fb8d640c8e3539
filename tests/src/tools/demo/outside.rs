//! Calls from outside the cluster, and of a node at its own node ports: rows 3.4 to 3.9 of
//! docs/semantics.md.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;

use super::access::{Call, Outcome};
use super::report::Table;
use super::scene::{FAR, NEAR, Number};
use super::stop::Stop;
use crate::harness::netns::topology::plan::{Family, balancer_ip, external_ip, node_port};
use crate::harness::netns::words::scenario::{PORT, Scenario};

/// Where a client calls a Service, other than at its ClusterIP.
#[derive(Clone, Copy, Debug)]
pub(super) enum Frontend {
    /// The node port, at the address of the node with this number.
    NodePort(u8),
    /// The node port, at the loopback address.
    Loopback,
    /// The load balancer's address.
    Balancer,
    /// The external IP.
    External,
}

impl Frontend {
    pub(super) fn address(self, world: &Scenario, number: Number, family: Family) -> SocketAddr {
        let number = number as u8;
        let at_node = |ip| SocketAddr::new(ip, node_port(number));
        match (self, family) {
            (Self::NodePort(node), _) => at_node(world.cluster.node(node).ip(family)),
            (Self::Loopback, Family::V4) => at_node(Ipv4Addr::LOCALHOST.into()),
            (Self::Loopback, Family::V6) => at_node(Ipv6Addr::LOCALHOST.into()),
            (Self::Balancer, _) => (balancer_ip(number).get(family), PORT).into(),
            (Self::External, _) => (external_ip(number).get(family), PORT).into(),
        }
    }
}

/// Whose address the backend must see.
#[derive(Clone, Copy, Debug)]
enum Seen {
    Outside,
    Node,
}

impl Seen {
    fn name(self) -> &'static str {
        match self {
            Self::Outside => "client's IP",
            Self::Node => "node's IP",
        }
    }

    fn address(self, world: &Scenario, family: Family) -> IpAddr {
        match self {
            Self::Outside => world.cluster.outside().ip(family),
            Self::Node => world.cluster.node(1).ip(family),
        }
    }
}

/// Who calls.
#[derive(Clone, Copy, Debug)]
enum Client {
    Outside,
    Node,
}

type Case = (&'static str, Client, Frontend, Number, &'static str, Seen);

const CASES: [Case; 13] = [
    (
        "outside, NodePort",
        Client::Outside,
        Frontend::NodePort(1),
        Number::Near,
        NEAR,
        Seen::Outside,
    ),
    ("outside, NodePort", Client::Outside, Frontend::NodePort(1), Number::Far, FAR, Seen::Node),
    ("outside, LB", Client::Outside, Frontend::Balancer, Number::Near, NEAR, Seen::Outside),
    ("outside, LB", Client::Outside, Frontend::Balancer, Number::Far, FAR, Seen::Node),
    ("outside, LB, Local", Client::Outside, Frontend::Balancer, Number::Local, NEAR, Seen::Outside),
    ("outside, externalIP", Client::Outside, Frontend::External, Number::Near, NEAR, Seen::Outside),
    ("outside, externalIP", Client::Outside, Frontend::External, Number::Far, FAR, Seen::Node),
    (
        "outside, NodePort, dsr",
        Client::Outside,
        Frontend::NodePort(1),
        Number::Direct,
        FAR,
        Seen::Outside,
    ),
    ("outside, LB, dsr", Client::Outside, Frontend::Balancer, Number::Direct, FAR, Seen::Outside),
    ("node, NodePort", Client::Node, Frontend::NodePort(1), Number::Near, NEAR, Seen::Node),
    ("node, NodePort", Client::Node, Frontend::NodePort(1), Number::Far, FAR, Seen::Node),
    ("node, NodePort, dsr", Client::Node, Frontend::NodePort(1), Number::Direct, FAR, Seen::Node),
    ("node, loopback", Client::Node, Frontend::Loopback, Number::Far, FAR, Seen::Node),
];

/// Makes every call. Load balancer addresses and external IPs are routed to node1.
pub(super) fn table(world: &Scenario, stop: Stop) -> Result<Table> {
    world.cluster.fabric().route_external_to(1)?;
    let mut table = Table::new(&[
        "client, frontend",
        "called",
        "protocol",
        "answered by",
        "backend saw",
        "promised",
    ]);
    for (name, from, frontend, number, backend, seen) in CASES {
        for family in Family::ALL {
            stop.check()?;
            let to = frontend.address(world, number, family);
            let node = world.cluster.node(1);
            let client = match from {
                Client::Outside => world.cluster.outside(),
                Client::Node => &node,
            };
            let call = Call { client, to, backend, seen: seen.address(world, family) };
            for outcome in call.outcomes()? {
                let Outcome { protocol, answered, backend_saw, is_as_promised } = outcome;
                let to = to.to_string();
                let cells = [name, &to, protocol, &answered, &backend_saw, seen.name()];
                table.row(&cells, is_as_promised);
            }
        }
    }
    Ok(table)
}
