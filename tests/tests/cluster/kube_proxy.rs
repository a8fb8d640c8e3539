//! The real kube-proxy in a test's cluster: it works there, and what it writes stays there.

use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use lb_tests::harness::controlplane::Options;
use lb_tests::harness::controlplane::kube_proxy::{self, KubeProxy, Mode};
use lb_tests::harness::controlplane::live::{LiveCluster, PORT};
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};

/// What the namespace that the tests run in holds of netfilter.
fn rules() -> Result<String> {
    let Output { status, stdout, .. } = Command::new("nft").args(["list", "ruleset"]).output()?;
    ensure!(status.success(), "nft list ruleset: {status}");
    Ok(String::from_utf8(stdout)?)
}

#[test]
fn kube_proxy_serves_in_either_mode_and_writes_in_its_namespace_alone() -> Result<()> {
    const MACHINE: [&str; 2] = [
        "/proc/sys/net/netfilter/nf_conntrack_max",
        "/sys/module/nf_conntrack/parameters/hashsize",
    ];
    let machine = || MACHINE.map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let before = (machine(), rules()?);
    let builder = Cluster::builder().pod(1, "a").pod(2, "b").pod(2, "c");
    let mut live = LiveCluster::start(builder, Options::default())?;
    live.serve(&["b"])?;
    live.create_pods("web", &["b"])?;
    live.create_service("web", 20)?;
    let mut proxies = Vec::new();
    for (mode, node) in Mode::ALL.into_iter().zip(live.cluster.nodes()) {
        let options = kube_proxy::Options::new(mode);
        proxies.push(KubeProxy::spawn(&live.plane, node, options)?);
    }
    for proxy in &mut proxies {
        proxy.wait_synced()?;
        let mode = proxy.options().mode.name();
        let told = proxy.http(10249, "/proxyMode")?;
        ensure!((told.status(), told.body.as_str()) == (200, mode), "{told:?}");
        let told = proxy.http(10256, "/healthz")?;
        ensure!(told.status() == 200, "{told:?}");
    }
    for client in ["a", "c"] {
        for family in Family::ALL {
            let to = (cluster_ip(20).get(family), PORT).into();
            let answer = live.cluster.pod(client).tcp(to)?;
            ensure!(answer.name() == Some("b"), "{client} to {to}: {answer:?}");
        }
    }
    for proxy in proxies {
        let mode = proxy.options().mode;
        proxy.terminate().with_context(|| mode.name())?;
    }
    let after = (machine(), rules()?);
    ensure!(after == before, "it wrote elsewhere: {before:#?}, then {after:#?}");
    Ok(())
}
