//! A pod that is linked by a netkit pair instead of a veth.

use anyhow::{Context, Result, bail};

use super::{FAR, NEAR};
use crate::harness::netns::actors::exec::tool;
use crate::harness::netns::topology::cluster::Cluster;
use crate::harness::netns::topology::plan::{Family, cidr};
use crate::harness::netns::words::expectations::Expectations;
use crate::harness::netns::words::frontends::{Frontend, Got, kinds, try_cases};
use crate::harness::netns::words::scenario::{SMALL_MAPS, Scenario};

/// The Service by number that the pod with the netkit device serves.
const NETKIT: u8 = 3;

/// A pod whose link is a netkit pair, in the mode that has no MACs, as Cilium makes it.
pub(super) fn serve() -> Result<()> {
    let cluster_cidr = cidr::cluster();
    let fixed = ["--socket-lb", "off", "--cluster-cidr", &cluster_cidr];
    let arguments = [&fixed[..], &SMALL_MAPS].concat();
    let builder = Cluster::builder().pod(1, "b").pod(1, "n").pod(2, "c");
    let mut scenario = Scenario::start(builder, &arguments)?;
    let (node, pod) = (scenario.cluster.node(1), scenario.cluster.pod("n"));
    node.netns()
        .ip_lines(&[format!("link del {}", pod.host_device()), "link add nk9 type netkit".into()])
        .context("no netkit in this kernel")?;
    let shown = node.netns().run(|| tool("ip", &["-o", "link", "show"], ""))?;
    let peer = shown.split_whitespace().find_map(|word| word.strip_suffix("@nk9:"));
    let Some(peer) = peer else { bail!("nk9 has no peer: {shown}") };
    let (v4, v6) = (pod.ip(Family::V4), pod.ip(Family::V6));
    node.netns().ip_lines(&[
        format!("link set {peer} netns {} name eth0", pod.netns().name()),
        "link set nk9 up".to_owned(),
        format!("route replace {v4}/32 dev nk9"),
        format!("route replace {v6}/128 dev nk9"),
    ])?;
    pod.netns().ip_lines(&[
        format!("addr add {v4}/32 dev eth0"),
        format!("addr add {v6}/128 dev eth0 nodad"),
        "link set eth0 up".to_owned(),
        "route add 0.0.0.0/0 dev eth0".to_owned(),
        "route add ::/0 dev eth0".to_owned(),
    ])?;
    scenario.serve(&["b", "n", "c"])?;
    scenario.publish(&scenario.exposed("near", NEAR), &scenario.endpoints(&["b"]))?;
    scenario.publish(&scenario.exposed("far", FAR), &scenario.endpoints(&["c"]))?;
    scenario.publish(&scenario.exposed("netkit", NETKIT), &scenario.endpoints(&["n"]))?;
    let mut expectations = Expectations::default();
    for kind @ (_, family) in kinds() {
        for (number, server) in [(NEAR, "b"), (FAR, "c")] {
            let answer = scenario.check(&pod, kind, number, &[server], &[pod.ip(family)]);
            expectations.check(format!("{kind:?}"), answer.map(drop));
        }
    }
    let inside = [("b", NETKIT, Got::Answer("n", &["b"]))];
    try_cases(&scenario, &mut expectations, &[Frontend::ClusterIp], &inside);
    let outside = [("outside", NETKIT, Got::Answer("n", &["outside"]))];
    try_cases(&scenario, &mut expectations, &[Frontend::NodePort(1)], &outside);
    expectations.finish()
}
