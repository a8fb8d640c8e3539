//! A cluster's own kube-proxy configuration, given to the agent.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::controlplane::Options;
use lb_tests::harness::controlplane::live::{LiveCluster, PORT};
use lb_tests::harness::controlplane::programs::kube_proxy;
use lb_tests::harness::netns::actors::agent;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::words::config_map::ConfigMap;
use serde_json::Value;

/// The key `config.conf` of the ConfigMap `kube-proxy`, as kubeadm 1.36 writes it.
const CONFIG: &str = include_str!("../../golden/kube-proxy/kubeadm.yaml");
/// The key `kubeconfig.conf`.
const KUBECONFIG: &str = include_str!("../../golden/kube-proxy/kubeconfig.yaml");
/// Where its DaemonSet mounts the ConfigMap, and every pod its ServiceAccount.
const MOUNT: &str = "/var/lib/kube-proxy";
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const SERVER: &str = "https://192.0.2.1:6443";

/// Replaces a text that must be there.
fn replace(text: &str, old: &str, new: &str) -> Result<String> {
    ensure!(text.contains(old), "no {old:?} in {text}");
    Ok(text.replace(old, new))
}

#[test]
fn the_config_map_of_kubeadm_starts_the_agent_unchanged() -> Result<()> {
    let builder = Cluster::builder().nodes(1).pod(1, "a").pod(1, "b");
    let mut live = LiveCluster::start(builder, Options::default())?;
    live.serve(&["b"])?;
    live.create_pods("web", &["b"])?;
    live.create_service("web", 20)?;

    // What a pod would find at fixed places lies in directories of this test.
    let account = tempfile::tempdir()?;
    let own: Value = serde_json::from_slice(&fs::read(live.plane.agent_kubeconfig())?)?;
    let token = own["users"][0]["user"]["token"].as_str().context("a token")?;
    fs::write(account.path().join("token"), token)?;
    fs::copy(live.plane.directory().join("apiserver.crt"), account.path().join("ca.crt"))?;
    let mut map = ConfigMap::mount(&[("config.conf", ""), ("kubeconfig.conf", "")])?;
    let mount = map.path("").display().to_string();
    let config = replace(CONFIG, MOUNT, mount.trim_end_matches('/'))?;
    let kubeconfig = replace(KUBECONFIG, ACCOUNT, &account.path().display().to_string())?;
    let server = format!("https://{}", live.plane.api_server_address());
    let kubeconfig = replace(&kubeconfig, SERVER, &server)?;
    map.update(&[("config.conf", &config), ("kubeconfig.conf", &kubeconfig)])?;

    let config = format!("--config={}", map.path("config.conf").display());
    let agent = live.spawn_agent_with(1, &agent::Options::default().argument(config))?;
    agent.wait_ready()?;
    let (status, configz) = agent.http(10249, "/configz")?;
    let configz: Value = serde_json::from_str(&configz)?;
    let shown = &configz["kubeproxy.config.k8s.io"];
    ensure!(status == 200 && shown["clusterCIDR"] == "10.244.0.0/16", "{shown}");
    ensure!(shown["hostnameOverride"] == "node1" && shown["mode"] == "iptables", "{shown}");
    let log = agent.process().stderr();
    ensure!(!log.contains("no effect"), "{log}");

    live.wait_backends("web", Some(1))?;
    for family in Family::ALL {
        let to = (cluster_ip(20).get(family), PORT).into();
        let answer = live.cluster.pod("a").tcp(to)?;
        ensure!(answer.name() == Some("b"), "{answer:?}");
    }
    let node = live.cluster.node(1);
    let close_wait = node.netns().run(|| {
        let path = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait";
        Ok(fs::read_to_string(path)?)
    })?;
    ensure!(close_wait.trim() == "3600", "{close_wait}");
    Ok(())
}

/// Flags of kube-proxy that both take for the same. kube-proxy lets `--masquerade-all` set one
/// section, lb all of them.
const FLAGS: [&str; 14] = [
    "--cluster-cidr=10.0.0.0/14,fd00::/48",
    "--bind-address=::",
    "--oom-score-adj=-998",
    "--v=2",
    "--iptables-sync-period=1m",
    "--iptables-min-sync-period=10s",
    "--detect-local-mode=NodeCIDR",
    "--feature-gates=AllAlpha=false",
    "--vmodule=a=3,b=4",
    "--nodeport-addresses=10.0.0.0/8,fd00::/8",
    "--kube-api-qps=6.5",
    "--conntrack-tcp-timeout-established=1h30m",
    "--conntrack-udp-timeout=1.5s",
    "--log-flush-frequency=1500ms",
];

#[test]
fn what_is_written_is_what_kube_proxy_writes() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    let directory = tempfile::tempdir()?;
    let file = |name: &str| directory.path().join(name).display().to_string();
    fs::write(file("kubeadm.conf"), CONFIG)?;
    let other = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
        mode: nftables\nnftables: {masqueradeAll: true, syncPeriod: 1m}\nbindAddress: '::'\n\
        nodePortAddresses: [primary]\nlogging: {flushFrequency: 1000000000, verbosity: 3}\n\
        detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: cali}\n\
        ipvs: {excludeCIDRs: [10.9.0.0/16], strictARP: true, tcpTimeout: 15m}\n";
    fs::write(file("other.conf"), other)?;
    let written = |mut command: Command, name: &str, arguments: &[String]| -> Result<String> {
        let path = file(name);
        command.args(arguments).args(["--write-config-to", &path]);
        node.output(command, Duration::from_secs(10))?;
        // Both quote, but not the same: what looks like a number to one does not to the other.
        Ok(fs::read_to_string(path)?.replace(['"', '\''], ""))
    };
    let config = |name: &str| vec!["--config".to_owned(), file(name)];
    let flags = FLAGS.map(str::to_owned).to_vec();
    for arguments in [vec![], config("kubeadm.conf"), config("other.conf"), flags] {
        let theirs = written(Command::new(kube_proxy()?), "theirs", &arguments)?;
        let mut run = agent::lb_agent()?;
        run.arg("run");
        let ours = written(run, "ours", &arguments)?;
        ensure!(ours == theirs, "{arguments:?}: {ours}\nis not\n{theirs}");
    }
    Ok(())
}
