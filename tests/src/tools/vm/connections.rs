//! Real sockets through the real agent: a ClusterIP and a node port, on two nodes.

use anyhow::{Context, Result, ensure};
use lb_agent::programs::features::Features;

use super::Report;
use crate::harness::netns::topology::cluster::Cluster;
use crate::harness::netns::topology::plan::cidr;
use crate::harness::netns::words::expectations::Expectations;
use crate::harness::netns::words::frontends::{Frontend, Got, try_cases};
use crate::harness::netns::words::scenario::{SMALL_MAPS, Scenario};

/// The Services by number: one is served on the first node, one on the second.
const NEAR: u8 = 1;
const FAR: u8 = 2;
const NONE: u8 = 3;

pub(super) fn run(report: &mut Report, features: Features) {
    let both: &[&str] = if features.has_tcx { &["tcx", "clsact"] } else { &["clsact"] };
    report.fact("attach", both.join(", "));
    for attach in both {
        for socket_lb in ["off", "all"] {
            let name = format!("connections, --tc-attach {attach} --socket-lb {socket_lb}");
            report.run(name, || connect(attach, socket_lb));
        }
    }
}

fn connect(attach: &str, socket_lb: &str) -> Result<()> {
    use Got::{Answer, Refusal};
    let builder = Cluster::builder().pod(1, "a").pod(1, "b").pod(2, "c");
    let cluster_cidr = cidr::cluster();
    let arguments =
        ["--tc-attach", attach, "--socket-lb", socket_lb, "--cluster-cidr", &cluster_cidr];
    let mut scenario = Scenario::start(builder, &[&arguments[..], &SMALL_MAPS].concat())?;
    scenario.serve(&["b", "c"])?;
    scenario.publish(&scenario.exposed("near", NEAR), &scenario.endpoints(&["b"]))?;
    scenario.publish(&scenario.exposed("far", FAR), &scenario.endpoints(&["c"]))?;
    scenario.publish(&scenario.exposed("none", NONE), &[])?;
    let mut expectations = Expectations::default();
    let inside = [
        ("a", NEAR, Answer("b", &["a"])),
        ("a", FAR, Answer("c", &["a"])),
        ("a", NONE, Refusal),
        ("node1", NEAR, Answer("b", &["node1"])),
        ("node1", FAR, Answer("c", &["node1"])),
        ("node1", NONE, Refusal),
    ];
    try_cases(&scenario, &mut expectations, &[Frontend::ClusterIp, Frontend::NodePort(1)], &inside);
    let outside = [
        ("outside", NEAR, Answer("b", &["outside"])),
        ("outside", FAR, Answer("c", &["node1"])),
        ("outside", NONE, Refusal),
    ];
    try_cases(&scenario, &mut expectations, &[Frontend::NodePort(1)], &outside);
    expectations.finish()?;
    let leaked = scenario.cluster.fabric().service_packets()?;
    ensure!(leaked == 0, "{leaked} packets to ClusterIPs left a node");
    let reason = if socket_lb == "off" { "flow_created" } else { "socket_translated" };
    let counted = scenario.agent(1)?.counted(reason).context("no counters")?;
    ensure!(counted > 0, "no program counted {reason}");
    Ok(())
}
