//! Makes and removes the device of each kind, with its far end in the fabric.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};

use super::{BOTH, DEVICE, NODE, ROUTER, V4, WIRE};
use crate::harness::netns::actors::exec::{ip_batch, tool};
use crate::harness::netns::topology::namespace::Netns;
use crate::harness::netns::topology::plan::{Addresses, Family, NODE_GATEWAY};
use crate::harness::netns::words::scenario::Scenario;

/// Runs lines of `ip` in the fabric, then on node 1. `{node}` is the name of its namespace.
fn lines(scenario: &Scenario, fabric: &[&str], node: &[&str]) -> Result<()> {
    let netns = scenario.cluster.node(1);
    let name = netns.netns().name();
    let fill = |lines: &[&str]| -> Vec<String> {
        lines.iter().map(|line| line.replace("{node}", name)).collect()
    };
    scenario.cluster.fabric().netns().ip_lines(&fill(fabric))?;
    netns.netns().ip_lines(&fill(node))
}

/// Gives both ends their addresses and sets them up.
fn addresses(scenario: &Scenario, far: &str, families: &[Family]) -> Result<()> {
    let of = |device: &str, at: Addresses| -> Vec<String> {
        let add = |family: &Family| match family {
            Family::V4 => format!("addr add {}/24 dev {device}", at.v4),
            Family::V6 => format!("addr add {}/64 dev {device} nodad", at.v6),
        };
        families.iter().map(add).chain([format!("link set {device} up")]).collect()
    };
    scenario.cluster.fabric().netns().ip_lines(&of(far, ROUTER))?;
    scenario.cluster.node(1).netns().ip_lines(&of(DEVICE, NODE))
}

pub(super) fn default_routes(device: &str, via: Addresses, families: &[Family]) -> Vec<String> {
    let route =
        |family: &Family| format!("route replace default via {} dev {device}", via.get(*family));
    families.iter().map(route).collect()
}

/// A second cable between node 1 and the fabric.
const CABLE: &str = "link add cable type veth peer name eth1 netns {node}";

pub(super) fn vlan(scenario: &Scenario) -> Result<()> {
    let far = [CABLE, "link set cable up", "link add link cable name wire type vlan id 7"];
    let near = ["link set eth1 up", "link add link eth1 name upper0 type vlan id 7"];
    lines(scenario, &far, &near)?;
    addresses(scenario, WIRE, BOTH)
}

pub(super) fn bond(scenario: &Scenario) -> Result<()> {
    let near = [
        "link add upper0 type bond mode active-backup miimon 100",
        "link set eth1 master upper0",
        "link set eth1 up",
    ];
    lines(scenario, &[CABLE, "link set cable name wire"], &near)?;
    addresses(scenario, WIRE, BOTH)
}

/// The node's address is on no device by which packets come in, as with routing to the host. From
/// now on the network lets node 1 send from it.
pub(super) fn dummy(scenario: &Scenario) -> Result<()> {
    let by = scenario.cluster.node(1).addresses();
    let far = [
        format!("route replace {} via {}", NODE.v4, by.v4),
        format!("route replace {} via {}", NODE.v6, by.v6),
    ];
    let near = [
        format!("link add {DEVICE} type dummy"),
        format!("addr add {}/32 dev {DEVICE}", NODE.v4),
        format!("addr add {}/128 dev {DEVICE} nodad", NODE.v6),
        format!("link set {DEVICE} up"),
    ];
    let fabric = scenario.cluster.fabric().netns();
    fabric.ip_lines(&far)?;
    let accept = [("ip", IpAddr::from(NODE.v4)), ("ip6", NODE.v6.into())].map(|(family, at)| {
        format!("insert rule netdev fabric from_node1 {family} saddr {at} accept\n")
    });
    fabric.run(|| tool("nft", &["-f", "-"], &accept.concat()))?;
    scenario.cluster.node(1).netns().ip_lines(&near)
}

pub(super) fn ipip(scenario: &Scenario) -> Result<()> {
    let (node, router) = (scenario.cluster.node(1).addresses().v4, NODE_GATEWAY.v4);
    let far = format!("link add wire type ipip local {router} remote {node}");
    let near = format!("link add upper0 type ipip local {node} remote {router}");
    lines(scenario, &[&far], &[&near])?;
    addresses(scenario, WIRE, V4)
}

pub(super) fn wireguard(scenario: &Scenario) -> Result<()> {
    lines(scenario, &["link add wire type wireguard"], &["link add upper0 type wireguard"])?;
    let (fabric, node) = (scenario.cluster.fabric().netns(), scenario.cluster.node(1));
    let keys = || -> Result<(String, String)> {
        let secret = tool("wg", &["genkey"], "")?;
        let public = tool("wg", &["pubkey"], &secret)?;
        Ok((secret, public.trim().to_owned()))
    };
    let ((far, far_public), (near, near_public)) = (keys()?, keys()?);
    let set = |netns: &Netns, device: &str, secret: &str, peer: &str, at: IpAddr| {
        let all = "0.0.0.0/0,::/0";
        let endpoint = format!("{at}:51820");
        let key = "/run/wireguard-key";
        std::fs::write(key, secret).with_context(|| format!("cannot write {key}"))?;
        netns.run(|| {
            let own = ["set", device, "listen-port", "51820", "private-key", key];
            tool("wg", &own, "")?;
            let peer = ["set", device, "peer", peer, "allowed-ips", all, "endpoint", &endpoint];
            tool("wg", &peer, "").map(drop)
        })
    };
    set(fabric, WIRE, &far, &near_public, node.addresses().v4.into())?;
    set(node.netns(), DEVICE, &near, &far_public, NODE_GATEWAY.v4.into())?;
    addresses(scenario, WIRE, BOTH)
}

pub(super) fn virtio_net(scenario: &Scenario) -> Result<()> {
    nics(scenario, 1)
}

pub(super) fn e1000e(scenario: &Scenario) -> Result<()> {
    nics(scenario, 2)
}

pub(super) fn igb(scenario: &Scenario) -> Result<()> {
    nics(scenario, 3)
}

/// Moves a pair of NICs of the machine to node 1 and the fabric.
fn nics(scenario: &Scenario, number: u8) -> Result<()> {
    let shown = tool("ip", &["-o", "link", "show"], "")?;
    let find = |end: u8| {
        let mac = format!("52:54:00:00:{number:02x}:{end:02x}");
        let line = shown.lines().find(|line| line.contains(&mac));
        let name = line.and_then(|line| line.split_whitespace().nth(1));
        name.map(|name| name.trim_end_matches(':').to_owned())
            .with_context(|| format!("no device with the MAC {mac}:\n{shown}"))
    };
    let node = scenario.cluster.node(1);
    ip_batch(&[
        format!("link set {} netns {} name {DEVICE}", find(1)?, node.netns().name()),
        format!(
            "link set {} netns {} name {WIRE}",
            find(2)?,
            scenario.cluster.fabric().netns().name()
        ),
    ])?;
    addresses(scenario, WIRE, BOTH)
}

/// Removes both ends; NICs go back to the machine's own namespace.
pub(super) fn remove(scenario: &Scenario) -> Result<()> {
    let node = scenario.cluster.node(1);
    let (near, far) = (node.netns(), scenario.cluster.fabric().netns());
    near.ip_lines(&default_routes("eth0", NODE_GATEWAY, BOTH))?;
    for (netns, device) in [(near, DEVICE), (near, "eth1"), (far, WIRE), (far, "cable")] {
        // Some kinds lack some of them, and NICs cannot be deleted.
        let is_gone = netns.ip_lines(&[format!("link del {device}")]).is_ok();
        if !is_gone {
            let parked = format!("link set {device} netns 1 name tried%d");
            netns.ip_lines(&[format!("link set {device} down"), parked]).ok();
        }
    }
    for route in [IpAddr::from(NODE.v4), NODE.v6.into()] {
        far.ip_lines(&[format!("route del {route}")]).ok();
    }
    let left = near.run(|| tool("ip", &["-o", "link", "show"], ""))?;
    ensure!(!left.contains(DEVICE), "{DEVICE} is still there: {left}");
    Ok(())
}
