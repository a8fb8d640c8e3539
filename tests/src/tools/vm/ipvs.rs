//! From kube-proxy's mode ipvs to lb: connections that virtual servers translate go on, while lb
//! starts and takes the new ones, and when kube-proxy's leftovers are removed. The virtual servers,
//! the device and the set are made as kube-proxy makes them; kube-proxy itself does not run here.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Report;
use crate::harness::echo::{Probe, Transport};
use crate::harness::netns::actors::agent::{cleanup, lb_agent};
use crate::harness::netns::actors::client::Connection;
use crate::harness::netns::actors::exec::{ip_batch, sysctl, tool};
use crate::harness::netns::actors::host::Host;
use crate::harness::netns::topology::cluster::Cluster;
use crate::harness::netns::topology::plan::{Family, cidr, cluster_ip, node_port};
use crate::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario, TARGET};
use crate::harness::wait::{PATIENCE, eventually, patiently};

/// The number of the Service.
const NUMBER: u8 = 1;
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(2);

pub(super) fn run(report: &mut Report) {
    report.run("connections of virtual servers outlive kube-proxy", take_over);
}

fn take_over() -> Result<()> {
    let cluster_cidr = cidr::cluster();
    let arguments = ["--socket-lb", "off", "--cluster-cidr", &cluster_cidr];
    let builder = Cluster::builder().pod(1, "a").pod(2, "c");
    let mut scenario = Scenario::start(builder, &[&arguments[..], &SMALL_MAPS].concat())?;
    scenario.take_agent(1)?.terminate()?;
    let node = scenario.cluster.node(1);
    cleanup(&node)?;
    scenario.serve(&["c"])?;
    node.netns().run(|| virtual_servers(&scenario))?;
    let mut held = Vec::new();
    for family in Family::ALL {
        let cluster_ip = SocketAddr::new(cluster_ip(NUMBER).get(family), PORT);
        let node_port = SocketAddr::new(node.ip(family), node_port(NUMBER));
        let (pod, outside) = (scenario.cluster.pod("a"), scenario.cluster.outside());
        held.push(hold(&pod, cluster_ip)?);
        held.push(hold(&node, cluster_ip)?);
        held.push(hold(outside, node_port)?);
    }
    go_on(&held, "by ipvs")?;
    // lb beside it, then alone.
    scenario.publish(&scenario.exposed("web", NUMBER), &scenario.endpoints(&["c"]))?;
    scenario.start_agent(1)?;
    go_on(&held, "lb has started")?;
    new_ones(&mut scenario)?;
    let said = remove(&node)?;
    ensure!(said.contains("kept because they have connections"), "not kept: {said}");
    ensure!(said.contains("(2 connections)"), "not counted: {said}");
    go_on(&held, "removed what has no connection")?;
    new_ones(&mut scenario)?;
    drop(held);
    eventually(|| {
        let said = remove(&node)?;
        ensure!(!said.contains("kept because"), "still there: {said}");
        Ok(())
    })?;
    let left = node.netns().run(|| tool("ipvsadm", &["--save", "--numeric"], ""))?;
    ensure!(left.trim().is_empty(), "virtual servers are left: {left}");
    let gone = node.netns().run(|| tool("ip", &["link", "show", "kube-ipvs0"], ""));
    ensure!(gone.is_err(), "kube-ipvs0 is left");
    new_ones(&mut scenario)
}

/// Makes what kube-proxy makes for a Service with a node port, in the namespace of the thread.
fn virtual_servers(scenario: &Scenario) -> Result<()> {
    sysctl("ipv4/vs/conntrack", "1")?;
    let mut lines = vec!["link add kube-ipvs0 type dummy".to_owned()];
    for family in Family::ALL {
        let length = if family == Family::V4 { 32 } else { 128 };
        lines.push(format!("addr add {}/{length} dev kube-ipvs0", cluster_ip(NUMBER).get(family)));
    }
    ip_batch(&lines)?;
    let set = "KUBE-NODE-PORT-TCP";
    tool("ipset", &["create", set, "bitmap:port", "range", "0-65535"], "")?;
    tool("ipset", &["add", set, &node_port(NUMBER).to_string()], "")?;
    let (node, backend) = (scenario.cluster.node(1), scenario.cluster.pod("c"));
    for family in Family::ALL {
        let to = SocketAddr::new(backend.ip(family), TARGET).to_string();
        let frontends =
            [(cluster_ip(NUMBER).get(family), PORT), (node.ip(family), node_port(NUMBER))];
        for at in frontends.map(|(ip, port)| SocketAddr::new(ip, port).to_string()) {
            tool("ipvsadm", &["-A", "-t", &at, "-s", "rr"], "")?;
            tool("ipvsadm", &["-a", "-t", &at, "-r", &to, "-m"], "")?;
        }
    }
    // kube-proxy masquerades what is not of a pod, by rules that are another test's.
    let masquerade = |version: &str, ip: IpAddr, pods: &str| {
        format!("{version} daddr {ip} {version} saddr != {pods} masquerade")
    };
    let (v4, v6) = (backend.ip(Family::V4), backend.ip(Family::V6));
    let rules = [
        masquerade("ip", v4, &cidr::PODS_V4.to_string()),
        masquerade("ip6", v6, &cidr::PODS_V6.to_string()),
    ];
    let script = format!(
        "table inet test {{ chain post {{ type nat hook postrouting priority srcnat; {}; }}; }}",
        rules.join("; ")
    );
    tool("nft", &["-f", "-"], &script).map(drop)
}

fn hold(client: &Host, to: SocketAddr) -> Result<(String, Connection)> {
    let name = format!("{} -> {to}", client.name());
    let held =
        client.open(Probe::tcp(to).timeout(patiently(ANSWER))).with_context(|| name.clone())?;
    Ok((name, held))
}

/// Every connection still has its backend.
fn go_on(held: &[(String, Connection)], when: &str) -> Result<()> {
    let mut broken = Vec::new();
    for (name, held) in held {
        let answer = held.exchange(when, patiently(ANSWER))?;
        if answer.name() != Some("c") {
            broken.push(format!("{name}: {answer:?}"));
        }
    }
    let (count, all) = (broken.len(), held.len());
    ensure!(count == 0, "{when}: {count} of {all} connections broken: {}", broken.join("; "));
    Ok(())
}

/// New connections are lb's.
fn new_ones(scenario: &mut Scenario) -> Result<()> {
    let before = scenario.agent(1)?.counted("flow_created")?;
    let new = |to| Probe::new(Transport::Tcp, to).timeout(patiently(ANSWER));
    for family in Family::ALL {
        let cluster_ip = SocketAddr::new(cluster_ip(NUMBER).get(family), PORT);
        let node_port = SocketAddr::new(scenario.cluster.node(1).ip(family), node_port(NUMBER));
        let pod = scenario.cluster.pod("a").ask(new(cluster_ip))?;
        let outside = scenario.cluster.outside().ask(new(node_port))?;
        for answer in [pod, outside] {
            ensure!(answer.name() == Some("c"), "{family:?}: {answer:?}");
        }
    }
    let created = scenario.agent(1)?.counted("flow_created")? - before;
    ensure!(created >= 4, "lb opened {created} flows of 4");
    Ok(())
}

fn remove(node: &Host) -> Result<String> {
    let mut command = lb_agent()?;
    command.args(["cleanup", "--kube-proxy"]);
    node.output(command, patiently(PATIENCE))
}
