//! The configuration of kube-proxy, as an agent takes it and as it changes under one.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::actors::agent::{self, Agent, Options};
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::node::Node;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::words::config_map::ConfigMap;
use lb_tests::harness::netns::words::frontends::Frontend;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario};
use lb_tests::harness::wait::PATIENCE;
use serde_json::Value;

const TYPE: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
/// What an agent shows as its configuration.
fn configz(agent: &Agent) -> Result<Value> {
    let (status, body) = agent.http(10249, "/configz")?;
    ensure!(status == 200, "{status} {body}");
    let mut all: Value = serde_json::from_str(&body)?;
    Ok(all["kubeproxy.config.k8s.io"].take())
}

/// A sysctl of connection tracking, of the node's network namespace.
fn conntrack(node: &Node, name: &str) -> Result<String> {
    node.netns().run(|| {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
        Ok(fs::read_to_string(path)?.trim().to_owned())
    })
}

fn set_conntrack(node: &Node, name: &str, value: &str) -> Result<()> {
    node.netns().run(|| {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
        fs::write(&path, value).with_context(|| path)
    })
}

#[test]
fn a_file_that_changes_ends_the_agent_if_it_is_valid_and_says_something_else() -> Result<()> {
    let file = |fields: &str| format!("{TYPE}{fields}\n");
    let mut map = ConfigMap::mount(&[("config.conf", &file("oomScoreAdj: 100"))])?;
    let path = map.path("config.conf").display().to_string();
    let arguments = [&["--config", path.as_str()][..], &SMALL_MAPS].concat();
    let builder = Cluster::builder().nodes(1).pod(1, "a").pod(1, "b");
    let mut scenario = Scenario::start(builder, &arguments)?;
    scenario.serve(&["b"])?;
    scenario.publish(&scenario.service("web", 1), &scenario.endpoints(&["b"]))?;
    let a = scenario.cluster.pod("a");
    let to = |family| (cluster_ip(1).get(family), PORT).into();
    let loads = [
        a.load(&Probe::tcp(to(Family::V6)), 200, Duration::from_secs(60))?,
        a.load(&Probe::udp(to(Family::V4)), 200, Duration::from_secs(60))?,
    ];
    let agent = scenario.agent(1)?;
    ensure!(configz(agent)?["oomScoreAdj"] == 100);
    let score = format!("/proc/{}/oom_score_adj", agent.process().pid());
    ensure!(fs::read_to_string(score)?.trim() == "100");

    map.update(&[("config.conf", &file("conntrack: {maxPerCore: x}"))])?;
    scenario.agent(1)?.wait_log(&["conntrack.maxPerCore: expected an integer, found \"x\""])?;
    map.update(&[("config.conf", &file("# The same.\n{oomScoreAdj: 100, mode: ''}"))])?;
    map.update(&[("config.conf", &file("# The same.\noomScoreAdj: 100\nmode: ''"))])?;
    scenario.agent(1)?.wait_log(&["the configuration is valid again"])?;
    map.update(&[("config.conf", &file("oomScoreAdj: 200"))])?;
    let mut agent = scenario.take_agent(1)?;
    let status = agent.process().wait(PATIENCE)?;
    let said = agent.process().stderr();
    let last = said.lines().last().unwrap_or_default();
    let expected =
        format!("lb-agent: the configuration in {path} has changed: exiting, a restart applies it");
    ensure!(status.code() == Some(1) && last == expected, "{status}: {last}");

    scenario.start_agent(1)?;
    ensure!(configz(scenario.agent(1)?)?["oomScoreAdj"] == 200);
    for load in loads {
        let report = load.stop()?;
        ensure!(report.failures() == 0 && report.ok > 100, "{report:?}");
    }
    Ok(())
}

#[test]
fn the_node_s_connection_tracking_is_set_as_kube_proxy_sets_it() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    let directory = tempfile::tempdir()?;
    let run = |arguments: &[&str]| -> Result<()> {
        let options = Options::manifests(directory.path()).arguments(&SMALL_MAPS);
        let agent = Agent::spawn(&node, &options.arguments(arguments).argument("--init-only"))?;
        let mut agent = agent;
        let status = agent.process().wait(PATIENCE)?;
        ensure!(status.success(), "{status}: {}", agent.process().tail());
        Ok(())
    };
    let check = |name: &str, expected: &str| -> Result<()> {
        let found = conntrack(&node, name)?;
        ensure!(found == expected, "nf_conntrack_{name} is {found}, not {expected}");
        Ok(())
    };
    let untouched = ["tcp_be_liberal", "udp_timeout", "udp_timeout_stream", "max"];
    let before = untouched.map(|name| conntrack(&node, name));
    set_conntrack(&node, "tcp_timeout_established", "1000")?;
    set_conntrack(&node, "tcp_timeout_close_wait", "60")?;
    run(&["--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0"])?;
    check("tcp_timeout_established", "1000")?;
    check("tcp_timeout_close_wait", "60")?;
    run(&[])?;
    check("tcp_timeout_established", "86400")?;
    check("tcp_timeout_close_wait", "3600")?;
    for (name, before) in untouched.into_iter().zip(before) {
        check(name, &before?)?;
    }
    let path = directory.path().join("config.conf");
    let fields = "conntrack: {tcpEstablishedTimeout: 2h, tcpBeLiberal: true, udpTimeout: 45s, \
        udpStreamTimeout: 2m}\n";
    fs::write(&path, format!("{TYPE}{fields}"))?;
    run(&["--config", &path.display().to_string(), "--conntrack-udp-timeout=50s"])?;
    check("tcp_timeout_established", "7200")?;
    check("tcp_be_liberal", "1")?;
    check("udp_timeout", "50")?;
    check("udp_timeout_stream", "120")
}

#[test]
fn node_ports_are_served_on_loopback_unless_it_is_turned_off() -> Result<()> {
    let builder = Cluster::builder().nodes(1).pod(1, "b");
    let mut scenario = Scenario::start(builder, &SMALL_MAPS)?;
    scenario.serve(&["b"])?;
    scenario.publish(&scenario.exposed("web", 1), &scenario.endpoints(&["b"]))?;
    let node = scenario.cluster.node(1);
    let ask = |scenario: &Scenario, front: Frontend, family| -> Result<bool> {
        let answer = node.ask(Probe::tcp(front.at(scenario, 1, family)))?;
        Ok(answer.reached().is_some())
    };
    for family in Family::ALL {
        ensure!(ask(&scenario, Frontend::Loopback, family)?, "{family:?}");
    }
    let log = {
        scenario.take_agent(1)?.terminate()?;
        let off = ["--iptables-localhost-nodeports=false", "--proxy-mode=ipvs"];
        scenario.set_arguments(&[&off[..], &SMALL_MAPS].concat());
        scenario.start_agent(1)?;
        scenario.agent(1)?.process().stderr()
    };
    for family in Family::ALL {
        ensure!(!ask(&scenario, Frontend::Loopback, family)?, "{family:?} by loopback");
        ensure!(ask(&scenario, Frontend::NodePort(1), family)?, "{family:?} by the node's address");
    }
    let named = "have no effect here flags=\"--proxy-mode\"";
    ensure!(log.matches(named).count() == 1, "{log}");
    Ok(())
}

#[test]
fn kube_proxy_s_spelling_cleans_up_and_writes_the_configuration() -> Result<()> {
    let mut scenario = Scenario::start(Cluster::builder().nodes(1), &SMALL_MAPS)?;
    let node = scenario.cluster.node(1);
    let path = tempfile::tempdir()?;
    let path = path.path().join("written.conf");
    let run = |arguments: &[&str]| -> Result<String> {
        let mut command: Command = agent::lb_agent()?;
        command.args(["run", "--hostname-override", "node1", "--bpf-dir"]).arg(node.bpf_dir());
        command.arg("--cgroup").arg(node.cgroup_tree().path()).args(arguments);
        node.output(command, PATIENCE)
    };
    let written = path.display().to_string();
    run(&["--write-config-to", &written, "--cleanup", "--cluster-cidr=10.244.0.0/16"])?;
    let text = fs::read_to_string(&path)?;
    ensure!(text.contains("\nclusterCIDR: 10.244.0.0/16\n"), "{text}");
    ensure!(text.contains("\nhostnameOverride: node1\n"), "{text}");
    ensure!(node.bpf_dir().exists(), "--write-config-to does nothing else");
    scenario.take_agent(1)?.terminate()?;
    let said = run(&["--config", &written, "--cleanup"])?;
    ensure!(said.starts_with("detached ") && !said.contains("detached 0 links"), "{said}");
    ensure!(!node.bpf_dir().exists(), "pins are left");
    Ok(())
}

/// How often connect() over IPv4 ended for a reason on node 1.
fn connects(scenario: &mut Scenario, reason: &str) -> Result<u64> {
    let counters = scenario.agent(1)?.get("counters")?;
    let rows = counters.as_array().into_iter().flatten();
    let mut rows = rows.filter(|row| row["hook"] == "connect4" && row["reason"] == reason);
    Ok(rows.next().and_then(|row| row["count"].as_u64()).unwrap_or(0))
}

#[test]
fn processes_of_excluded_cgroups_are_left_to_the_packet_path() -> Result<()> {
    let builder = Cluster::builder().nodes(1).pod(1, "a").pod(1, "b").pod(1, "c");
    let arguments = [&["--socket-lb", "tcp"][..], &SMALL_MAPS].concat();
    let mut scenario = Scenario::start(builder, &arguments)?;
    scenario.serve(&["b"])?;
    scenario.publish(&scenario.service("web", 1), &scenario.endpoints(&["b"]))?;
    scenario.take_agent(1)?.terminate()?;
    let excluded =
        format!("nowhere,pods/a,{}", scenario.cluster.pod("b").cgroup().path().display());
    let exclude = ["--socket-lb", "tcp", "--socket-lb-exclude-cgroups", &excluded];
    scenario.set_arguments(&[&exclude[..], &SMALL_MAPS].concat());
    scenario.start_agent(1)?;
    let log = scenario.agent(1)?.process().stderr();
    ensure!(log.matches("its processes are not excluded").count() == 1, "{log}");

    let to = (cluster_ip(1).v4, PORT).into();
    let hosts = [(scenario.cluster.pod("a"), true), (scenario.cluster.pod("c"), false)];
    for (pod, is_excluded) in hosts {
        let before = [
            connects(&mut scenario, "socket_exempt")?,
            scenario.agent(1)?.counted("flow_created")?,
        ];
        let answer = pod.tcp(to)?;
        ensure!(answer.name() == Some("b"), "{answer:?}");
        let after = [
            connects(&mut scenario, "socket_exempt")?,
            scenario.agent(1)?.counted("flow_created")?,
        ];
        let added = [after[0] - before[0], after[1] - before[1]];
        let expected = if is_excluded { [1, 1] } else { [0, 0] };
        ensure!(added == expected, "{}: {added:?}, not {expected:?}", pod.name());
    }
    let translated = connects(&mut scenario, "socket_translated")?;
    ensure!(translated == 1, "{translated} connections were translated by connect()");
    Ok(())
}
