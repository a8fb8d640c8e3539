//! lb on kinds of devices that the kernel of a test machine may lack, and on NICs that qemu
//! emulates: node 1 has its address on such a device, clients outside come by it, and pods reach
//! backends behind it. [`KINDS`] says who handles the packets that come in by each kind.

mod kinds;
mod netkit;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Report;
use crate::harness::echo::{Probe, Transport};
use crate::harness::netns::actors::agent::{self, cleanup, lb_agent};
use crate::harness::netns::actors::exec::tool;
use crate::harness::netns::topology::cluster::Cluster;
use crate::harness::netns::topology::namespace::Netns;
use crate::harness::netns::topology::plan::{
    Addresses, Family, NODE_GATEWAY, cidr, cluster_ip, node_port,
};
use crate::harness::netns::words::expectations::Expectations;
use crate::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario, expect};
use crate::harness::wait::{PATIENCE, eventually, patiently};

/// The Services by number: served on node 1, and on node 2.
const NEAR: u8 = 1;
const FAR: u8 = 2;
/// The device of node 1, and its far end in the fabric.
const DEVICE: &str = "upper0";
const WIRE: &str = "wire";
/// Node 1 and the router, in the network of that device.
const NODE: Addresses = Addresses {
    v4: Ipv4Addr::new(172, 19, 0, 11),
    v6: Ipv6Addr::new(0xfd00, 0x19, 0, 0, 0, 0, 0, 0x11),
};
const ROUTER: Addresses = Addresses {
    v4: Ipv4Addr::new(172, 19, 0, 1),
    v6: Ipv6Addr::new(0xfd00, 0x19, 0, 0, 0, 0, 0, 1),
};

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(1);

/// A kind of device.
struct Kind {
    name: &'static str,
    /// Makes [`DEVICE`] on the node, and [`WIRE`] in the fabric.
    make: fn(&Scenario) -> Result<()>,
    incoming: Incoming,
    families: &'static [Family],
}

/// Who handles the packets that come in by a device.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Incoming {
    /// The programs at tc; the agent runs with `--xdp off`.
    Tc,
    /// `--xdp native`: XDP in the driver.
    Xdp,
    /// The programs at tc, also with `--xdp native`: the driver has no XDP.
    NoXdp,
    /// The programs of another device: this one receives nothing, it only has the address.
    Elsewhere,
}

/// The first two numbers of a kernel's version.
type Version = (u32, u32);

/// Since this version there are netkit devices.
const HAS_NETKIT: Version = (6, 7);

const V4: &[Family] = &[Family::V4];
const BOTH: &[Family] = &Family::ALL;

const KINDS: [Kind; 8] = [
    Kind { name: "vlan", make: kinds::vlan, incoming: Incoming::Tc, families: BOTH },
    Kind { name: "bond", make: kinds::bond, incoming: Incoming::Tc, families: BOTH },
    Kind { name: "ipip", make: kinds::ipip, incoming: Incoming::Tc, families: V4 },
    Kind { name: "wireguard", make: kinds::wireguard, incoming: Incoming::Tc, families: BOTH },
    Kind { name: "virtio_net", make: kinds::virtio_net, incoming: Incoming::Xdp, families: BOTH },
    Kind { name: "e1000e", make: kinds::e1000e, incoming: Incoming::NoXdp, families: BOTH },
    Kind { name: "igb", make: kinds::igb, incoming: Incoming::Xdp, families: BOTH },
    // The last one: the network accepts more afterwards.
    Kind { name: "dummy", make: kinds::dummy, incoming: Incoming::Elsewhere, families: BOTH },
];

impl Incoming {
    /// `--xdp`.
    fn xdp(self) -> &'static str {
        if matches!(self, Self::Xdp | Self::NoXdp) { "native" } else { "off" }
    }

    /// What `check` says of the device, if it says anything.
    fn said(self) -> Option<&'static str> {
        match self {
            Self::Xdp => Some("packets are handled by XDP in the driver"),
            Self::NoXdp | Self::Tc => Some("packets are handled by tc"),
            Self::Elsewhere => None,
        }
    }
}

pub(super) fn run(report: &mut Report) {
    let started = kernel().and_then(|kernel| Ok((kernel, start()?)));
    let (kernel, mut scenario) = match started {
        Ok(started) => started,
        Err(error) => return report.test("devices", Err(error)),
    };
    for kind in &KINDS {
        let mut found = Value::Null;
        report.run(format!("device {}", kind.name), || {
            let tried = try_kind(&mut scenario, kind, &mut found);
            // The next kind has the same names.
            let removed = kinds::remove(&scenario);
            tried.and(removed)
        });
        report.fact(&format!("device {}", kind.name), found);
    }
    drop(scenario);
    if kernel >= HAS_NETKIT {
        report.run("device netkit, of a pod", netkit::serve);
    } else {
        report.fact("device netkit", "not in this kernel");
    }
}

fn kernel() -> Result<Version> {
    let name = nix::sys::utsname::uname().context("cannot read the kernel's version")?;
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(str::parse);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        anyhow::bail!("{release} begins with no version");
    };
    Ok((major, minor))
}

fn start() -> Result<Scenario> {
    let builder = Cluster::builder().pod(1, "a").pod(1, "b").pod(2, "c").no_tx_checksum_offload();
    let mut scenario = Scenario::start(builder, &SMALL_MAPS)?;
    scenario.serve(&["b", "c"])?;
    scenario.publish(&scenario.exposed("near", NEAR), &scenario.endpoints(&["b"]))?;
    scenario.publish(&scenario.exposed("far", FAR), &scenario.endpoints(&["c"]))?;
    scenario.manifests.node("node1", NODE, None)?;
    Ok(scenario)
}

fn try_kind(scenario: &mut Scenario, kind: &Kind, found: &mut Value) -> Result<()> {
    (kind.make)(scenario).context("cannot make the device")?;
    let node = scenario.cluster.node(1);
    if kind.incoming != Incoming::Elsewhere {
        node.netns().ip_lines(&kinds::default_routes(DEVICE, ROUTER, kind.families))?;
    }
    let before = state(node.netns())?;
    let cluster_cidr = cidr::cluster();
    let arguments = ["--socket-lb", "off", "--cluster-cidr", &cluster_cidr];
    let devices = ["--pod-interfaces", "cali*", "--xdp", kind.incoming.xdp()];
    scenario.set_arguments(&[&arguments[..], &devices, &SMALL_MAPS].concat());
    scenario.take_agent(1)?.terminate()?;
    cleanup(&node)?;
    scenario.start_agent(1)?;
    let after = state(node.netns())?;
    let said = checked(scenario, kind.incoming.xdp())?;
    let served = ask_from_outside(scenario, kind.families);
    *found = json!({
        "check": said,
        "served": served.is_ok(),
        "changes by attaching": changes(&before, &after),
    });
    if let Some(words) = kind.incoming.said() {
        ensure!(said.contains(words), "`check` does not say {words:?}: {said:?}");
    }
    served.context("clients outside")?;
    let by_xdp = count(scenario, "xdp_device", "request")?;
    let is_by_driver = kind.incoming == Incoming::Xdp;
    ensure!((by_xdp > 0) == is_by_driver, "XDP handled {by_xdp} requests");
    if kind.incoming != Incoming::Elsewhere {
        ask_from_pod(scenario, kind.families).context("a pod")?;
    }
    let foreign = scenario.cluster.fabric().foreign_packets_from(1)?;
    ensure!(foreign == 0, "{foreign} packets left by eth0 with another device's address");
    Ok(())
}

/// The client outside reaches both Services at node 1's address there.
fn ask_from_outside(scenario: &Scenario, families: &[Family]) -> Result<()> {
    let (outside, node) = (scenario.cluster.outside(), scenario.cluster.node(1));
    let mut expectations = Expectations::default();
    for family in families {
        let node: [IpAddr; 2] = [NODE.get(*family), node.ip(*family)];
        let client = [outside.ip(*family)];
        let backends: [(u8, &str, &[IpAddr]); 2] = [(NEAR, "b", &client), (FAR, "c", &node)];
        for (number, server, seen) in backends {
            for probe in probes((NODE.get(*family), node_port(number)).into()) {
                let (to, what) = (probe.to, format!("{:?}", probe.transport));
                let answer = outside.ask(probe);
                let outcome =
                    answer.and_then(|answer| expect(&what, &answer, to, &[server], seen).map(drop));
                expectations.check(to, outcome);
            }
        }
    }
    expectations.finish()
}

/// A pod of node 1 reaches a Service whose backend is behind the device, and keeps its address.
/// Requests leave by the device and answers come in by it.
fn ask_from_pod(scenario: &Scenario, families: &[Family]) -> Result<()> {
    let (pod, backend) = (scenario.cluster.pod("a"), scenario.cluster.pod("c"));
    let (node, fabric) = (scenario.cluster.node(1), scenario.cluster.fabric());
    let mut expectations = Expectations::default();
    for family in families {
        let length = if *family == Family::V4 { 32 } else { 128 };
        let route = |change: &str, to: IpAddr, via: Addresses, device: &str| {
            format!("route {change} {to}/{length} via {} dev {device}", via.get(*family))
        };
        let routes = |change: &str| -> Result<()> {
            let (pod, backend) = (pod.ip(*family), backend.ip(*family));
            node.netns().ip_lines(&[route(change, backend, ROUTER, DEVICE)])?;
            fabric.netns().ip_lines(&[route(change, pod, NODE, WIRE)])?;
            // Node 2 would send straight to node 1.
            let far = scenario.cluster.node(2);
            far.netns().ip_lines(&[route(change, pod, NODE_GATEWAY, "eth0")])
        };
        routes("replace")?;
        let before = packets(node.netns())?;
        for probe in probes((cluster_ip(FAR).get(*family), PORT).into()) {
            let (to, what) = (probe.to, format!("{:?}", probe.transport));
            let answer = pod.ask(probe);
            let seen = [pod.ip(*family)];
            let outcome =
                answer.and_then(|answer| expect(&what, &answer, to, &["c"], &seen).map(drop));
            expectations.check(to, outcome);
        }
        let after = packets(node.netns())?;
        let passed = before.iter().zip(after).all(|(before, after)| after > *before);
        let what = format!("packets pass the device in both directions: {before:?}, {after:?}");
        expectations.is_true(what, passed);
        routes("del")?;
    }
    expectations.finish()
}

/// TCP with more than a segment, and UDP with what the smallest of these MTUs carries.
fn probes(to: SocketAddr) -> [Probe; 2] {
    [(Transport::Tcp, 400), (Transport::Udp, 100)].map(|(transport, times)| {
        let probe = Probe::new(transport, to).payload("0123456789".repeat(times));
        probe.timeout(patiently(ANSWER))
    })
}

/// How often a program of node 1 ended with this reason.
fn count(scenario: &Scenario, hook: &str, reason: &str) -> Result<u64> {
    let counters = agent::get(&scenario.cluster.node(1), "counters")?;
    let rows = counters.as_array().context("no list of counters")?;
    let row = rows.iter().find(|row| row["hook"] == hook && row["reason"] == reason);
    Ok(row.and_then(|row| row["count"].as_u64()).unwrap_or(0))
}

/// What `check` says of the device, in one line; empty if it says nothing.
fn checked(scenario: &Scenario, xdp: &str) -> Result<String> {
    let node = scenario.cluster.node(1);
    let mut command = lb_agent()?;
    command.args(["check", "--xdp", xdp, "--bpf-dir"]).arg(node.bpf_dir());
    command.arg("--cgroup").arg(node.cgroup_tree().path());
    let said = node.output(command, patiently(PATIENCE))?;
    let line = said.lines().find(|line| line.contains(&format!(" {DEVICE}: ")));
    Ok(line.unwrap_or_default().to_owned())
}

/// The offloads of the device, and how often its link went up or down, once the link is up: a NIC
/// may restart it when a program is attached.
fn state(netns: &Netns) -> Result<Vec<String>> {
    netns.run(|| {
        eventually(|| {
            let link = tool("ip", &["-o", "link", "show", DEVICE], "")?;
            ensure!(link.contains("LOWER_UP"), "no carrier: {link}");
            Ok(())
        })?;
        let features = tool("ethtool", &["-k", DEVICE], "")?;
        let mut state: Vec<String> =
            features.lines().skip(1).map(|line| line.trim().to_owned()).collect();
        let links = tool("ip", &["-s", "-s", "link", "show", DEVICE], "")?;
        // The last row of numbers ends with the transitions of the carrier.
        let transitions = links.lines().last().and_then(|line| line.split_whitespace().last());
        state.push(format!("carrier transitions: {}", transitions.unwrap_or("?")));
        Ok(state)
    })
}

/// The lines that differ, `NAME: BEFORE -> AFTER`.
fn changes(before: &[String], after: &[String]) -> Vec<String> {
    let pairs = before.iter().zip(after).filter(|(before, after)| before != after);
    pairs
        .map(|(before, after)| {
            let value = after.split_once(": ").map_or(after.as_str(), |(_, value)| value);
            format!("{before} -> {value}")
        })
        .collect()
}

/// The packets that the device received and sent.
fn packets(netns: &Netns) -> Result<[u64; 2]> {
    const RECEIVED: usize = 1;
    const SENT: usize = 9;
    let table =
        netns.run(|| fs::read_to_string("/proc/thread-self/net/dev").map_err(Into::into))?;
    let row = table.lines().find_map(|line| line.trim().strip_prefix(&format!("{DEVICE}:")));
    let row = row.with_context(|| format!("no row of {DEVICE}: {table}"))?;
    let numbers: Vec<u64> = row.split_whitespace().map_while(|word| word.parse().ok()).collect();
    let at = |place: usize| numbers.get(place).copied().context("a short row");
    Ok([at(RECEIVED)?, at(SENT)?])
}
