//! A cache of DNS on each node that holds the ClusterIP of the cluster's DNS, as NodeLocal DNSCache
//! in its mode iptables. CoreDNS stands for its program, which is CoreDNS with the same plugins and
//! sets up by itself what this test sets up: the interface, the address and the rules.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::real::node::Node;
use lb_tests::harness::real::objects::{App, http_probe, service, workload};
use lb_tests::harness::real::plan::CLUSTER_DNS;
use lb_tests::harness::wait::eventually;
use serde_json::{Value, json};

use crate::Test;
use crate::names::{dig, full};
use crate::world::{AGENTS, World, nodes};

pub(crate) const TESTS: &[Test] =
    &[("node_local_dns::a_cache_serves_the_cluster_ip_that_its_interface_holds", served)];

const DEVICE: &str = "nodelocaldns";
/// A name that the cache alone knows.
const OWN_NAME: &str = "who.node-local";
const OWN_ANSWER: &str = "192.0.2.53";
/// The Service by which the cache asks the cluster's DNS.
const UPSTREAM: &str = "kube-dns-upstream";

fn served(world: &World) -> Result<()> {
    world.apply(&[App::new("web", 3).deployment(), service("web", "web", "ClusterIP")])?;
    let pods = world.pods("web")?;
    let mut clients = pods.iter().map(|pod| world.pod(pod)).collect::<Result<Vec<_>>>()?;
    for node in nodes() {
        clients.push(world.node(node)?);
    }
    check(world, &clients, false)?;
    world.with_cluster_objects(&[upstream()], || {
        let outcome = install(world).and_then(|()| check(world, &clients, true));
        // The other tests need the cluster's DNS as it was.
        let removed = remove(world);
        outcome.and(removed)
    })?;
    check(world, &clients, false).context("without the cache")?;
    let logs = ["logs", "-n", "kube-system", "-l", AGENTS, "--tail=-1"];
    let logs = world.real.kubectl().run(&logs)?;
    let told = logs.lines().filter(|line| line.contains("its process serves it")).count();
    ensure!(told == nodes().count(), "{told} agents have told that an interface holds it");
    Ok(())
}

/// Every client gets answers of the cache, or of the cluster's DNS alone.
fn check(world: &World, clients: &[Host], by_cache: bool) -> Result<()> {
    let own = if by_cache { BTreeSet::from([OWN_ANSWER.to_owned()]) } else { BTreeSet::new() };
    let web = BTreeSet::from([world.cluster_ips("web")?.v4.to_string()]);
    let mut expectations = Expectations::default();
    for client in clients {
        for tcp in [false, true] {
            for (name, wanted) in [(OWN_NAME, &own), (&full(world, "web"), &web)] {
                let outcome = eventually(|| {
                    let found = dig(client, name, "A", tcp)?;
                    ensure!(found == *wanted, "{found:?} instead of {wanted:?}");
                    Ok(())
                });
                let what = format!("{} asks for {name}, TCP: {tcp}", client.name());
                expectations.check(what, outcome);
            }
        }
    }
    expectations.finish()
}

/// The cluster's DNS by another ClusterIP.
fn upstream() -> Value {
    let port =
        |protocol: &str| json!({"name": protocol.to_lowercase(), "port": 53, "protocol": protocol});
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": UPSTREAM, "namespace": "kube-system"},
        "spec": {"selector": {"k8s-app": "kube-dns"}, "ports": [port("UDP"), port("TCP")]},
    })
}

/// The cache as a DaemonSet, and its configuration.
fn cache(world: &World) -> Result<[Value; 2]> {
    let kubectl = world.real.kubectl();
    let upstream = kubectl.get(&["-n", "kube-system", "service", UPSTREAM])?;
    let upstream = upstream["spec"]["clusterIP"].as_str().context("no ClusterIP")?;
    let deployment = kubectl.get(&["-n", "kube-system", "deployment", "coredns"])?;
    let image = &deployment["spec"]["template"]["spec"]["containers"][0]["image"];
    let corefile = format!(
        ".:53 {{\n    errors\n    ready :8182\n    cache 30\n    template IN A {OWN_NAME} {{\n        \
         answer \"{{{{ .Name }}}} 60 IN A {OWN_ANSWER}\"\n    }}\n    forward . {upstream}\n}}\n"
    );
    let pod = json!({
        "hostNetwork": true,
        "dnsPolicy": "Default",
        "terminationGracePeriodSeconds": 1,
        "containers": [{
            "name": "cache",
            "image": image,
            "args": ["-conf", "/etc/coredns/Corefile"],
            "readinessProbe": http_probe("/ready", 8182),
            "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns", "readOnly": true}],
        }],
        "volumes": [{"name": "config", "configMap": {"name": "cache"}}],
    });
    let meta = json!({"name": "cache"});
    Ok([
        json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": meta,
            "data": {"Corefile": corefile},
        }),
        workload("DaemonSet", &meta, &json!({"app": "cache"}), &pod),
    ])
}

/// As the cache's own program does: its packets are not tracked, so that kube-proxy's rules would
/// not see them either.
fn install(world: &World) -> Result<()> {
    world.apply(&cache(world)?)?;
    world.roll_out("daemonset/cache")?;
    for node in world.real.nodes() {
        change_rules(node, "-A")?;
        // The cache's program makes a dummy, which not every kernel has.
        node.output("ip", &["link", "add", DEVICE, "type", "bridge"])?;
        node.output("ip", &["link", "set", DEVICE, "up"])?;
        node.output("ip", &["addr", "add", &format!("{CLUSTER_DNS}/32"), "dev", DEVICE])?;
    }
    Ok(())
}

fn remove(world: &World) -> Result<()> {
    for node in world.real.nodes() {
        node.output("ip", &["link", "del", DEVICE])?;
        change_rules(node, "-D")?;
    }
    Ok(())
}

/// Adds the rules to a node (`-A`) or removes them (`-D`).
fn change_rules(node: &Node, how: &str) -> Result<()> {
    for rule in rules() {
        let rule = rule.iter().map(String::as_str);
        let arguments: Vec<&str> = ["-t", "raw", how].into_iter().chain(rule).collect();
        node.output("iptables", &arguments)?;
    }
    Ok(())
}

fn rules() -> Vec<Vec<String>> {
    let mut rules = Vec::new();
    for protocol in ["udp", "tcp"] {
        for [chain, address, port] in [
            ["PREROUTING", "-d", "--dport"],
            ["OUTPUT", "-d", "--dport"],
            ["OUTPUT", "-s", "--sport"],
        ] {
            let rule =
                format!("{chain} {address} {CLUSTER_DNS} -p {protocol} {port} 53 -j NOTRACK");
            rules.push(rule.split(' ').map(str::to_owned).collect());
        }
    }
    rules
}
