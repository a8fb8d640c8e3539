//! Real sockets through the real agent: a ClusterIP and a node port, on two nodes.

use anyhow::{Context, Result, ensure};
use lb_agent::programs::features::Features;

use super::Report;
use crate::harness::netns::topology::cluster::Cluster;
use crate::harness::netns::topology::plan::cidr;
use crate::harness::netns::words::fronts::{Front, Got, try_rows};
use crate::harness::netns::words::rows::Rows;
use crate::harness::netns::words::world::{SMALL_MAPS, World};

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
    let mut world = World::start(builder, &[&arguments[..], &SMALL_MAPS].concat())?;
    world.serve(&["b", "c"])?;
    world.publish(&world.exposed("near", NEAR), &world.endpoints(&["b"]))?;
    world.publish(&world.exposed("far", FAR), &world.endpoints(&["c"]))?;
    world.publish(&world.exposed("none", NONE), &[])?;
    let mut rows = Rows::default();
    let inside = [
        ("a", NEAR, Answer("b", &["a"])),
        ("a", FAR, Answer("c", &["a"])),
        ("a", NONE, Refusal),
        ("node1", NEAR, Answer("b", &["node1"])),
        ("node1", FAR, Answer("c", &["node1"])),
        ("node1", NONE, Refusal),
    ];
    try_rows(&world, &mut rows, &[Front::ClusterIp, Front::NodePort(1)], &inside);
    let outside = [
        ("outside", NEAR, Answer("b", &["outside"])),
        ("outside", FAR, Answer("c", &["node1"])),
        ("outside", NONE, Refusal),
    ];
    try_rows(&world, &mut rows, &[Front::NodePort(1)], &outside);
    rows.finish()?;
    let leaked = world.cluster.fabric().service_packets()?;
    ensure!(leaked == 0, "{leaked} packets to ClusterIPs left a node");
    let reason = if socket_lb == "off" { "flow_created" } else { "socket_translated" };
    let counted = world.agent(1)?.counted(reason).context("no counters")?;
    ensure!(counted > 0, "no program counted {reason}");
    Ok(())
}
