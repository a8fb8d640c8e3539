//! Which rules of kube-proxy `cleanup` removes, and how a drain ends.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::agent::{self, lb_agent};
use lb_tests::harness::netns::actors::process::Process;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::node::Node;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario};
use lb_tests::harness::wait::{PATIENCE, eventually};
use nix::sys::signal::Signal;

const SERVICE: u8 = 1;

/// The rule sets that a node may have.
const VARIANTS: [&str; 4] =
    ["iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"];

/// What the kubelet, network plugins and users have made.
const OTHERS: &str = r#"*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-SERVICES - [0:0]
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-SVC-ABCDEFGHIJKLMNOP - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -m comment --comment "\"kubernetes\" -j KUBE-SERVICES" -j ACCEPT
-A FORWARD -m comment --comment "kubernetes forwarding rules of mine" -j ACCEPT
COMMIT
*nat
:CNI-HOSTPORT-DNAT - [0:0]
:KUBE-SVC-MINE - [0:0]
:KUBE-MARK-DROP - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A PREROUTING -j KUBE-SVC-MINE
-A POSTROUTING -o eth9 -m comment --comment "kubernetes pods" -j MASQUERADE
-A KUBE-SVC-MINE -p tcp -m tcp --dport 99 -j RETURN
COMMIT
"#;

/// What kube-proxy writes, in little.
const KUBE_PROXY: &str = r#"*mangle
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-I FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
*nat
:KUBE-EXT-ABCDEFGHIJKLMNOP - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SEP-ABCDEFGHIJKLMNO2 - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-ABCDEFGHIJKLMNOP - [0:0]
-I PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-I OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-I POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -p tcp -m comment --comment "default/web:tcp cluster IP" -m tcp --dport 443 -j KUBE-SVC-ABCDEFGHIJKLMNOP
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-EXT-ABCDEFGHIJKLMNOP
-A KUBE-EXT-ABCDEFGHIJKLMNOP -j KUBE-MARK-MASQ
-A KUBE-EXT-ABCDEFGHIJKLMNOP -j KUBE-SVC-ABCDEFGHIJKLMNOP
-A KUBE-SVC-ABCDEFGHIJKLMNOP -j KUBE-SEP-ABCDEFGHIJKLMNO2
-A KUBE-SEP-ABCDEFGHIJKLMNO2 -p tcp -m tcp -j DNAT --to-destination :8080
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
"#;

fn sh(node: &Node, script: &str) -> Result<String> {
    let mut command = Command::new("sh");
    command.args(["-ec", script]);
    node.output(command, PATIENCE)
}

fn plant(node: &Node, rules: &str) -> Result<()> {
    for variant in VARIANTS {
        sh(node, &format!("{variant}-restore --noflush <<'RULES'\n{rules}RULES\n"))?;
    }
    Ok(())
}

/// All rules of a node, without times and counters.
fn rules(node: &Node) -> Result<String> {
    let mut all = String::new();
    for variant in VARIANTS {
        let saved = sh(node, &format!("{variant}-save"))?;
        let lines = saved.lines().filter(|line| !line.starts_with('#'));
        let lines = lines.map(|line| line.split(" [").next().unwrap_or_default());
        all += &format!("{variant}\n{}\n", lines.collect::<Vec<_>>().join("\n"));
    }
    Ok(all + &sh(node, "nft list tables")?)
}

fn start_lb(node: &Node, arguments: &[&str]) -> Result<Process> {
    let mut command = lb_agent()?;
    command.args(arguments).arg("--bpf-dir").arg(node.bpf_dir());
    command.arg("--cgroup").arg(node.cgroup_tree().path());
    node.spawn_agent("command", command)
}

fn lb(node: &Node, arguments: &[&str]) -> Result<String> {
    let mut process = start_lb(node, arguments)?;
    let status = process.wait(PATIENCE)?;
    ensure!(status.success(), "{arguments:?}: {status}\n{}", process.tail());
    Ok(process.stdout())
}

#[test]
fn cleanup_removes_the_rules_of_kube_proxy_and_no_others() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    let mut expectations = Expectations::default();
    plant(&node, OTHERS)?;
    sh(&node, "nft add table inet kube-proxy; nft add table ip mine")?;
    let before = rules(&node)?;
    for round in 1..=2 {
        plant(&node, KUBE_PROXY)?;
        sh(&node, "nft add table ip kube-proxy; nft add table ip6 kube-proxy")?;
        let told = lb(&node, &["check"])?;
        let lines = told.lines().filter(|line| line.contains("kube-proxy"));
        expectations.is_true(format!("check: {told}"), lines.count() == 1);
        for place in ["ip6tables-legacy, table nat: 8 chains, 3 jumps", "nft: table ip6 kube-proxy"]
        {
            expectations.is_true(format!("check: no {place}: {told}"), told.contains(place));
        }
        let said = lb(&node, &["cleanup", "--kube-proxy"])?;
        expectations.is_true(format!("{round}: {said}"), said.lines().count() == 4 * 3 + 2);
        let after = rules(&node)?;
        expectations.is_true(format!("{round}: {before}\nis now\n{after}"), after == before);
    }
    let said = lb(&node, &["cleanup", "--kube-proxy"])?;
    expectations.is_true(format!("again: {said}"), said.contains("no kube-proxy rules found"));
    let told = lb(&node, &["check"])?;
    expectations.is_true(format!("check: {told}"), told.contains("no kube-proxy rules found"));
    expectations.finish()
}

#[test]
fn chains_that_rules_of_others_use_are_kept() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    plant(&node, OTHERS)?;
    plant(&node, KUBE_PROXY)?;
    for variant in VARIANTS {
        sh(&node, &format!("{variant} -t nat -A CNI-HOSTPORT-DNAT -j KUBE-MARK-MASQ"))?;
    }
    let said = lb(&node, &["cleanup", "--kube-proxy"])?;
    let kept = "kept because other rules use them: KUBE-MARK-MASQ, KUBE-POSTROUTING";
    let mut expectations = Expectations::default();
    expectations.is_true(&said, said.matches(kept).count() == VARIANTS.len());
    for variant in VARIANTS {
        let saved = sh(&node, &format!("{variant}-save -t nat"))?;
        let left = [
            "-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\"",
            "-A KUBE-MARK-MASQ -j MARK",
            "-A KUBE-POSTROUTING -j MASQUERADE",
        ];
        expectations.is_true(&saved, left.iter().all(|rule| saved.contains(rule)));
        expectations
            .is_true(&saved, !saved.contains("KUBE-SERVICES") && !saved.contains("KUBE-EXT-"));
    }
    expectations.finish()
}

fn scenario() -> Result<Scenario> {
    let builder = Cluster::builder().pod(1, "a").pod(1, "b").pod(2, "c");
    let mut arguments = vec!["--socket-lb", "off"];
    arguments.extend(SMALL_MAPS);
    let mut scenario = Scenario::start(builder, &arguments)?;
    scenario.serve(&["b", "c"])?;
    scenario.publish(&scenario.service("web", SERVICE), &scenario.endpoints(&["b", "c"]))?;
    Ok(scenario)
}

fn probe(transport: Transport, family: Family) -> Probe {
    Probe::new(transport, (cluster_ip(SERVICE).get(family), PORT).into())
}

#[test]
fn a_drain_ends_with_the_last_connection() -> Result<()> {
    let mut scenario = scenario()?;
    let mut expectations = Expectations::default();
    let (a, node) = (scenario.cluster.pod("a"), scenario.cluster.node(1));
    let open = |family| a.open(probe(Transport::Tcp, family));
    let held = Family::ALL.map(open).into_iter().collect::<Result<Vec<_>>>()?;
    scenario.take_agent(1)?.terminate()?;
    let mut drain = start_lb(&node, &["cleanup", "--drain", "1m"])?;
    drain.wait_for_output("draining: 2 flows left, 59 s remaining", PATIENCE)?;
    for connection in &held {
        let answer = connection.exchange("again", PATIENCE)?;
        expectations.is_true(format!("known: {answer:?}"), answer.name().is_some());
    }
    for family in Family::ALL {
        let answer = a.ask(probe(Transport::Tcp, family).timeout(Duration::from_millis(200)))?;
        expectations.is_true(format!("new: {answer:?}"), answer.error() == Some("timeout"));
    }
    let leaked = scenario.cluster.fabric().service_packets()?;
    expectations.is_true(format!("{leaked} packets to ClusterIPs left a node"), leaked == 0);
    expectations.is_true("it ended before its time", drain.ended()?.is_none());
    drop(held);
    let status = drain.wait(PATIENCE)?;
    let said = drain.stdout();
    expectations
        .is_true(format!("{status}: {said}"), said.contains("drained: no flow is left\ndetached "));
    expectations.is_true("pins are left", !node.bpf_dir().exists());
    let said = lb(&node, &["cleanup", "--drain", "1m"])?;
    expectations
        .is_true(format!("again: {said}"), said.contains("nothing to drain\ndetached 0 links"));
    expectations.finish()
}

#[test]
fn a_drain_that_is_stopped_goes_on_until_an_agent_runs() -> Result<()> {
    let mut scenario = scenario()?;
    let mut expectations = Expectations::default();
    let (a, node) = (scenario.cluster.pod("a"), scenario.cluster.node(1));
    let quick = |family| probe(Transport::Tcp, family).timeout(Duration::from_millis(200));
    let held = a.open(probe(Transport::Tcp, Family::V4))?;
    scenario.take_agent(1)?.terminate()?;
    for _ in 0..2 {
        let mut drain = start_lb(&node, &["cleanup", "--drain", "1m"])?;
        drain.wait_for_output("draining: 1 flows left", PATIENCE)?;
        drain.signal(Signal::SIGINT)?;
        let status = drain.wait(PATIENCE)?;
        let said = drain.stderr();
        expectations.is_true(format!("{status}: {said}"), status.code() == Some(1));
        expectations.is_true(&said, said.contains("interrupted: 1 flows continue"));
        let answer = a.ask(quick(Family::V4))?;
        expectations
            .is_true(format!("stopped, new: {answer:?}"), answer.error() == Some("timeout"));
        let answer = held.exchange("again", PATIENCE)?;
        expectations.is_true(format!("stopped, known: {answer:?}"), answer.name().is_some());
    }
    let told = lb(&node, &["check"])?;
    expectations.is_true(format!("check: {told}"), told.contains("`cleanup --drain` was begun"));
    scenario.start_agent(1)?;
    for family in Family::ALL {
        let answer = a.ask(probe(Transport::Tcp, family))?;
        expectations.is_true(format!("an agent runs: {answer:?}"), answer.name().is_some());
    }
    let answer = held.exchange("again", PATIENCE)?;
    expectations.is_true(format!("an agent runs, known: {answer:?}"), answer.name().is_some());
    let refused = start_lb(&node, &["cleanup", "--drain", "1s"]).and_then(|mut drain| {
        drain.wait(PATIENCE)?;
        Ok(drain.stderr())
    })?;
    let holder = format!("another lb-agent (process {}", scenario.agent(1)?.process().pid());
    expectations.is_true(&refused, refused.contains(&holder));
    let told = agent::get(&node, "counters")?.to_string();
    expectations.is_true(&told, told.contains("draining"));
    expectations.finish()
}

/// The chain by which kube-proxy's rules are recognised without the node's tools.
fn write_rules(node: &Node) -> Result<()> {
    for family in ["ip", "ip6"] {
        node.output(nft(&["add", "table", family, "nat"]), PATIENCE)?;
        node.output(nft(&["add", "chain", family, "nat", "KUBE-SERVICES"]), PATIENCE)?;
    }
    Ok(())
}

fn nft(arguments: &[&str]) -> Command {
    let mut command = Command::new("nft");
    command.args(arguments);
    command
}

#[test]
fn an_agent_says_when_kube_proxy_comes_back() -> Result<()> {
    let mut scenario = Scenario::start(Cluster::builder().nodes(1), &SMALL_MAPS)?;
    let node = scenario.cluster.node(1);
    let metric = |scenario: &mut Scenario, value: &str| -> Result<()> {
        let agent = scenario.agent(1)?;
        eventually(|| {
            let (_, text) = agent.http(10249, "/metrics")?;
            ensure!(text.contains(&format!("\nlb_kube_proxy_rules {value}\n")), "not {value}");
            Ok(())
        })
    };
    metric(&mut scenario, "0")?;
    write_rules(&node)?;
    scenario.agent(1)?.wait_log(&["WARN", "kube-proxy is back", "chain KUBE-SERVICES (IPv6)"])?;
    metric(&mut scenario, "1")?;
    // The next agent finds them there.
    scenario.take_agent(1)?.terminate()?;
    scenario.start_agent(1)?;
    scenario.agent(1)?.wait_log(&["WARN", "kube-proxy's rules are on this node"])?;
    for family in ["ip", "ip6"] {
        node.output(nft(&["delete", "table", family, "nat"]), PATIENCE)?;
    }
    node.output(nft(&["add", "table", "ip", "kube-proxy"]), PATIENCE)?;
    metric(&mut scenario, "1")?;
    node.output(nft(&["delete", "table", "ip", "kube-proxy"]), PATIENCE)?;
    scenario.agent(1)?.wait_log(&["INFO", "kube-proxy's rules are gone"])?;
    metric(&mut scenario, "0")
}

#[test]
fn a_container_removes_rules_with_the_tools_of_the_node_s_root() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    node.output(nft(&["add", "table", "ip", "kube-proxy"]), PATIENCE)?;
    let root = tempfile::tempdir()?;
    let clean = |mounts: &str| -> Result<String> {
        let agent = lb_agent()?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &format!("{mounts} && exec \"$@\""), "sh"]);
        command.arg(agent.get_program()).args(["cleanup", "--kube-proxy", "--chroot"]);
        command.arg(root.path());
        node.output(command, PATIENCE)
    };
    let error = clean("true").err().context("it found tools in an empty root")?;
    ensure!(format!("{error:#}").contains("processes in /proc"), "{error:#}");
    let said = clean(&format!("mount --rbind / {}", root.path().display()))?;
    ensure!(said.contains("removed nft: table ip kube-proxy"), "{said}");
    Ok(())
}
